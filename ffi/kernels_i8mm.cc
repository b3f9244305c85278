// NEON with the int8 matrix extension (FEAT_I8MM, Armv8.6 and some before): USDOT multiplies codes by
// activations as they are, and USMMLA two rows of eight codes by two rows of eight activations, twice
// as much. Activations are quantised by the NEON kernel.
//
// Differs from the scalar kernel only in the order of exact integer sums.

#include "neon.h"

namespace bitjax {
namespace {

struct I8mm : NeonVectors {
  static constexpr int kTileRows = 6;
  static constexpr int stream_vectors(int) { return 4; }

  template <int max_code>
  struct Dot : WideGroups<NeonVectors> {
    using Narrow = Sums;
    static constexpr int64_t kSpan = int64_t{1} << 40;
    static Narrow none() { return vdupq_n_s32(0); }
    static Narrow dot(Narrow acc, Bytes codes, int32_t group) {
      return vusdotq_s32(acc, codes, vreinterpretq_s8_s32(vdupq_n_s32(group)));
    }
    static Sums widen(Sums acc, Narrow narrow) { return vaddq_s32(acc, narrow); }
  };
};

uint32x4_t load_groups(const uint8_t* p) { return vreinterpretq_u32_u8(vld1q_u8(p)); }

// m activation rows, two by two, meet a panel two groups at a time: interleaved, two groups of four
// codes are the eight of a row. 3 pairs x 8 pairs of columns: 24 accumulators, 3 of activations and
// 2 of codes, of 32 registers. A last row without a partner is its own, and is stored once.
template <int kPairs>
void panel_pairs(const uint8_t* panel, int64_t groups, const int8_t* q, int64_t q_stride, int m,
                 int32_t* acc) {
  constexpr int kVectors = kBlockRows / I8mm::kLanes;
  const int8_t* row[2 * kPairs];
  for (int i = 0; i < 2 * kPairs; ++i) row[i] = q + (i < m ? i : m - 1) * q_stride;
  // Columns 2c and 2c + 1 with rows 2p and 2p + 1, the row changing faster.
  int32x4_t sum[kPairs][2 * kVectors];
  for (int p = 0; p < kPairs; ++p)
    for (int c = 0; c < 2 * kVectors; ++c) sum[p][c] = vdupq_n_s32(0);
  for (int64_t g = 0; g < groups; g += 2) {
    int8x16_t x[kPairs];
    for (int p = 0; p < kPairs; ++p)
      x[p] = vcombine_s8(vld1_s8(row[2 * p] + g * kLaneBytes),
                         vld1_s8(row[2 * p + 1] + g * kLaneBytes));
    for (int v = 0; v < kVectors; ++v) {
      const uint8_t* at = panel + g * kBlockBytes + v * I8mm::kLanes * kLaneBytes;
      const uint32x4_t first = load_groups(at);
      const uint32x4_t second = load_groups(at + kBlockBytes);
      const uint8x16_t low = vreinterpretq_u8_u32(vzip1q_u32(first, second));
      const uint8x16_t high = vreinterpretq_u8_u32(vzip2q_u32(first, second));
      for (int p = 0; p < kPairs; ++p) {
        sum[p][2 * v] = vusmmlaq_s32(sum[p][2 * v], low, x[p]);
        sum[p][2 * v + 1] = vusmmlaq_s32(sum[p][2 * v + 1], high, x[p]);
      }
    }
  }
  for (int i = 0; i < m; ++i)
    for (int v = 0; v < kVectors; ++v) {
      const int32x4_t low = sum[i / 2][2 * v];
      const int32x4_t high = sum[i / 2][2 * v + 1];
      int32_t* at = acc + i * kBlockRows + v * I8mm::kLanes;
      const int32x4_t added = i % 2 == 0 ? vuzp1q_s32(low, high) : vuzp2q_s32(low, high);
      vst1q_s32(at, vaddq_s32(vld1q_s32(at), added));
    }
}

void paired_panel(const uint8_t* panel, int64_t groups, const int8_t* q, int64_t q_stride, int m,
                  int32_t* acc) {
  static_assert(I8mm::kPanelBlocks == 1 && I8mm::kTileRows == 6, "the cases below");
  const int64_t even = groups / 2 * 2;
  switch ((m + 1) / 2) {
    case 1: panel_pairs<1>(panel, even, q, q_stride, m, acc); break;
    case 2: panel_pairs<2>(panel, even, q, q_stride, m, acc); break;
    default: panel_pairs<3>(panel, even, q, q_stride, m, acc); break;
  }
  if (even < groups)
    panel_product<I8mm, 255>(panel + even * kBlockBytes, 1, q + even * kLaneBytes, q_stride, m,
                             acc);
}

}  // namespace

Kernel i8mm_kernel() {
  const Kernel neon = neon_kernel();  // which every 64-bit Arm CPU runs
  Kernel kernel = make_kernel<I8mm>("i8mm", neon.quantize_f32, neon.quantize_bf16);
  kernel.ternary_panel = paired_panel;
  kernel.byte_panel = paired_panel;
  return kernel;
}

}  // namespace bitjax
