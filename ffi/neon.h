// What the Arm kernels share: vectors of a quarter of a block. Included by their kernel files alone.
#ifndef BITJAX_FFI_NEON_H_
#define BITJAX_FFI_NEON_H_

#include <arm_neon.h>

#include "products.h"

namespace bitjax {
namespace {

struct NeonVectors {
  using Bytes = uint8x16_t;
  using Sums = int32x4_t;
  static constexpr int kLanes = 4;
  static constexpr int kPanelBlocks = 1;
  static constexpr int kTileVectors = 4;
  static constexpr int kFewRows = 4;
  static constexpr int64_t kStreamedRows = 4;
  static constexpr int stream_blocks(int) { return 1; }
  static constexpr bool multiply_first(int) { return false; }
  static constexpr bool mask_in_place(int) { return false; }
  static constexpr bool pairs(Layout) { return false; }

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
  static Bytes lookup(const uint8_t (&table)[16], Bytes b) {
    return vqtbl1q_u8(vld1q_u8(table), vandq_u8(b, vdupq_n_u8(15)));
  }
  template <int n>
  static Bytes divided(Bytes b) {
    return vmulq_u8(b, vdupq_n_u8(static_cast<uint8_t>(inverse_of(n))));
  }
};

}  // namespace
}  // namespace bitjax

#endif  // BITJAX_FFI_NEON_H_
