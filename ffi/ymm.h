// What AVX2 and AVX-VNNI share: vectors of half a block. Included by their kernel files alone.
#ifndef BITJAX_FFI_YMM_H_
#define BITJAX_FFI_YMM_H_

#include <immintrin.h>

#include "products.h"

namespace bitjax {
namespace {

struct Ymm {
  using Bytes = __m256i;
  using Sums = __m256i;
  static constexpr int kLanes = 8;
  // 6 rows x 2 vectors: 12 accumulators, 2 vectors of codes, a broadcast and a product are the 16
  // registers.
  static constexpr int kPanelBlocks = 2;
  static constexpr int kTileVectors = 2;
  static constexpr int kTileRows = 6;
  static constexpr int kFewRows = 4;
  static constexpr int64_t kStreamedRows = 4;
  static constexpr int stream_blocks(int) { return 1; }
  static constexpr bool multiply_first(int) { return false; }

  static Bytes load(const uint8_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static void store(uint8_t* p, Bytes b) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), b);
  }
  static Bytes splat(uint8_t b) { return _mm256_set1_epi8(static_cast<char>(b)); }
  static Bytes land(Bytes a, Bytes b) { return _mm256_and_si256(a, b); }
  static Bytes sub(Bytes a, Bytes b) { return _mm256_sub_epi8(a, b); }
  static Bytes add_bytes(Bytes a, Bytes b) { return _mm256_add_epi8(a, b); }
  static Bytes umin(Bytes a, Bytes b) { return _mm256_min_epu8(a, b); }
  template <int n>
  static Bytes shr(Bytes a) {
    return _mm256_srli_epi16(a, n);
  }
  static Bytes mul_bytes(Bytes a, Bytes b) { return _mm256_mullo_epi16(a, shr<8>(b)); }
  static Bytes repeat_lane_bytes(const uint8_t* p) {
    return _mm256_mullo_epi32(load_lane_bytes(p), _mm256_set1_epi32(0x01010101));
  }

  static Sums splat32(int32_t x) { return _mm256_set1_epi32(x); }
  static Sums add(Sums a, Sums b) { return _mm256_add_epi32(a, b); }
  static Sums mul32(Sums a, Sums b) { return _mm256_mullo_epi32(a, b); }
  template <int n>
  static Sums sar(Sums a) {
    return _mm256_srai_epi32(a, n);
  }
  static Sums load_sums(const int32_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static void store_sums(int32_t* p, Sums a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a);
  }
  static Sums load_lane_bytes(const uint8_t* p) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  }

  static constexpr bool kHasTritTable = false;
  static Bytes lookup(const uint8_t (&table)[16], Bytes b) {
    const __m128i entries = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(entries), b);
  }
  // Two multiples side by side are a multiple of 16 bits, which the inverse of n modulo 2^16 divides.
  template <int n>
  static Bytes divided(Bytes b) {
    return _mm256_mullo_epi16(b, _mm256_set1_epi16(static_cast<int16_t>(inverse_of(n))));
  }
};

}  // namespace
}  // namespace bitjax

#endif  // BITJAX_FFI_YMM_H_
