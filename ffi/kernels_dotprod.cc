// NEON with the dot-product extension (FEAT_DotProd, Armv8.2 and later). Activations are quantised by
// the NEON kernel.
//
// SDOT multiplies signed bytes by signed bytes; codes below 128 are both. Those of int8 are not, and
// give up their offset first: code - 128 is the weight, and 128 times the activations' sum is added
// back. Differs from the scalar kernel only in the order of exact integer sums.

#include "neon.h"

namespace bitjax {
namespace {

struct DotProd : NeonVectors {
  // 6 rows x 4 vectors: 24 accumulators, 4 vectors of codes and a broadcast, of 32 registers.
  static constexpr int kTileRows = 6;
  static constexpr int stream_vectors(int) { return 4; }

  template <int max_code>
  struct Dot : WideGroups<NeonVectors> {
    using Narrow = Sums;
    static constexpr int64_t kSpan = int64_t{1} << 40;
    static Narrow none() { return vdupq_n_s32(0); }
    static Narrow dot(Narrow acc, Bytes codes, int32_t group) {
      const int8x16_t q = vreinterpretq_s8_s32(vdupq_n_s32(group));
      if constexpr (max_code < 128) {
        return vdotq_s32(acc, vreinterpretq_s8_u8(codes), q);
      } else {
        // What is added back does not depend on the codes: one for all vectors that meet a group.
        const int8x16_t half = vdupq_n_s8(64);
        const Sums offset = vdotq_s32(vdotq_s32(vdupq_n_s32(0), half, q), half, q);
        const int8x16_t w = vreinterpretq_s8_u8(veorq_u8(codes, vdupq_n_u8(128)));
        return vdotq_s32(vaddq_s32(acc, offset), w, q);
      }
    }
    static Sums widen(Sums acc, Narrow narrow) { return vaddq_s32(acc, narrow); }
  };
};

}  // namespace

Kernel dotprod_kernel() {
  const Kernel neon = neon_kernel();  // which every 64-bit Arm CPU runs
  return make_kernel<DotProd>("dotprod", neon.quantize_f32, neon.quantize_bf16);
}

}  // namespace bitjax
