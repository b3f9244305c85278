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
uint16_t bf16_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return static_cast<uint16_t>(bits >> 16);
}

double value_of(uint16_t bf16) {
  const uint32_t bits = static_cast<uint32_t>(bf16) << 16;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// Keys and values of one head, element by element. set() of a NaN makes the slot NaN.
template <typename T>
struct Cache {
  int h;
  Buffer<T> keys, values;

  Cache(int h, int64_t slots) : h(h), keys(slots * h, odd()), values(slots * h, odd()) {}
  static void narrow(float x, float* y) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    bits &= 0xFFFF0000U;
    std::memcpy(y, &bits, sizeof bits);
  }
  static void narrow(float x, uint16_t* y) { *y = bf16_of(x); }
  static double wide(float x) { return x; }
  static double wide(uint16_t x) { return value_of(x); }

  T& key_at(int64_t s, int d) const { return keys[(s / 64 * h + d) * 64 + s % 64]; }
  void set_key(int64_t s, int d, float x) const { narrow(x, &key_at(s, d)); }
  void set_value(int64_t s, int d, float x) const { narrow(x, &values[s * h + d]); }
  double key(int64_t s, int d) const { return wide(key_at(s, d)); }
  double value(int64_t s, int d) const { return wide(values[s * h + d]); }
  double value_scale(int64_t) const { return 0; }  // values are not rounded
  HeadCache<T> head() const { return {keys.get(), values.get()}; }
  Attend<T> attend() const;
};

template <>
Attend<float> Cache<float>::attend() const { return active_attention().attend_f32; }
template <>
Attend<uint16_t> Cache<uint16_t>::attend() const { return active_attention().attend_bf16; }

// Codes are 40 times what is set; scales vary from slot to slot.
template <>
struct Cache<int8_t> {
  int h;
  Buffer<int8_t> keys, values;
  Buffer<uint16_t> key_scale, value_scales;

  Cache(int h, int64_t slots)
      : h(h), keys(slots * h, odd()), values(slots * h, odd()), key_scale(slots, odd()),
        value_scales(slots, odd()) {
    for (int64_t s = 0; s < slots; ++s) {
      key_scale[s] = bf16_of(static_cast<float>(uniform(1, 8)) / 256);
      value_scales[s] = bf16_of(static_cast<float>(uniform(1, 64)) / 256);
    }
  }
  static int8_t code(float x) {
    return std::isfinite(x) ? static_cast<int8_t>(std::max(-127.0F, std::min(127.0F, 40 * x))) : int8_t{0};
  }
  int64_t key_index(int64_t s, int d) const { return ((s / 64 * h / 2 + d / 2) * 64 + s % 64) * 2 + d % 2; }
  int64_t value_index(int64_t s, int d) const { return (s / 2 * h + d) * 2 + s % 2; }
  void set_key(int64_t s, int d, float x) const {
    keys[key_index(s, d)] = code(x);
    if (!std::isfinite(x)) key_scale[s] = bf16_of(x);
  }
  void set_value(int64_t s, int d, float x) const {
    values[value_index(s, d)] = code(x);
    if (!std::isfinite(x)) value_scales[s] = bf16_of(x);
  }
  double key(int64_t s, int d) const { return keys[key_index(s, d)] * value_of(key_scale[s]); }
  double value(int64_t s, int d) const { return values[value_index(s, d)] * value_scale(s); }
  double value_scale(int64_t s) const { return value_of(value_scales[s]); }
  HeadCache<int8_t> head() const {
    return {keys.get(), values.get(), key_scale.get(), value_scales.get()};
  }
  Attend<int8_t> attend() const { return active_attention().attend_int8; }
};

template <typename T>
struct Problem {
  int m, h;
  int64_t first, last;
  Buffer<float> q;
  Buffer<int64_t> position;
  Cache<T> cache;

  // The last row sees slot last - 1, every other one some earlier slot, of an earlier split perhaps.
  Problem(int m, int h, int64_t first, int64_t last)
      : m(m), h(h), first(first), last(last), q(m * h, odd()), position(m, odd()),
        cache(h, (last + kStepSlots - 1) / kStepSlots * kStepSlots) {
    for (int64_t i = 0; i < m * h; ++i) q[i] = 1.5F * normal() / std::sqrt(static_cast<float>(h));
    for (int i = 0; i < m; ++i) position[i] = i + 1 == m ? last - 1 : uniform(first / 2, last - 1);
    for (int64_t s = 0; s < static_cast<int64_t>(cache.keys.size()) / h; ++s)
      for (int d = 0; d < h; ++d) {
        const float nan = std::numeric_limits<float>::quiet_NaN();
        cache.set_key(s, d, s < last ? normal() : nan);
        cache.set_value(s, d, s < last ? normal() : nan);
      }
  }

  void attend(Partial* partial, float* out) const {
    cache.attend()(q.get(), position.get(), m, h, cache.head(), first, last, partial, out);
  }

  std::string name() const {
    return "m=" + std::to_string(m) + " h=" + std::to_string(h) + " slots " + std::to_string(first) +
           ".." + std::to_string(last) + " of " + std::to_string(sizeof(T)) + " bytes";
  }
};

// Row i against the equation. A score's error, in float32 roundings of sum |q k|, is at most h (its
// products and their sum); a weight's besides 1 of the difference from the maximum, 4 of e^x, and at
// most 6 for each step of 64 slots that rescales it; sums of n terms round n times more, twice. Over
// an int8 cache, half of the steps that attention.h states come in addition.
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
  constexpr bool kInt8 = sizeof(T) == 1;
  double largest_q = 0;
  for (int d = 0; d < p.h; ++d)
    largest_q = std::max(largest_q, static_cast<double>(std::fabs(p.q[i * p.h + d])));
  std::vector<double> score, size, rounded;
  for (int64_t s = p.first; s < end; ++s) {
    double sum = 0, magnitude = 0, keys = 0;
    for (int d = 0; d < p.h; ++d) {
      const double product = static_cast<double>(p.q[i * p.h + d]) * p.cache.key(s, d);
      keys += std::fabs(p.cache.key(s, d));
      sum += product;
      magnitude += std::fabs(product);
    }
    score.push_back(sum);
    size.push_back(magnitude);
    rounded.push_back(kInt8 ? largest_q / 65534 * keys : 0);
  }
  const auto top = static_cast<size_t>(std::max_element(score.begin(), score.end()) - score.begin());
  const double most = *std::max_element(size.begin(), size.end()) * p.h * kUnit +
                      *std::max_element(rounded.begin(), rounded.end());
  check(std::fabs(partial.maximum - score[top]) <= most, what + "maximum");

  const double n = static_cast<double>(score.size());
  double total = 0, total_error = 0;
  std::vector<double> mixed(static_cast<size_t>(p.h)), error(static_cast<size_t>(p.h));
  for (size_t s = 0; s < score.size(); ++s) {
    const double below = partial.maximum - score[s];
    const double weight = std::exp(-below);
    const double off = 1.01 * weight * (rounded[s] + kUnit * (p.h * size[s] + std::fabs(below) + 5 +
                                                              6 * (n / 64 + 1) + 2 * n));
    total += weight;
    total_error += off;
    for (int d = 0; d < p.h; ++d) {
      const double value = p.cache.value(p.first + static_cast<int64_t>(s), d);
      mixed[static_cast<size_t>(d)] += weight * value;
      error[static_cast<size_t>(d)] += off * std::fabs(value);
    }
  }
  // Weights times value scales are rounded to 1/32767 of the largest of each step of 64 slots.
  for (int64_t step = p.first; kInt8 && step < end; step += kStepSlots) {
    double largest = 0;
    std::vector<double> codes(static_cast<size_t>(p.h));
    for (int64_t slot = step; slot < std::min(end, step + kStepSlots); ++slot) {
      const double scale = p.cache.value_scale(slot);
      const double weight = std::exp(score[static_cast<size_t>(slot - p.first)] - partial.maximum);
      largest = std::max(largest, weight * scale);
      for (int d = 0; d < p.h; ++d)
        codes[static_cast<size_t>(d)] += std::fabs(p.cache.value(slot, d) / scale);
    }
    for (size_t d = 0; d < codes.size(); ++d) error[d] += 1.01 * largest / 65534 * codes[d];
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
  p.cache.attend()(q.get(), p.position.get() + i, 1, p.h, p.cache.head(), p.first, end, &got,
                   alone.get());
  const bool same = got.maximum == partial.maximum && got.total == partial.total &&
                    std::memcmp(alone.get(), out, static_cast<size_t>(p.h) * sizeof(float)) == 0;
  check(same, p.name() + " row " + std::to_string(i) + " alone");
}

// A key's element and, in an int8 cache, its scale, to put back.
template <typename T>
struct Keep {
  T& at;
  const T element;
  Keep(const Cache<T>& cache, int64_t s, int d) : at(cache.key_at(s, d)), element(at) {}
  void restore() const { at = element; }
};

template <>
struct Keep<int8_t> {
  int8_t& at;
  const int8_t element;
  uint16_t& scale_at;
  const uint16_t scale;
  Keep(const Cache<int8_t>& cache, int64_t s, int d)
      : at(cache.keys[cache.key_index(s, d)]), element(at), scale_at(cache.key_scale[s]), scale(scale_at) {}
  void restore() const {
    at = element;
    scale_at = scale;
  }
};

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
  const int d = static_cast<int>(uniform(0, p.h - 1));
  const Keep<T> kept_key(p.cache, slot, d);
  p.cache.set_key(slot, d, bad);
  p.attend(partial.get(), out.get());
  kept_key.restore();
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
        // 1, around a vector and a step, and somewhere in a split.
        std::vector<int64_t> counts = {1, 15, 16, 17, 63, 64, 65, uniform(66, 300)};
        if (m == kAttentionRows && h == 80) counts.push_back(kSplitSlots);
        if (first > 0 || h > 80) counts = {1, 64, uniform(65, 130)};
        for (const int64_t count : counts) {
          check_all<float>(m, h, first, first + count);
          check_all<uint16_t>(m, h, first, first + count);
          check_all<int8_t>(m, h, first, first + count);
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
