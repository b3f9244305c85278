// One token's key or value of one head in an int8 cache: codes and a scale, x ~ scale * code.
//
//   scale = max(max |x| / 127, 2^-100), rounded up to bfloat16
//   code  = x / scale to the nearest integer, ties to even; |code| <= 127
//
// so |x - scale * code| <= scale / 2 <= max|x| / 252 (and 2^-101 where all are smaller than that): a
// score is off by sum |q| scale / 2 at most. With a NaN or an infinity in x the scale is NaN and every
// code 0: the whole key or value is NaN. Two bytes of scale, not four: rounding up widens the step by
// 1/128 at most and costs nothing else, for codes are of the rounded scale.
#ifndef BITJAX_FFI_CACHE_INT8_H_
#define BITJAX_FFI_CACHE_INT8_H_

#include <cstdint>
#include <cstring>

namespace bitjax {

// Writes the codes of x [n]; returns the scale's bits.
inline uint16_t quantize_slot(const float* x, int64_t n, int8_t* codes) {
  constexpr float kSmallestScale = 0x1p-100F;  // its inverse is finite
  constexpr float kShift = 12582912.0F;        // 1.5 * 2^23: adding it rounds to an integer
  constexpr uint16_t kNaN = 0x7FC0;
  float absmax = 0;
  float poison = 0;  // NaN if an x is NaN or infinite
  for (int64_t i = 0; i < n; ++i) {
    const float size = x[i] < 0 ? -x[i] : x[i];
    absmax = absmax > size ? absmax : size;
    poison += x[i] * 0.0F;
  }
  if (poison != 0) {
    std::memset(codes, 0, static_cast<size_t>(n));
    return kNaN;
  }
  float scale = absmax / 127.0F;
  scale = scale > kSmallestScale ? scale : kSmallestScale;
  uint32_t bits;
  std::memcpy(&bits, &scale, sizeof bits);
  bits = (bits + 0xFFFFU) & 0xFFFF0000U;
  std::memcpy(&scale, &bits, sizeof bits);
  const float inverse = 1.0F / scale;
  for (int64_t i = 0; i < n; ++i)
    codes[i] = static_cast<int8_t>(static_cast<int32_t>((x[i] * inverse + kShift) - kShift));
  return static_cast<uint16_t>(bits >> 16);
}

}  // namespace bitjax

#endif  // BITJAX_FFI_CACHE_INT8_H_
