// What happens to a row of activations before it is quantised: gates and norms, in float32.
//
// Plain C++ on vectors of 16 floats (a GCC and Clang extension), which each kernel file compiles for
// its own instruction set, in its anonymous namespace. Every operation is one IEEE rounding in a
// fixed order, so that all kernels give the same bits: sums run in 16 lanes, folded in halves.
#ifndef BITJAX_FFI_ROWS_H_
#define BITJAX_FFI_ROWS_H_

#include <cstdint>

#include "epilogue.h"
#include "kernel.h"

namespace bitjax {
namespace {

typedef float Float16 __attribute__((vector_size(64)));
typedef int32_t Int16x32 __attribute__((vector_size(64)));
constexpr int kFloats = 16;

inline void load_floats(const float* p, Float16* v) { __builtin_memcpy(v, p, sizeof *v); }
inline void store_floats(float* p, const Float16& v) { __builtin_memcpy(p, &v, sizeof v); }

// The first n < 16 floats, then zeros.
inline void load_first(const float* p, int64_t n, Float16* v) {
  float padded[kFloats] = {};
  for (int64_t i = 0; i < n; ++i) padded[i] = p[i];
  load_floats(padded, v);
}

inline void store_first(float* p, int64_t n, const Float16& v) {
  float padded[kFloats];
  store_floats(padded, v);
  for (int64_t i = 0; i < n; ++i) p[i] = padded[i];
}

typedef float Float8 __attribute__((vector_size(32)));
typedef float Float4 __attribute__((vector_size(16)));

// Lanes joined in halves, down to one.
template <typename Join>
inline float fold(const Float16& v, const Join& join) {
  Float8 eight[2];
  __builtin_memcpy(eight, &v, sizeof v);
  eight[0] = join(eight[0], eight[1]);
  Float4 four[2];
  __builtin_memcpy(four, eight, sizeof four);
  four[0] = join(four[0], four[1]);
  return join(join(four[0][0], four[0][2]), join(four[0][1], four[0][3]));
}

inline float fold(const Float16& v) {
  return fold(v, [](const auto& a, const auto& b) { return a + b; });
}

// e^x to 2 units in the last place for x in [-87, 88]; below, the result stays at e^-87, above at
// e^88. A NaN gives a number: callers that must propagate one do so themselves. x = n ln 2 + r with
// |r| <= ln(2)/2, e^r by its Taylor polynomial of degree 7 (remainder below 2^-27).
inline void exponential(Float16* x) {
  constexpr float kLow = -87.0F;
  constexpr float kHigh = 88.0F;
  constexpr float kLog2E = 1.44269504F;
  constexpr float kLn2High = 0.693359375F;      // 9 bits, so that n * kLn2High is exact
  constexpr float kLn2Low = -2.12194440e-4F;    // ln 2 - kLn2High
  constexpr float kShift = 12582912.0F;         // 1.5 * 2^23: adding it rounds to an integer
  Float16 v = *x;
  v = v > kLow ? v : kLow - Float16{};
  v = v < kHigh ? v : kHigh - Float16{};
  const Float16 shifted = v * kLog2E + kShift;
  const Float16 n = shifted - kShift;
  const Float16 r = (v - n * kLn2High) - n * kLn2Low;
  Float16 p = r * (1.0F / 5040.0F) + 1.0F / 720.0F;
  p = p * r + 1.0F / 120.0F;
  p = p * r + 1.0F / 24.0F;
  p = p * r + 1.0F / 6.0F;
  p = p * r + 0.5F;
  p = p * r + 1.0F;
  p = p * r + 1.0F;
  Int16x32 bits;
  __builtin_memcpy(&bits, &shifted, sizeof bits);
  Int16x32 power = (bits + 127) << 23;  // the low bits of `shifted` are n
  Float16 scale;
  __builtin_memcpy(&scale, &power, sizeof scale);
  *x = p * scale;
}

// y_k = relu(gate_k)^2 * up_k, gate = x[0..k), up = x[k..2k).
inline void relu2_gate(const float* x, int64_t k, float* y) {
  for (int64_t i = 0; i < k; ++i) {
    const float gate = x[i] < 0 ? 0 : x[i];  // keeps a NaN
    y[i] = gate * gate * x[k + i];
  }
}

// y_k = gate_k / (1 + e^-gate_k) * up_k
inline void silu_gate(const float* x, int64_t k, float* y) {
  for (int64_t i = 0; i < k; i += kFloats) {
    const int64_t n = k - i;
    Float16 gate;
    Float16 up;
    if (n >= kFloats) {
      load_floats(x + i, &gate);
      load_floats(x + k + i, &up);
    } else {
      load_first(x + i, n, &gate);
      load_first(x + k + i, n, &up);
    }
    Float16 e = -gate;
    exponential(&e);
    const Float16 result = gate / (1.0F + e) * up;  // a NaN gate stays one
    if (n >= kFloats) {
      store_floats(y + i, result);
    } else {
      store_first(y + i, n, result);
    }
  }
}

// y_k = x_k / sqrt(mean(x^2) + eps) * scale_k; y may be x.
inline void rms_norm(const float* x, int64_t k, const float* scale, float eps, float* y) {
  Float16 squares = {};
  int64_t i = 0;
  for (; i + kFloats <= k; i += kFloats) {
    Float16 v;
    load_floats(x + i, &v);
    squares += v * v;
  }
  if (i < k) {
    Float16 v;
    load_first(x + i, k - i, &v);
    squares += v * v;
  }
  const float inverse = 1.0F / __builtin_sqrtf(fold(squares) / static_cast<float>(k) + eps);
  for (i = 0; i < k; ++i) y[i] = x[i] * inverse * scale[i];
}

// sum_i x_i w_i, bfloat16 w as its bits. Every product and sum is rounded, so the result depends on
// the order: four vectors of sums, the last k % 64 values going to the first of them.
inline float dot_bf16(const float* x, const uint16_t* w, int64_t k) {
  constexpr int kSums = 4;  // an addition's latency, in additions of one a cycle
  typedef uint16_t Bits16 __attribute__((vector_size(32)));
  typedef uint32_t Bits32 __attribute__((vector_size(64)));
  const auto add_product = [x, w](int64_t i, Float16* sum) {
    Float16 a;
    Float16 b;
    Bits16 narrow;
    load_floats(x + i, &a);
    __builtin_memcpy(&narrow, w + i, sizeof narrow);
    const Bits32 wide = __builtin_convertvector(narrow, Bits32) << 16;
    __builtin_memcpy(&b, &wide, sizeof b);
    *sum += a * b;
  };
  Float16 sum[kSums] = {};
  int64_t i = 0;
  for (; i + kSums * kFloats <= k; i += kSums * kFloats)
    for (int s = 0; s < kSums; ++s) add_product(i + s * kFloats, &sum[s]);
  for (; i + kFloats <= k; i += kFloats) add_product(i, &sum[0]);
  float result = fold((sum[0] + sum[1]) + (sum[2] + sum[3]));
  for (; i < k; ++i) result += x[i] * widen(w[i]);
  return result;
}

// Folds n bytes with exclusive or, asking for memory two pages ahead like the products.
inline uint64_t read_all(const uint8_t* p, int64_t n) {
  typedef uint64_t Words __attribute__((vector_size(64)));
  Words folded[4] = {};
  int64_t i = 0;
  for (; i + 256 <= n; i += 256)
    for (int v = 0; v < 4; ++v) {
      __builtin_prefetch(p + i + 64 * v + 8192);
      Words words;
      __builtin_memcpy(&words, p + i + 64 * v, sizeof words);
      folded[v] ^= words;
    }
  uint64_t result = 0;
  for (int v = 0; v < 4; ++v)
    for (int w = 0; w < 8; ++w) result ^= folded[v][w];
  for (; i < n; ++i) result ^= p[i];
  return result;
}

}  // namespace
}  // namespace bitjax

#endif  // BITJAX_FFI_ROWS_H_
