// The final scaling, one definition for every kernel, and bfloat16 rounding.
//
//   y_n = float(acc_n) * (x_scale * w_scale)      float32, in exactly this association
//
// and then, for a bfloat16 output, rounding to nearest even. acc_n is exact up to |acc| < 2^25 and
// is rounded to float32 (nearest even) above 2^24. x_scale = NaN marks a row that held NaN or an
// infinity; 0 * NaN makes its outputs NaN.
#ifndef BITJAX_FFI_EPILOGUE_H_
#define BITJAX_FFI_EPILOGUE_H_

#include <cstdint>
#include <cstring>

namespace bitjax {

inline uint16_t round_to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  // A NaN keeps its sign and upper payload and turns quiet; rounding could carry it to infinity.
  if ((bits & 0x7FFFFFFFU) > 0x7F800000U) return static_cast<uint16_t>((bits >> 16) | 0x0040U);
  const uint32_t tie_to_even = (bits >> 16) & 1U;
  return static_cast<uint16_t>((bits + 0x7FFFU + tie_to_even) >> 16);
}

inline void store_output(int32_t acc, float /*scale*/, int32_t* y) { *y = acc; }

inline void store_output(int32_t acc, float scale, float* y) {
  *y = static_cast<float>(acc) * scale;
}

inline void store_output(int32_t acc, float scale, uint16_t* bf16) {
  *bf16 = round_to_bf16(static_cast<float>(acc) * scale);
}

// y[i*y_stride + n] for i < m and n < n_count from acc[i*acc_stride + n]. x_scale holds m values;
// int32 outputs take the sums as they are and ignore the scales.
template <typename Y>
void scale_tile(const int32_t* acc, int64_t acc_stride, int64_t m, int64_t n_count,
                const float* x_scale, float w_scale, Y* y, int64_t y_stride) {
  for (int64_t i = 0; i < m; ++i) {
    const float scale = x_scale[i] * w_scale;
    for (int64_t n = 0; n < n_count; ++n)
      store_output(acc[i * acc_stride + n], scale, y + i * y_stride + n);
  }
}

}  // namespace bitjax

#endif  // BITJAX_FFI_EPILOGUE_H_
