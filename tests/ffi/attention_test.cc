// Attention of every kernel that is built in and that this machine can run, against a naive oracle in
// double. Needs neither XLA nor Python:
//
//   cmake -S ffi -B build/tests -DBITJAX_EXTENSION=OFF -DBITJAX_KERNEL_TESTS=ON -DBITJAX_SANITIZE=ON
//   cmake --build build/tests && build/tests/attention_test [n: every n-th shape only]
//
// Everything is computed twice: in heap buffers at odd offsets, and in front of guard pages. Slots that
// no row sees hold NaN.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "attention.h"
#include "buffer.h"
#include "dispatch.h"

namespace bitjax {
namespace {

int passed = 0;
int failed = 0;

void check(bool ok, const std::string& what) {
  (ok ? passed : failed) += 1;
  if (!ok && failed <= 20)
    std::printf("FAILED %s %s\n", active_kernel().name, what.c_str());
}

std::mt19937_64 rng(20240227);

int64_t uniform(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(rng);
}

float normal() { return std::normal_distribution<float>()(rng); }

size_t odd() { return static_cast<size_t>(2 * uniform(0, 3) + 1); }

// Numbers whose low 16 bits are zero are bfloat16 too.
void narrow(float x, float* y) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits &= 0xFFFF0000U;
  std::memcpy(y, &bits, sizeof bits);
}

void narrow(float x, uint16_t* y) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  *y = static_cast<uint16_t>(bits >> 16);
}

double value_of(float x) { return x; }

double value_of(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float y;
  std::memcpy(&y, &bits, sizeof y);
  return y;
}

Attend<float> attend_of(const AttentionKernel& kernel, float) { return kernel.attend_f32; }
Attend<uint16_t> attend_of(const AttentionKernel& kernel, uint16_t) { return kernel.attend_bf16; }

template <typename T>
struct Problem {
  int m, h;
  int64_t first, last;
  Buffer<float> q;
  Buffer<int64_t> position;
  Buffer<T> keys, values;

  // The last row sees slot last - 1, every other one some earlier slot, of an earlier split perhaps.
  Problem(int m, int h, int64_t first, int64_t last)
      : m(m), h(h), first(first), last(last), q(m * h, odd()), position(m, odd()),
        keys((last + kStepSlots - 1) / kStepSlots * kStepSlots * h, odd()),
        values((last + kStepSlots - 1) / kStepSlots * kStepSlots * h, odd()) {
    for (int64_t i = 0; i < m * h; ++i) q[i] = 1.5F * normal() / std::sqrt(static_cast<float>(h));
    for (int i = 0; i < m; ++i) position[i] = i + 1 == m ? last - 1 : uniform(first / 2, last - 1);
    for (int64_t s = 0; s < static_cast<int64_t>(keys.size()) / h; ++s)
      for (int d = 0; d < h; ++d) {
        const bool seen = s < last;
        const float nan = std::numeric_limits<float>::quiet_NaN();
        narrow(seen ? normal() : nan, &key(s, d));
        narrow(seen ? normal() : nan, &values[s * h + d]);
      }
  }

  T& key(int64_t s, int d) const { return keys[(s / 16 * h + d) * 16 + s % 16]; }

  void attend(Partial* partial, float* out) const {
    attend_of(active_attention(), T{})(q.get(), position.get(), m, h, keys.get(), values.get(), first,
                                       last, partial, out);
  }

  std::string name() const {
    return "m=" + std::to_string(m) + " h=" + std::to_string(h) + " slots " + std::to_string(first) +
           ".." + std::to_string(last) + (sizeof(T) == 2 ? " bfloat16" : " float32");
  }
};

// Row i against the equation. A score's error, in float32 roundings of sum |q k|, is at most h (its
// products and their sum); a weight's besides 1 of the difference from the maximum, 4 of e^x, and at
// most 6 for each step of 64 slots that rescales it; sums of n terms round n times more, twice.
template <typename T>
void check_row(const Problem<T>& p, int i, const Partial& partial, const float* out) {
  constexpr double kUnit = 1.0 / (1 << 24);
  const int64_t end = std::min(p.last, p.position[i] + 1);
  const std::string what = p.name() + " row " + std::to_string(i) + ": ";
  if (end <= p.first) {
    bool zero = partial.total == 0;
    for (int d = 0; d < p.h; ++d) zero = zero && out[d] == 0;
    return check(zero, what + "sees nothing");
  }
  std::vector<double> score, size;
  for (int64_t s = p.first; s < end; ++s) {
    double sum = 0, magnitude = 0;
    for (int d = 0; d < p.h; ++d) {
      const double product = static_cast<double>(p.q[i * p.h + d]) * value_of(p.key(s, d));
      sum += product;
      magnitude += std::fabs(product);
    }
    score.push_back(sum);
    size.push_back(magnitude);
  }
  const auto top = static_cast<size_t>(std::max_element(score.begin(), score.end()) - score.begin());
  const double most = *std::max_element(size.begin(), size.end()) * p.h * kUnit;
  check(std::fabs(partial.maximum - score[top]) <= most, what + "maximum");

  const double n = static_cast<double>(score.size());
  double total = 0, total_error = 0;
  std::vector<double> mixed(static_cast<size_t>(p.h)), error(static_cast<size_t>(p.h));
  for (size_t s = 0; s < score.size(); ++s) {
    const double below = partial.maximum - score[s];
    const double weight = std::exp(-below);
    const double off =
        1.01 * kUnit * weight * (p.h * size[s] + std::fabs(below) + 5 + 6 * (n / 64 + 1) + 2 * n);
    total += weight;
    total_error += off;
    for (int d = 0; d < p.h; ++d) {
      const double value = value_of(p.values[(p.first + static_cast<int64_t>(s)) * p.h + d]);
      mixed[static_cast<size_t>(d)] += weight * value;
      error[static_cast<size_t>(d)] += off * std::fabs(value);
    }
  }
  check(std::fabs(partial.total - total) <= total_error, what + "total");
  bool near = true;
  for (size_t d = 0; d < mixed.size(); ++d) near = near && std::fabs(out[d] - mixed[d]) <= error[d];
  check(near, what + "mixed");
}

// The same bits for a row that is alone, over the slots that it sees.
template <typename T>
void check_alone(const Problem<T>& p, int i, const Partial& partial, const float* out) {
  const int64_t end = std::min(p.last, p.position[i] + 1);
  if (end <= p.first) return;
  Buffer<float> q(p.h, odd()), alone(p.h, odd());
  std::memcpy(q.get(), p.q.get() + i * p.h, static_cast<size_t>(p.h) * sizeof(float));
  Partial got{};
  attend_of(active_attention(), T{})(q.get(), p.position.get() + i, 1, p.h, p.keys.get(),
                                     p.values.get(), p.first, end, &got, alone.get());
  const bool same = got.maximum == partial.maximum && got.total == partial.total &&
                    std::memcmp(alone.get(), out, static_cast<size_t>(p.h) * sizeof(float)) == 0;
  check(same, p.name() + " row " + std::to_string(i) + " alone");
}

// A NaN or an infinity in a query, or in a key that is seen, reaches the total of those rows alone.
template <typename T>
void check_poison(Problem<T>& p, const Buffer<Partial>& clean, float bad) {
  Buffer<Partial> partial(p.m, odd());
  Buffer<float> out(p.m * p.h, odd());
  const int row = static_cast<int>(uniform(0, p.m - 1));
  const auto element = row * p.h + uniform(0, p.h - 1);
  const float kept = p.q[element];
  p.q[element] = bad;
  p.attend(partial.get(), out.get());
  p.q[element] = kept;
  for (int i = 0; i < p.m; ++i) {
    const bool spoilt = i == row && p.position[i] >= p.first;
    check(spoilt ? std::isnan(partial[i].total) : partial[i].total == clean[i].total,
          p.name() + " bad query, row " + std::to_string(i));
  }
  const int64_t slot = uniform(p.first, p.last - 1);
  T& key = p.key(slot, static_cast<int>(uniform(0, p.h - 1)));
  const T kept_key = key;
  narrow(bad, &key);
  p.attend(partial.get(), out.get());
  key = kept_key;
  for (int i = 0; i < p.m; ++i) {
    const bool spoilt = p.position[i] >= slot;
    check(spoilt ? std::isnan(partial[i].total) : partial[i].total == clean[i].total,
          p.name() + " bad key, row " + std::to_string(i));
  }
}

template <typename T>
void check_all(int m, int h, int64_t first, int64_t last) {
  Problem<T> p(m, h, first, last);
  Buffer<Partial> partial(m, odd());
  Buffer<float> out(m * h, odd());
  p.attend(partial.get(), out.get());
  for (int i = 0; i < m; ++i) {
    check_row(p, i, partial[i], out.get() + i * h);
    check_alone(p, i, partial[i], out.get() + i * h);
  }
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(),
                          std::numeric_limits<float>::infinity(),
                          -std::numeric_limits<float>::infinity()})
    check_poison(p, partial, bad);
}

void check_kernel(int every) {
  int shape = 0;
  for (int m = 1; m <= kAttentionRows; ++m)
    for (const int h : {16, 48, 80, 128, kMaxHeadDim})
      for (const int64_t first : {0, kSplitSlots}) {
        if (shape++ % every != 0) continue;
        // 1, around a key block and a step, and somewhere in a split.
        std::vector<int64_t> counts = {1, 15, 16, 17, 63, 64, 65, uniform(66, 300)};
        if (m == kAttentionRows && h == 80) counts.push_back(kSplitSlots);
        if (first > 0 || h > 80) counts = {1, 64, uniform(65, 130)};
        for (const int64_t count : counts) {
          check_all<float>(m, h, first, first + count);
          check_all<uint16_t>(m, h, first, first + count);
        }
      }
}

}  // namespace
}  // namespace bitjax

int main(int argc, char** argv) {
  const int every = argc > 1 ? std::max(1, std::atoi(argv[1])) : 1;
  for (const std::string& name : bitjax::available_kernels()) {
    bitjax::force_kernel(name);
    const int before = bitjax::passed;
    for (const bool guarded : {false, true}) {
      bitjax::guard_pages = guarded;
      bitjax::check_kernel(every);
    }
    std::printf("%-12s %d checks passed\n", name.c_str(), bitjax::passed - before);
  }
  std::printf("%d passed, %d failed\n", bitjax::passed, bitjax::failed);
  return bitjax::failed == 0 ? 0 : 1;
}
