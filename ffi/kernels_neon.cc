// NEON as every 64-bit Arm CPU has it: products in int16, sums in int32.
//
// Differs from the scalar kernel only in the order of exact integer sums: SMLAL adds one product of
// code and activation, of magnitude max_code * 128, to an int16 lane, which takes a span of them
// before pairs of lanes are widened. int8 codes fill an int16 at once and are widened one by one.

#include "neon.h"

namespace bitjax {
namespace {

constexpr int kLanes = 4;

struct Neon : NeonVectors {
  // Sums take two registers each. 3 rows x 4 vectors: 24 registers, 4 of codes and a broadcast, of
  // 32; a stream's planes take more.
  static constexpr int kTileRows = 3;
  static constexpr int stream_vectors(int m) { return m == 1 ? 4 : m == 2 ? 2 : 1; }

  template <int max_code>
  struct Dot {
    using Narrow = int16x8x2_t;  // four lanes a row, one for each of its four products
    static constexpr int64_t kSpan = 32767 / (max_code * 128);
    static Narrow none() { return {{vdupq_n_s16(0), vdupq_n_s16(0)}}; }
    static Narrow dot(Narrow acc, Bytes codes, int32_t group) {
      const int8x16_t q = vreinterpretq_s8_s32(vdupq_n_s32(group));
      const int8x16_t w = vreinterpretq_s8_u8(codes);
      return {{vmlal_s8(acc.val[0], vget_low_s8(w), vget_low_s8(q)),
               vmlal_high_s8(acc.val[1], w, q)}};
    }
    static Sums widen(Sums acc, Narrow narrow) {
      return vaddq_s32(acc, vpaddq_s32(vpaddlq_s16(narrow.val[0]), vpaddlq_s16(narrow.val[1])));
    }
    // A quarter of what is taken off goes to each of a row's four lanes. They are sums of 8 products of
    // a code and an activation, less twice the sum of 32 activations: 13 * 128 * 8 + 2 * 128 * 24 at most.
    static Narrow group_start(int32_t offset, int32_t sum) {
      const int16x8_t quarter = vdupq_n_s16(static_cast<int16_t>(-offset / 4 * sum));
      return {{quarter, quarter}};
    }
    template <int M>
    static void add_multiplied(Sums (&acc)[M], const Narrow (&group)[M],
                               const uint8_t* multipliers) {
      const Sums m = load_lane_bytes(multipliers);
      for (int i = 0; i < M; ++i)
        acc[i] = vmlaq_s32(acc[i], widen(vdupq_n_s32(0), group[i]), m);
    }
  };
};

// SMLAL takes signed bytes: code * q = (code - 128) * q + 128 * q, at most 255 * 128 < 2^15.
template <>
struct Neon::Dot<255> {
  using Narrow = int32x4x2_t;  // each of a row's two lanes sums two of its four products
  static constexpr int64_t kSpan = int64_t{1} << 40;
  static Narrow none() { return {{vdupq_n_s32(0), vdupq_n_s32(0)}}; }
  static Narrow dot(Narrow acc, Bytes codes, int32_t group) {
    const int8x16_t q = vreinterpretq_s8_s32(vdupq_n_s32(group));
    const int8x16_t w = vreinterpretq_s8_u8(veorq_u8(codes, vdupq_n_u8(128)));
    const int16x8_t offset = vshll_n_s8(vget_low_s8(q), 7);  // the same four, twice
    return {{vpadalq_s16(acc.val[0], vmlal_s8(offset, vget_low_s8(w), vget_low_s8(q))),
             vpadalq_s16(acc.val[1], vmlal_high_s8(offset, w, q))}};
  }
  static Sums widen(Sums acc, Narrow narrow) {
    return vaddq_s32(acc, vpaddq_s32(narrow.val[0], narrow.val[1]));
  }
};

float32x4_t load(const float* x) { return vld1q_f32(x); }

float32x4_t load(const uint16_t* bf16) {
  return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(bf16), 16));
}

// The first n values, then zeros; reads no further than x[n - 1].
template <typename T>
float32x4_t load_first(const T* x, int64_t n) {
  if (n >= kLanes) return load(x);
  T padded[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) padded[i] = x[i];
  return load(padded);
}

template <typename T>
void quantize_row(const T* x, int64_t k, int64_t k_padded, int8_t* q, float* x_scale) {
  // The bits of non-negative floats are ordered like the floats, with infinity and NaN on top.
  const uint32x4_t magnitude_bits = vdupq_n_u32(0x7FFFFFFF);
  uint32x4_t max_bits = vdupq_n_u32(0);
  for (int64_t i = 0; i < k; i += kLanes) {
    const uint32x4_t bits = vreinterpretq_u32_f32(load_first(x + i, k - i));
    max_bits = vmaxq_u32(max_bits, vandq_u32(bits, magnitude_bits));
  }
  const uint32_t amax_bits = vmaxvq_u32(max_bits);
  const bool finite = amax_bits < 0x7F800000;
  float amax;
  __builtin_memcpy(&amax, &amax_bits, sizeof amax);
  if (!(amax > kMinAmax)) amax = kMinAmax;

  // k_padded is a multiple of 8, so pairs of groups cover the row and its padding.
  const float32x4_t inv = vdupq_n_f32(kQuantMax / amax);
  const int64_t used = finite ? k : 0;
  for (int64_t i = 0; i < k_padded; i += 2 * kLanes) {
    int32x4_t low = vdupq_n_s32(0);
    int32x4_t high = low;
    if (i < used) low = vcvtnq_s32_f32(vmulq_f32(load_first(x + i, used - i), inv));
    if (i + kLanes < used)
      high = vcvtnq_s32_f32(vmulq_f32(load_first(x + i + kLanes, used - i - kLanes), inv));
    vst1_s8(q + i, vqmovn_s16(vcombine_s16(vqmovn_s32(low), vqmovn_s32(high))));
  }
  *x_scale = finite ? amax * kInverseQuantMax : __builtin_nanf("");
}

}  // namespace

Kernel neon_kernel() {
  return make_kernel<Neon>("neon", quantize_row<float>, quantize_row<uint16_t>);
}

}  // namespace bitjax
