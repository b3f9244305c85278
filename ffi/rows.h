// What happens to a row of activations before it is quantised: gates and norms, in float32.
//
// Plain C++ on 16 floats at a time, which each kernel file compiles for its own instruction set, in its
// anonymous namespace. Every operation is one IEEE rounding in a fixed order, so that all kernels give
// the same bits: sums run in 16 lanes, folded in halves.
#ifndef BITJAX_FFI_ROWS_H_
#define BITJAX_FFI_ROWS_H_

#include <math.h>

#include <cstdint>

#include "epilogue.h"
#include "kernel.h"

namespace bitjax {
namespace {

// Vectors as wide as the registers (a GCC and Clang extension): GCC takes wider ones apart in memory.
#if defined(__AVX512F__)
constexpr int kRegisterBytes = 64;
#elif defined(__AVX__)
constexpr int kRegisterBytes = 32;
#else
constexpr int kRegisterBytes = 16;
#endif
constexpr int kFloats = 16;
constexpr int kRegisters = 64 / kRegisterBytes;
constexpr int kRegisterFloats = kFloats / kRegisters;

// 64 bytes of T in such registers.
template <typename T>
struct Vector {
  typedef T Register __attribute__((vector_size(kRegisterBytes)));
  Register part[kRegisters];

  Vector() = default;
  Vector(T x) {  // NOLINT: a number is one for each lane
    for (Register& p : part) p = x - Register{};
  }

  template <typename Operation>
  static Vector map(const Vector& a, const Vector& b, Operation operation) {
    Vector result;
    for (int i = 0; i < kRegisters; ++i) result.part[i] = operation(a.part[i], b.part[i]);
    return result;
  }
  friend Vector operator+(const Vector& a, const Vector& b) {
    return map(a, b, [](Register x, Register y) { return x + y; });
  }
  friend Vector operator-(const Vector& a, const Vector& b) {
    return map(a, b, [](Register x, Register y) { return x - y; });
  }
  friend Vector operator*(const Vector& a, const Vector& b) {
    return map(a, b, [](Register x, Register y) { return x * y; });
  }
  friend Vector operator/(const Vector& a, const Vector& b) {
    return map(a, b, [](Register x, Register y) { return x / y; });
  }
  friend Vector& operator+=(Vector& a, const Vector& b) { return a = a + b; }
  // all bits of a lane, or none
  friend Vector<int32_t> operator>(const Vector& a, const Vector& b) {
    Vector<int32_t> mask;
    for (int i = 0; i < kRegisters; ++i) mask.part[i] = a.part[i] > b.part[i];
    return mask;
  }
};
using Float16 = Vector<float>;
using Ints16 = Vector<int32_t>;
using Floats = Float16::Register;
using Ints = Ints16::Register;

inline Float16 select(const Ints16& mask, const Float16& a, const Float16& b) {
  Float16 result;
  for (int i = 0; i < kRegisters; ++i)
    result.part[i] = mask.part[i] ? a.part[i] : b.part[i];
  return result;
}

// The larger of each pair; b where one is NaN.
inline Float16 larger(const Float16& a, const Float16& b) { return select(a > b, a, b); }

// Register by register: GCC copies a whole Vector through memory.
inline void load_floats(const float* p, Float16* v) {
  for (int i = 0; i < kRegisters; ++i)
    __builtin_memcpy(&v->part[i], p + i * kRegisterFloats, kRegisterBytes);
}
inline void store_floats(float* p, const Float16& v) {
  for (int i = 0; i < kRegisters; ++i)
    __builtin_memcpy(p + i * kRegisterFloats, &v.part[i], kRegisterBytes);
}

// Asks for a line that is read once: caches further out need not keep it, nor write it back and forth.
inline void prefetch_once(const void* p) { __builtin_prefetch(p, 0, 0); }

// Sixteen bfloat16, as their bits.
inline void load_bf16(const uint16_t* p, Float16* v) {
  typedef uint16_t Bits16 __attribute__((vector_size(kRegisterBytes / 2)));
  typedef uint32_t Bits32 __attribute__((vector_size(kRegisterBytes)));
  for (int i = 0; i < kRegisters; ++i) {
    Bits16 narrow;
    __builtin_memcpy(&narrow, p + i * kRegisterFloats, sizeof narrow);
    v->part[i] = reinterpret_cast<Floats>(__builtin_convertvector(narrow, Bits32) << 16);
  }
}

// The value as rounded by now: what follows is not contracted with what gave it, which compilers
// otherwise decide from place to place.
inline Float16 rounded(Float16 v) {
  for (Floats& part : v.part) {
#if defined(__AVX512F__)
    asm("" : "+v"(part));
#elif defined(__x86_64__)
    asm("" : "+x"(part));
#elif defined(__aarch64__)
    asm("" : "+w"(part));
#endif
  }
  return v;
}

// The first n floats, 16 at most, then zeros.
inline Float16 load_up_to(const float* p, int64_t n) {
  Float16 v;
  if (n >= kFloats) {
    load_floats(p, &v);
  } else {
    float padded[kFloats] = {};
    for (int64_t i = 0; i < n; ++i) padded[i] = p[i];
    load_floats(padded, &v);
  }
  return v;
}

inline void store_up_to(float* p, int64_t n, const Float16& v) {
  if (n >= kFloats) return store_floats(p, v);
  float padded[kFloats];
  store_floats(padded, v);
  for (int64_t i = 0; i < n; ++i) p[i] = padded[i];
}

// body(i, n) for n values from i on of k, 16 while there are as many: a constant, once inlined.
template <typename Body>
inline void each_16(int64_t k, Body body) {
  int64_t i = 0;
  for (; i + kFloats <= k; i += kFloats) body(i, int64_t{kFloats});
  if (i < k) body(i, k - i);
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
inline Float16 exponential(const Float16& x) {
  constexpr float kLow = -87.0F;
  constexpr float kHigh = 88.0F;
  constexpr float kLog2E = 1.44269504F;
  constexpr float kLn2High = 0.693359375F;      // 9 bits, so that n * kLn2High is exact
  constexpr float kLn2Low = -2.12194440e-4F;    // ln 2 - kLn2High
  constexpr float kShift = 12582912.0F;         // 1.5 * 2^23: adding it rounds to an integer
  const Float16 above = larger(x, kLow);
  const Float16 v = select(kHigh > above, above, kHigh);
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
  return Float16::map(p, shifted, [](Floats y, Floats power) {
    const Ints bits = reinterpret_cast<Ints>(power);  // the low ones are n
    return y * reinterpret_cast<Floats>((bits + 127) << 23);
  });
}

// y_k = activation(gate_k) * up_k, gate = x[0..k), up = x[k..2k).
template <typename Activation>
void gate_row(const float* x, int64_t k, float* y, Activation activation) {
  each_16(k, [=](int64_t i, int64_t n) {
    store_up_to(y + i, n, activation(load_up_to(x + i, n)) * load_up_to(x + k + i, n));
  });
}

// relu(gate)^2
inline void relu2_gate(const float* x, int64_t k, float* y) {
  gate_row(x, k, y, [](const Float16& gate) {
    const Float16 relu = larger(0.0F, gate);  // keeps a NaN
    return relu * relu;
  });
}

// gate / (1 + e^-gate)
inline void silu_gate(const float* x, int64_t k, float* y) {
  gate_row(x, k, y, [](const Float16& gate) {
    return gate / (1.0F + exponential(-1.0F * gate));  // a NaN gate stays one
  });
}

// y_k = x_k / sqrt(mean(x^2) + eps) * scale_k; y may be x.
inline void rms_norm(const float* x, int64_t k, const float* scale, float eps, float* y) {
  Float16 squares = 0.0F;
  each_16(k, [&](int64_t i, int64_t n) {
    const Float16 v = load_up_to(x + i, n);
    squares += v * v;
  });
  const float inverse = 1.0F / __builtin_sqrtf(fold(squares) / static_cast<float>(k) + eps);
  each_16(k, [=](int64_t i, int64_t n) {
    store_up_to(y + i, n, load_up_to(x + i, n) * inverse * load_up_to(scale + i, n));
  });
}

inline void load_weights(const float* p, Float16* v) { load_floats(p, v); }
inline void load_weights(const uint16_t* p, Float16* v) { load_bf16(p, v); }

// sum_i x_i w_i, bfloat16 w as its bits. Every product and sum is rounded, so the result depends on
// the order: four vectors of sums, the last k % 64 values going to the first of them.
template <typename W>
float dot(const float* x, const W* w, int64_t k) {
  constexpr int kSums = 4;  // an addition's latency, in additions of one a cycle
  const auto add_product = [x, w](int64_t i, Float16* sum) {
    Float16 a;
    Float16 b;
    load_floats(x + i, &a);
    load_weights(w + i, &b);
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

// The largest of n > 0 values; NaN if one is NaN or an infinity, for comparisons lose NaNs.
inline float largest(const float* x, int64_t n) {
  Float16 top = x[0];
  Float16 poison = {};
  int64_t i = 0;
  for (; i + kFloats <= n; i += kFloats) {
    Float16 v;
    load_floats(x + i, &v);
    top = larger(top, v);
    poison += v * 0.0F;
  }
  float result = fold(top, [](const auto& a, const auto& b) { return a > b ? a : b; });
  float rest = fold(poison);
  for (; i < n; ++i) {
    result = result > x[i] ? result : x[i];
    rest += x[i] * 0.0F;
  }
  return result + rest;
}

// sum_i e^((x_i - most) scale) for x_i <= most, values below e^-87 counting as zero.
inline float sum_exponentials(const float* x, int64_t n, float most, float scale) {
  Float16 sum = {};
  const auto add = [&](const Float16& v) {
    const Float16 power = (v - most) * scale;
    sum += select(power > -87.0F, exponential(power), 0.0F);
  };
  int64_t i = 0;
  for (; i + kFloats <= n; i += kFloats) {
    Float16 v;
    load_floats(x + i, &v);
    add(v);
  }
  if (i < n) {
    float padded[kFloats];
    for (int64_t j = 0; j < kFloats; ++j) padded[j] = i + j < n ? x[i + j] : -INFINITY;
    Float16 v;
    load_floats(padded, &v);
    add(v);
  }
  return fold(sum);
}

// Folds n bytes with exclusive or, asking for memory two pages ahead like the products.
inline uint64_t read_all(const uint8_t* p, int64_t n) {
  typedef uint64_t Words __attribute__((vector_size(64)));
  Words folded[4] = {};
  int64_t i = 0;
  for (; i + 256 <= n; i += 256)
    for (int v = 0; v < 4; ++v) {
      prefetch_once(p + i + 64 * v + 8192);
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
