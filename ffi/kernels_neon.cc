// NEON with the dot-product extension (Armv8.2 dotprod): a quarter of a block in a register.
//
// SDOT multiplies signed bytes by signed bytes; codes below 128 are both. Those of int8 are not, and
// give up their offset first: code - 128 is the weight, and 128 times the activations' sum is added
// back. Differs from the scalar kernel only in the order of exact integer sums.

#include <arm_neon.h>

#include "products.h"

namespace bitjax {
namespace {

constexpr int kLanes = 4;

struct Neon {
  using Bytes = uint8x16_t;
  using Sums = int32x4_t;
  static constexpr int kLanes = 4;
  // 6 rows x 4 vectors: 24 accumulators, 4 vectors of codes and a broadcast, of 32 registers.
  static constexpr int kPanelBlocks = 1;
  static constexpr int kTileVectors = 4;
  static constexpr int kTileRows = 6;
  static constexpr int kFewRows = 4;
  static constexpr int64_t kStreamedRows = 4;
  static constexpr int stream_blocks(int) { return 1; }
  static constexpr bool multiply_first(int) { return false; }
  static constexpr int stream_vectors(int) { return 4; }
  static constexpr bool mask_in_place(int) { return false; }

  static Bytes load(const uint8_t* p) { return vld1q_u8(p); }
  static void store(uint8_t* p, Bytes b) { vst1q_u8(p, b); }
  static Bytes splat(uint8_t b) { return vdupq_n_u8(b); }
  static Bytes land(Bytes a, Bytes b) { return vandq_u8(a, b); }
  static Bytes sub(Bytes a, Bytes b) { return vsubq_u8(a, b); }
  static Bytes add_bytes(Bytes a, Bytes b) { return vaddq_u8(a, b); }
  static Bytes umin(Bytes a, Bytes b) { return vminq_u8(a, b); }
  template <int n>
  static Bytes shr(Bytes a) {
    return vshrq_n_u8(a, n);
  }
  static Bytes mul_bytes(Bytes a, Bytes b) { return vmulq_u8(a, b); }
  static Bytes repeat_lane_bytes(const uint8_t* p) {
    const uint32x4_t lanes = vreinterpretq_u32_s32(load_lane_bytes(p));
    return vreinterpretq_u8_u32(vmulq_n_u32(lanes, 0x01010101U));
  }

  static Sums splat32(int32_t x) { return vdupq_n_s32(x); }
  static Sums add(Sums a, Sums b) { return vaddq_s32(a, b); }
  static Sums mul32(Sums a, Sums b) { return vmulq_s32(a, b); }
  template <int n>
  static Sums sar(Sums a) {
    return vshrq_n_s32(a, n);
  }
  static Sums load_sums(const int32_t* p) { return vld1q_s32(p); }
  static void store_sums(int32_t* p, Sums a) { vst1q_s32(p, a); }
  static Sums load_lane_bytes(const uint8_t* p) {
    uint32_t four;
    __builtin_memcpy(&four, p, sizeof four);
    const uint16x8_t wide = vmovl_u8(vcreate_u8(four));
    return vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(wide)));
  }

  static constexpr bool kHasTritTable = false;
  static Bytes trit_of_multiple(Bytes b) {
    return vqtbl1q_u8(vld1q_u8(kNibbleTrits), vandq_u8(b, vdupq_n_u8(15)));
  }

  template <int max_code>
  struct Dot {
    using Narrow = Sums;
    static constexpr int64_t kSpan = int64_t{1} << 40;
    static Narrow none() { return vdupq_n_s32(0); }
    static Narrow dot(Narrow acc, Bytes codes, int32_t group) {
      const int8x16_t q = vreinterpretq_s8_s32(vdupq_n_s32(group));
      if constexpr (max_code < 128) {
        return vdotq_s32(acc, vreinterpretq_s8_u8(codes), q);
      } else {
        const int8x16_t w = vreinterpretq_s8_u8(veorq_u8(codes, vdupq_n_u8(128)));
        const int8x16_t half = vdupq_n_s8(64);
        acc = vdotq_s32(acc, w, q);
        return vdotq_s32(vdotq_s32(acc, half, q), half, q);
      }
    }
    static Sums widen(Sums acc, Narrow narrow) { return vaddq_s32(acc, narrow); }
  };
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
