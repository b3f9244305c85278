// The kernel in plain loops: the definition the others are compared with, and the fallback.

#include <math.h>
#include <string.h>

#include "kernel.h"

namespace bitjax {
namespace {

float widen(float x) { return x; }

float widen(uint16_t bf16) {
  const uint32_t bits = static_cast<uint32_t>(bf16) << 16;
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

template <typename T>
void quantize_row(const T* x, int64_t k, int64_t k_padded, int8_t* q, float* x_scale,
                  int32_t* q_sum) {
  float amax = kMinAmax;
  bool finite = true;
  for (int64_t i = 0; i < k; ++i) {
    const float magnitude = fabsf(widen(x[i]));
    finite &= magnitude < INFINITY;  // false for NaN as well
    if (magnitude > amax) amax = magnitude;
  }
  memset(q, 0, static_cast<size_t>(k_padded));
  *q_sum = 0;
  *x_scale = NAN;
  if (!finite) return;

  // |x * inv| <= 127 * (1 + 2^-22) rounds to 127 at most, so the clip of the equation never acts.
  const float inv = kQuantMax / amax;
  for (int64_t i = 0; i < k; ++i) {
    q[i] = static_cast<int8_t>(nearbyintf(widen(x[i]) * inv));
    *q_sum += q[i];
  }
  *x_scale = amax * kInverseQuantMax;
}

void tile_product(const uint8_t* codes, int64_t input_blocks, int row_blocks, const int8_t* q,
                  int64_t q_stride, const int32_t* q_sum, int m, int32_t* out) {
  const int n = row_blocks * kBlockRows;
  memset(out, 0, sizeof(int32_t) * static_cast<size_t>(m) * static_cast<size_t>(n));
  for (int i = 0; i < m; ++i) {
    const uint8_t* block = codes;
    for (int row = 0; row < n; row += kBlockRows) {
      int32_t* acc = out + i * n + row;
      for (int64_t kb = 0; kb < input_blocks; ++kb, block += kBlockBytes) {
        const int8_t* a = q + i * q_stride + kb * kBlockInputs;
        for (int r = 0; r < kBlockRows; ++r) {
          for (int j = 0; j < kPlaneInputs; ++j) {
            const int byte = block[r * kPlaneInputs + j];
            for (int s = 0; s < kPlanes; ++s) {
              const int code = (byte >> (s * kBitsPerCode)) & kCodeMask;
              acc[r] += code * a[s * kPlaneInputs + j];
            }
          }
        }
      }
      for (int r = 0; r < kBlockRows; ++r) acc[r] -= q_sum[i];
    }
  }
}

}  // namespace

Kernel scalar_kernel() {
  return {"scalar", quantize_row<float>, quantize_row<uint16_t>, tile_product};
}

}  // namespace bitjax
