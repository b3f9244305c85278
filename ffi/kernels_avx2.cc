// AVX2: half a block (8 output rows x 4 bytes) in a register, products in int16, sums in int32.
//
// Differs from the scalar kernel only in the order of exact integer sums: vpmaddubsw adds pairs of
// code * activation, at most 2 * 3 * 128 = 768 in magnitude (code 3 counted), so it never
// saturates; the four planes of a block add up to 3072 in an int16 lane, and vpmaddwd widens after
// kSpan blocks.

#include <immintrin.h>

#include "kernel.h"

namespace bitjax {
namespace {

constexpr int kLanes = 8;
constexpr int kHalfBytes = kBlockBytes / 2;
constexpr int64_t kSpan = 10;  // blocks summed in int16
static_assert(kSpan * kPlanes * 2 * 3 * 128 <= 32767, "the int16 sums of a span must not wrap");

// Four rows at a time: 4 planes, 4 int16 and 4 int32 accumulators, mask, ones and temporaries are
// the 16 registers there are.
constexpr int kRows = 4;

__m256i broadcast4(const int8_t* q) {
  int32_t group;
  __builtin_memcpy(&group, q, sizeof group);
  return _mm256_set1_epi32(group);
}

__m256 load(const float* x) { return _mm256_loadu_ps(x); }

__m256 load(const uint16_t* bf16) {
  const __m128i narrow = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bf16));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(narrow), 16));
}

// The first n values, then zeros; reads no further than x[n - 1].
template <typename T>
__m256 load_first(const T* x, int64_t n) {
  if (n >= kLanes) return load(x);
  T padded[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) padded[i] = x[i];
  return load(padded);
}

int32_t reduce_max(__m256i v) {
  __m128i half = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0x4E));
  half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0xB1));
  return _mm_cvtsi128_si32(half);
}

int32_t reduce_add(__m256i v) {
  __m128i half = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4E));
  half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0xB1));
  return _mm_cvtsi128_si32(half);
}

template <typename T>
void quantize_row(const T* x, int64_t k, int64_t k_padded, int8_t* q, float* x_scale,
                  int32_t* q_sum) {
  // The bits of non-negative floats are ordered like the floats, with infinity and NaN on top.
  const __m256i magnitude_bits = _mm256_set1_epi32(0x7FFFFFFF);
  __m256i max_bits = _mm256_setzero_si256();
  for (int64_t i = 0; i < k; i += kLanes) {
    const __m256i bits = _mm256_castps_si256(load_first(x + i, k - i));
    max_bits = _mm256_max_epi32(max_bits, _mm256_and_si256(bits, magnitude_bits));
  }
  const int32_t amax_bits = reduce_max(max_bits);
  const bool finite = amax_bits < 0x7F800000;
  float amax;
  __builtin_memcpy(&amax, &amax_bits, sizeof amax);
  if (!(amax > kMinAmax)) amax = kMinAmax;

  // k_padded is a multiple of the 8 lanes, so whole groups cover the row and its padding.
  const __m256 inv = _mm256_set1_ps(kQuantMax / amax);
  const int64_t used = finite ? k : 0;
  __m256i sum = _mm256_setzero_si256();
  for (int64_t i = 0; i < k_padded; i += kLanes) {
    __m256i rounded = _mm256_setzero_si256();
    if (i < used) rounded = _mm256_cvtps_epi32(_mm256_mul_ps(load_first(x + i, used - i), inv));
    sum = _mm256_add_epi32(sum, rounded);
    const __m128i words =
        _mm_packs_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(q + i), _mm_packs_epi16(words, words));
  }
  *q_sum = reduce_add(sum);
  *x_scale = finite ? amax * kInverseQuantMax : __builtin_nanf("");
}

// 8 output rows (one half of every block) with M rows of activations.
template <int M>
void half_rows(const uint8_t* codes, int64_t input_blocks, const int8_t* q, int64_t q_stride,
               const int32_t* q_sum, int32_t* out, int out_stride) {
  const __m256i mask = _mm256_set1_epi8(kCodeMask);
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i acc[M];
  for (int i = 0; i < M; ++i) acc[i] = _mm256_setzero_si256();
  for (int64_t kb = 0; kb < input_blocks;) {
    const int64_t end = kb + kSpan < input_blocks ? kb + kSpan : input_blocks;
    __m256i acc16[M];
    for (int i = 0; i < M; ++i) acc16[i] = _mm256_setzero_si256();
    for (; kb < end; ++kb) {
      const __m256i half =
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + kb * kBlockBytes));
      // 16-bit shifts drag bits of the neighbouring byte in from the left; the mask removes them.
      const __m256i plane0 = _mm256_and_si256(half, mask);
      const __m256i plane1 = _mm256_and_si256(_mm256_srli_epi16(half, 2), mask);
      const __m256i plane2 = _mm256_and_si256(_mm256_srli_epi16(half, 4), mask);
      const __m256i plane3 = _mm256_and_si256(_mm256_srli_epi16(half, 6), mask);
      const int8_t* a = q + kb * kBlockInputs;
      for (int i = 0; i < M; ++i, a += q_stride) {
        const __m256i p01 = _mm256_add_epi16(_mm256_maddubs_epi16(plane0, broadcast4(a)),
                                             _mm256_maddubs_epi16(plane1, broadcast4(a + 4)));
        const __m256i p23 = _mm256_add_epi16(_mm256_maddubs_epi16(plane2, broadcast4(a + 8)),
                                             _mm256_maddubs_epi16(plane3, broadcast4(a + 12)));
        acc16[i] = _mm256_add_epi16(acc16[i], _mm256_add_epi16(p01, p23));
      }
    }
    for (int i = 0; i < M; ++i)
      acc[i] = _mm256_add_epi32(acc[i], _mm256_madd_epi16(acc16[i], ones));
  }
  for (int i = 0; i < M; ++i) {
    const __m256i sum = _mm256_sub_epi32(acc[i], _mm256_set1_epi32(q_sum[i]));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i * out_stride), sum);
  }
}

void tile_product(const uint8_t* codes, int64_t input_blocks, int row_blocks, const int8_t* q,
                  int64_t q_stride, const int32_t* q_sum, int m, int32_t* out) {
  const int n = row_blocks * kBlockRows;
  for (int row = 0; row < n; row += kBlockRows, codes += input_blocks * kBlockBytes) {
    for (int half = 0; half < 2; ++half) {
      const uint8_t* c = codes + half * kHalfBytes;
      for (int i = 0; i < m; i += kRows) {
        const int8_t* a = q + i * q_stride;
        int32_t* o = out + i * n + row + half * kLanes;
        switch (m - i) {
          case 1: half_rows<1>(c, input_blocks, a, q_stride, q_sum + i, o, n); break;
          case 2: half_rows<2>(c, input_blocks, a, q_stride, q_sum + i, o, n); break;
          case 3: half_rows<3>(c, input_blocks, a, q_stride, q_sum + i, o, n); break;
          default: half_rows<kRows>(c, input_blocks, a, q_stride, q_sum + i, o, n); break;
        }
      }
    }
  }
}
static_assert(kRows == 4, "tile_product has a case for every remainder");

}  // namespace

Kernel avx2_kernel() { return {"avx2", quantize_row<float>, quantize_row<uint16_t>, tile_product}; }

}  // namespace bitjax
