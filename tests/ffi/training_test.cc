// The kernels of a training step against plain loops, on buffers of exactly the size that the contract
// in training.h gives, with and without guard pages.

#include "training.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "buffer.h"
#include "dispatch.h"

namespace bitjax {
namespace {

int passed = 0, failed = 0;

void check(bool right, const char* what, int64_t a, int64_t b, int64_t c) {
  if (right) {
    ++passed;
    return;
  }
  ++failed;
  std::printf("FAILED: %s (%lld, %lld, %lld)\n", what, static_cast<long long>(a),
              static_cast<long long>(b), static_cast<long long>(c));
}

std::mt19937& generator() {
  static std::mt19937 g(1);
  return g;
}

int uniform(int low, int high) { return std::uniform_int_distribution<int>(low, high)(generator()); }

std::vector<float> normals(int64_t count) {
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<size_t>(count));
  for (float& v : values) v = normal(generator());
  return values;
}

template <typename T>
std::vector<T> integers(int64_t count, int low, int high) {
  std::vector<T> values(static_cast<size_t>(count));
  for (T& v : values) v = static_cast<T>(uniform(low, high));
  return values;
}

// To nearest even, by the bits.
uint16_t bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

float as_float(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

void check_pack_codes(const TrainingKernel& kernel, int64_t n, int64_t k) {
  const Buffer<float> w(integers<float>(n * k, -1, 1), 0);
  const int64_t groups = whole(k, 4);
  const Buffer<uint8_t> panel(groups * kPanelColumns * kGroupBytes, 0xEE, 0);
  kernel.pack_codes(w.get(), n, k, panel.get());
  bool right = true;
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t c = 0; c < kPanelColumns; ++c)
      for (int64_t j = 0; j < 4; ++j) {
        const int64_t i = 4 * g + j;
        const int wanted = c < n && i < k ? static_cast<int>(w[c * k + i]) + 1 : 0;
        right = right && panel[(g * kPanelColumns + c) * 4 + j] == wanted;
      }
  check(right, "pack_codes", n, k, 0);
}

// Columns of floats or bytes, as pairs of bfloat16.
template <typename T, typename Pack>
void check_pack(const char* what, const Pack& pack, const std::vector<T>& values, const float* scale,
                int64_t depth, int64_t columns, int64_t width) {
  const int64_t stride = columns + 3;
  // The last row ends with its last column.
  const Buffer<T> x(std::vector<T>(values.begin(), values.end() - 3), 0);
  const Buffer<uint16_t> packed(whole(depth, 2) * width * 2, 0xEEEE, 0);
  pack(x.get(), stride, packed.get());
  bool right = true;
  for (int64_t d = 0; d < whole(depth, 2) * 2; ++d)
    for (int64_t c = 0; c < width; ++c) {
      float value = 0;
      if (d < depth && c < columns)
        value = static_cast<float>(x[d * stride + c]) * (scale == nullptr ? 1 : scale[d]);
      const uint16_t found = packed[(d / 2 * width + c) * 2 + d % 2];
      right = right && (found == bf16(value) || (value == 0 && as_float(found) == 0));  // or -0
    }
  check(right, what, depth, columns, width);
}

void check_packs(const TrainingKernel& kernel, int64_t depth, int64_t columns, int64_t width) {
  const int64_t count = depth * (columns + 3);
  const Buffer<float> scale(normals(depth), 0);
  for (const float* s : {static_cast<const float*>(nullptr), static_cast<const float*>(scale.get())})
    check_pack("pack_floats",
               [&](const float* x, int64_t stride, uint16_t* packed) {
                 kernel.pack_floats(x, s, depth, stride, columns, width, packed);
               },
               normals(count), s, depth, columns, width);
  check_pack("pack_bytes",
             [&](const int8_t* x, int64_t stride, uint16_t* packed) {
               kernel.pack_bytes(x, depth, stride, columns, width, packed);
             },
             integers<int8_t>(count, -127, 127), nullptr, depth, columns, width);
}

void check_rows(const TrainingKernel& kernel, int64_t n) {
  const Buffer<float> x(normals(n), 0), scale(normals(n), 0);
  const Buffer<uint16_t> y(whole(n, 2) * 2, 0xEEEE, 0);
  kernel.round_row(x.get(), scale.get(), n, y.get());
  bool right = true;
  for (int64_t i = 0; i < whole(n, 2) * 2; ++i)
    right = right && y[i] == (i < n ? bf16(x[i] * scale[i]) : 0);
  check(right, "round_row", n, 0, 0);

  for (const int value : {-128, 127, 0}) {
    std::vector<int8_t> q = integers<int8_t>(n, -128, 127);
    if (value != 0) std::fill(q.begin(), q.end(), static_cast<int8_t>(value));
    const Buffer<int8_t> exact(q, 0);
    int32_t wanted = 0;
    for (const int8_t v : q) wanted += v;
    check(kernel.sum(exact.get(), n) == wanted, "sum", n, value, 0);
  }
}

void check_integer_tile(const TrainingKernel& kernel, int64_t rows, int64_t columns, int64_t k) {
  const int64_t groups = whole(k, 4), stride = columns + 1;
  const bool extreme = uniform(0, 3) == 0;
  std::vector<int8_t> q(static_cast<size_t>(rows * groups * 4), 0);
  std::vector<int32_t> sums(static_cast<size_t>(rows), 0);
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t i = 0; i < k; ++i) {
      const int value = extreme ? -128 : uniform(-128, 127);
      q[static_cast<size_t>(m * groups * 4 + i)] = static_cast<int8_t>(value);
      sums[static_cast<size_t>(m)] += value;
    }
  const std::vector<float> w = integers<float>(columns * k, -1, 1);
  const Buffer<uint8_t> panel(groups * kPanelColumns * kGroupBytes, 0);
  kernel.pack_codes(w.data(), columns, k, panel.get());
  const Buffer<int8_t> exact(q, 0);
  const Buffer<int32_t> exact_sums(sums, 0);
  const Buffer<float> x_scale(normals(rows), 0), w_scale(normals(columns), 0);
  const Buffer<float> out((rows - 1) * stride + columns, -7.0F, 0);
  kernel.integer_tile({reinterpret_cast<const uint8_t*>(exact.get()), groups * 4, kGroupBytes},
                      panel.get(), groups, exact_sums.get(), x_scale.get(), w_scale.get(),
                      {out.get(), stride, rows, columns});
  bool right = true;
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t n = 0; n < columns; ++n) {
      int32_t sum = 0;
      for (int64_t i = 0; i < k; ++i)
        sum += exact[m * groups * 4 + i] * static_cast<int>(w[static_cast<size_t>(n * k + i)]);
      right = right && out[m * stride + n] == static_cast<float>(sum) * (x_scale[m] * w_scale[n]);
    }
    if (m + 1 < rows) right = right && out[m * stride + columns] == -7.0F;
  }
  check(right, "integer_tile", rows, columns, k);
}

// strips: the first factor lies as [group][row], as the strips of the weights' gradient do.
void check_float_tile(const TrainingKernel& kernel, int64_t rows, int64_t columns, int64_t groups,
                      bool strips, bool add) {
  const int64_t stride = columns + 1;
  std::vector<uint16_t> x, panel(static_cast<size_t>(groups * kPanelColumns * 2), 0);
  for (const float v : normals(rows * groups * 2)) x.push_back(bf16(v));
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t c = 0; c < columns * 2; ++c)
      panel[static_cast<size_t>(g * kPanelColumns * 2 + c)] = bf16(static_cast<float>(uniform(-1, 1)));
  const Buffer<uint16_t> first(x, 0), second(panel, 0);
  const Buffer<float> out((rows - 1) * stride + columns, 0.5F, 0);
  const auto place = [&](int64_t m, int64_t g) {
    return strips ? (g * rows + m) * 2 : (m * groups + g) * 2;
  };
  const Groups where{reinterpret_cast<const uint8_t*>(first.get()),
                     strips ? kGroupBytes : groups * kGroupBytes,
                     strips ? rows * kGroupBytes : kGroupBytes};
  kernel.float_tile(where, reinterpret_cast<const uint8_t*>(second.get()), groups, add,
                    {out.get(), stride, rows, columns});
  bool right = true;
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t n = 0; n < columns; ++n) {
      double sum = add ? 0.5 : 0, size = sum;
      for (int64_t g = 0; g < groups; ++g)
        for (int j = 0; j < 2; ++j) {
          const double product = static_cast<double>(as_float(first[place(m, g) + j])) *
                                 as_float(second[(g * kPanelColumns + n) * 2 + j]);
          sum += product;
          size += std::abs(product);
        }
      // A float32 sum of so many, in any order.
      const double bound = static_cast<double>(2 * groups + 2) * std::ldexp(size, -23);
      right = right && std::abs(static_cast<double>(out[m * stride + n]) - sum) <= bound;
    }
    if (m + 1 < rows) right = right && out[m * stride + columns] == 0.5F;
  }
  check(right, "float_tile", rows, columns, groups);
}

void check_kernel(const TrainingKernel& kernel) {
  for (const int64_t n : {1, 15, 16, 17, 63, 64})
    for (const int64_t k : {1, 3, 4, 16, 17, 70}) check_pack_codes(kernel, n, k);
  for (const int64_t depth : {1, 2, 7, 32})
    for (const int64_t width : {int64_t{16}, kStripRows, kPanelColumns})
      for (const int64_t columns : {int64_t{1}, int64_t{15}, int64_t{16}, width - 1, width})
        if (columns <= width) check_packs(kernel, depth, columns, width);
  for (const int64_t n : {1, 2, 15, 16, 17, 63, 64, 65, 129, 1000}) check_rows(kernel, n);
  for (const int64_t rows : {1, 5, 6, 7, 13})
    for (const int64_t columns : {1, 16, 17, 63, 64})
      for (const int64_t k : {1, 4, 31, 300}) {
        check_integer_tile(kernel, rows, columns, k);
        check_float_tile(kernel, rows, columns, k, k % 2 == 0, rows % 2 == 0);
      }
  check_integer_tile(kernel, 2, 3, 65536);
}

}  // namespace
}  // namespace bitjax

int main() {
  const bitjax::TrainingKernel* kernel = bitjax::training_kernel();
  if (kernel == nullptr) {
    std::printf("skipped: no AVX-512 BF16 and VNNI here\n");
    return 0;
  }
  for (const bool guarded : {false, true}) {
    bitjax::guard_pages = guarded;
    bitjax::check_kernel(*kernel);
  }
  std::printf("training: %d passed, %d failed\n", bitjax::passed, bitjax::failed);
  return bitjax::failed == 0 ? 0 : 1;
}
