// AArch64 NEON with the dot product extension (ARMv8.2 FEAT_DotProd): a quarter block (4 output
// rows x 4 bytes) in a register; sdot's lane operand picks the plane's 4 activations for free.
//
// Differs from the scalar kernel only in the order of exact integer sums. sdot is signed x signed,
// so the planes are shifted down: left in place, code 2 of plane 3 would be -128.

#include <arm_neon.h>

#include "kernel.h"

namespace bitjax {
namespace {

constexpr int kLanes = 4;
constexpr int kQuarters = kBlockRows / kLanes;
constexpr int kQuarterBytes = kBlockBytes / kQuarters;

// Four rows at a time: 16 accumulators, 4 activation registers and 4 planes fit 32 registers.
constexpr int kRows = 4;

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
void quantize_row(const T* x, int64_t k, int64_t k_padded, int8_t* q, float* x_scale,
                  int32_t* q_sum) {
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
  int32x4_t sum = vdupq_n_s32(0);
  for (int64_t i = 0; i < k_padded; i += 2 * kLanes) {
    int32x4_t low = vdupq_n_s32(0);
    int32x4_t high = low;
    if (i < used) low = vcvtnq_s32_f32(vmulq_f32(load_first(x + i, used - i), inv));
    if (i + kLanes < used)
      high = vcvtnq_s32_f32(vmulq_f32(load_first(x + i + kLanes, used - i - kLanes), inv));
    sum = vaddq_s32(sum, vaddq_s32(low, high));
    vst1_s8(q + i, vqmovn_s16(vcombine_s16(vqmovn_s32(low), vqmovn_s32(high))));
  }
  *q_sum = vaddvq_s32(sum);
  *x_scale = finite ? amax * kInverseQuantMax : __builtin_nanf("");
}

template <int M>
void block_rows(const uint8_t* codes, int64_t input_blocks, const int8_t* q, int64_t q_stride,
                const int32_t* q_sum, int32_t* out, int out_stride) {
  const uint8x16_t mask = vdupq_n_u8(kCodeMask);
  int32x4_t acc[M][kQuarters];
  for (int i = 0; i < M; ++i)
    for (int g = 0; g < kQuarters; ++g) acc[i][g] = vdupq_n_s32(0);
  for (int64_t kb = 0; kb < input_blocks; ++kb) {
    int8x16_t a[M];
    for (int i = 0; i < M; ++i) a[i] = vld1q_s8(q + i * q_stride + kb * kBlockInputs);
    for (int g = 0; g < kQuarters; ++g) {
      const uint8x16_t quarter = vld1q_u8(codes + kb * kBlockBytes + g * kQuarterBytes);
      const int8x16_t plane0 = vreinterpretq_s8_u8(vandq_u8(quarter, mask));
      const int8x16_t plane1 = vreinterpretq_s8_u8(vandq_u8(vshrq_n_u8(quarter, 2), mask));
      const int8x16_t plane2 = vreinterpretq_s8_u8(vandq_u8(vshrq_n_u8(quarter, 4), mask));
      const int8x16_t plane3 = vreinterpretq_s8_u8(vshrq_n_u8(quarter, 6));
      for (int i = 0; i < M; ++i) {
        acc[i][g] = vdotq_laneq_s32(acc[i][g], plane0, a[i], 0);
        acc[i][g] = vdotq_laneq_s32(acc[i][g], plane1, a[i], 1);
        acc[i][g] = vdotq_laneq_s32(acc[i][g], plane2, a[i], 2);
        acc[i][g] = vdotq_laneq_s32(acc[i][g], plane3, a[i], 3);
      }
    }
  }
  for (int i = 0; i < M; ++i)
    for (int g = 0; g < kQuarters; ++g)
      vst1q_s32(out + i * out_stride + g * kLanes, vsubq_s32(acc[i][g], vdupq_n_s32(q_sum[i])));
}

void tile_product(const uint8_t* codes, int64_t input_blocks, int row_blocks, const int8_t* q,
                  int64_t q_stride, const int32_t* q_sum, int m, int32_t* out) {
  const int n = row_blocks * kBlockRows;
  for (int row = 0; row < n; row += kBlockRows, codes += input_blocks * kBlockBytes) {
    for (int i = 0; i < m; i += kRows) {
      const int8_t* a = q + i * q_stride;
      int32_t* o = out + i * n + row;
      switch (m - i) {
        case 1: block_rows<1>(codes, input_blocks, a, q_stride, q_sum + i, o, n); break;
        case 2: block_rows<2>(codes, input_blocks, a, q_stride, q_sum + i, o, n); break;
        case 3: block_rows<3>(codes, input_blocks, a, q_stride, q_sum + i, o, n); break;
        default: block_rows<kRows>(codes, input_blocks, a, q_stride, q_sum + i, o, n); break;
      }
    }
  }
}
static_assert(kRows == 4, "tile_product has a case for every remainder");

}  // namespace

Kernel neon_kernel() { return {"neon", quantize_row<float>, quantize_row<uint16_t>, tile_product}; }

}  // namespace bitjax
