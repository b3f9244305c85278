// The final scaling, one definition for every kernel, and bfloat16 rounding.
//
//   y_n = float(acc_n) * (x_scale * w_scale_n) [+ residual_n]     float32, in exactly this association
//
// and then, for a bfloat16 output, rounding to nearest even. acc_n is exact up to |acc| < 2^25 and
// is rounded to float32 (nearest even) above 2^24. x_scale = NaN marks a row that held NaN or an
// infinity; 0 * NaN makes its outputs NaN.
#ifndef BITJAX_FFI_EPILOGUE_H_
#define BITJAX_FFI_EPILOGUE_H_

#include <cstdint>
#include <cstring>

namespace bitjax {
namespace {  // of each file its own, for they are compiled for different instruction sets

inline uint16_t round_to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  // A NaN keeps its sign and upper payload and turns quiet; rounding could carry it to infinity.
  if ((bits & 0x7FFFFFFFU) > 0x7F800000U) return static_cast<uint16_t>((bits >> 16) | 0x0040U);
  const uint32_t tie_to_even = (bits >> 16) & 1U;
  return static_cast<uint16_t>((bits + 0x7FFFU + tie_to_even) >> 16);
}

inline void store_output(float value, float* y) { *y = value; }
inline void store_output(float value, uint16_t* bf16) { *bf16 = round_to_bf16(value); }

inline float widen(float x) { return x; }
inline float widen(uint16_t bf16) {
  const uint32_t bits = static_cast<uint32_t>(bf16) << 16;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// y[n] from acc[n] - correction for n < n_count; w_scale holds n_count values or one; residual may
// be null. Whatever is the same for all n is settled outside the loop, which compilers then vectorise.
template <typename X>
void scale_row(const int32_t* acc, int64_t n_count, int32_t correction, float x_scale,
               const float* w_scale, bool scale_per_row, const X* residual, X* __restrict__ y) {
  const auto each = [&](auto scale_of) {
    if (residual == nullptr) {
      for (int64_t n = 0; n < n_count; ++n)
        store_output(static_cast<float>(acc[n] - correction) * scale_of(n), y + n);
    } else {
      for (int64_t n = 0; n < n_count; ++n)
        store_output(static_cast<float>(acc[n] - correction) * scale_of(n) + widen(residual[n]), y + n);
    }
  };
  if (scale_per_row) {
    each([=](int64_t n) { return x_scale * w_scale[n]; });
  } else {
    each([scale = x_scale * *w_scale](int64_t) { return scale; });
  }
}

// int32 results are the sums as they are.
inline void scale_row(const int32_t* acc, int64_t n_count, int32_t correction, float /*x_scale*/,
                      const float* /*w_scale*/, bool /*scale_per_row*/, const int8_t* /*residual*/,
                      int32_t* y) {
  for (int64_t n = 0; n < n_count; ++n) y[n] = acc[n] - correction;
}

}  // namespace
}  // namespace bitjax

#endif  // BITJAX_FFI_EPILOGUE_H_
