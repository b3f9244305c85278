// AVX-512 F, BW, VL and VNNI: one 64-byte load a block, one lane for each output row.
//
// Differs from the scalar kernel only in the order of exact integer sums. A few rows of activations
// mask the planes in place: codes come out scaled by 1, 4, 16, 64, each plane has an accumulator,
// and the sums are shifted back once at the end (exact, for they are multiples of the scale; the
// bound is at kMaxInputs). More rows decode the planes once a block and use them for every row.

#include <immintrin.h>

#include "kernel.h"

namespace bitjax {
namespace {

constexpr int kLanes = 16;
static_assert(kLanes == kBlockRows, "a lane for each row of a block");

__m512i broadcast4(const int8_t* q) {
  int32_t group;
  __builtin_memcpy(&group, q, sizeof group);
  return _mm512_set1_epi32(group);
}

__mmask16 first_lanes(int64_t n) {
  return n >= kLanes ? 0xFFFF : static_cast<__mmask16>((1U << n) - 1U);
}

__m512 load(const float* x, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, x); }

__m512 load(const uint16_t* bf16, __mmask16 mask) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, bf16));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

template <typename T>
void quantize_row(const T* x, int64_t k, int64_t k_padded, int8_t* q, float* x_scale,
                  int32_t* q_sum) {
  // The bits of non-negative floats are ordered like the floats, with infinity and NaN on top.
  const __m512i magnitude_bits = _mm512_set1_epi32(0x7FFFFFFF);
  __m512i max_bits = _mm512_setzero_si512();
  for (int64_t i = 0; i < k; i += kLanes) {
    const __m512i bits = _mm512_castps_si512(load(x + i, first_lanes(k - i)));
    max_bits = _mm512_max_epi32(max_bits, _mm512_and_si512(bits, magnitude_bits));
  }
  const int32_t amax_bits = _mm512_reduce_max_epi32(max_bits);
  const bool finite = amax_bits < 0x7F800000;
  float amax;
  __builtin_memcpy(&amax, &amax_bits, sizeof amax);
  if (!(amax > kMinAmax)) amax = kMinAmax;

  // k_padded is a multiple of the 16 lanes; the masked lanes of the last group quantise to 0. Rows
  // that are not finite multiply by 0 under an empty mask, hence store zeros.
  const __m512 inv = _mm512_set1_ps(kQuantMax / amax);
  __m512i sum = _mm512_setzero_si512();
  for (int64_t i = 0; i < k_padded; i += kLanes) {
    const __mmask16 mask = finite ? first_lanes(k - i) : 0;
    const __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(load(x + i, mask), inv));
    sum = _mm512_add_epi32(sum, rounded);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(q + i), _mm512_cvtsepi32_epi8(rounded));
  }
  *q_sum = _mm512_reduce_add_epi32(sum);
  *x_scale = finite ? amax * kInverseQuantMax : __builtin_nanf("");
}

// Few rows: planes masked in place. The 4 * M accumulators are as many independent chains, which
// hide the dot product's latency; blocks are read in one consecutive stream, because two (two row
// blocks at once, which saves broadcasts and is a fifth faster in cache) halve the speed from
// memory.
template <int M>
void few_rows(const uint8_t* codes, int64_t input_blocks, const int8_t* q, int64_t q_stride,
              const int32_t* q_sum, int32_t* out, int out_stride) {
  __m512i acc[M][kPlanes];
  for (int i = 0; i < M; ++i)
    for (int s = 0; s < kPlanes; ++s) acc[i][s] = _mm512_setzero_si512();
  for (int64_t kb = 0; kb < input_blocks; ++kb) {
    const __m512i block = _mm512_loadu_si512(codes + kb * kBlockBytes);
    const int8_t* a = q + kb * kBlockInputs;
    for (int s = 0; s < kPlanes; ++s) {
      const __m512i mask = _mm512_set1_epi8(static_cast<char>(kCodeMask << (s * kBitsPerCode)));
      const __m512i plane = _mm512_and_si512(block, mask);
      for (int i = 0; i < M; ++i) {
        const __m512i group = broadcast4(a + i * q_stride + s * kPlaneInputs);
        acc[i][s] = _mm512_dpbusd_epi32(acc[i][s], plane, group);
      }
    }
  }
  for (int i = 0; i < M; ++i) {
    const __m512i sum1 = _mm512_srai_epi32(acc[i][1], 2);
    const __m512i sum2 = _mm512_srai_epi32(acc[i][2], 4);
    const __m512i sum3 = _mm512_srai_epi32(acc[i][3], 6);
    const __m512i sum =
        _mm512_add_epi32(_mm512_add_epi32(acc[i][0], sum1), _mm512_add_epi32(sum2, sum3));
    _mm512_storeu_si512(out + i * out_stride, _mm512_sub_epi32(sum, _mm512_set1_epi32(q_sum[i])));
  }
}

// Many rows: planes decoded once a block, one accumulator a row.
template <int M>
void many_rows(const uint8_t* codes, int64_t input_blocks, const int8_t* q, int64_t q_stride,
               const int32_t* q_sum, int32_t* out, int out_stride) {
  const __m512i mask = _mm512_set1_epi8(kCodeMask);
  __m512i acc[M];
  for (int i = 0; i < M; ++i) acc[i] = _mm512_setzero_si512();
  for (int64_t kb = 0; kb < input_blocks; ++kb) {
    const __m512i block = _mm512_loadu_si512(codes + kb * kBlockBytes);
    // 16-bit shifts drag bits of the neighbouring byte in from the left; the mask removes them.
    const __m512i plane0 = _mm512_and_si512(block, mask);
    const __m512i plane1 = _mm512_and_si512(_mm512_srli_epi16(block, 2), mask);
    const __m512i plane2 = _mm512_and_si512(_mm512_srli_epi16(block, 4), mask);
    const __m512i plane3 = _mm512_and_si512(_mm512_srli_epi16(block, 6), mask);
    const int8_t* a = q + kb * kBlockInputs;
    for (int i = 0; i < M; ++i, a += q_stride) {
      acc[i] = _mm512_dpbusd_epi32(acc[i], plane0, broadcast4(a));
      acc[i] = _mm512_dpbusd_epi32(acc[i], plane1, broadcast4(a + 4));
      acc[i] = _mm512_dpbusd_epi32(acc[i], plane2, broadcast4(a + 8));
      acc[i] = _mm512_dpbusd_epi32(acc[i], plane3, broadcast4(a + 12));
    }
  }
  for (int i = 0; i < M; ++i) {
    const __m512i sum = _mm512_sub_epi32(acc[i], _mm512_set1_epi32(q_sum[i]));
    _mm512_storeu_si512(out + i * out_stride, sum);
  }
}

void tile_product(const uint8_t* codes, int64_t input_blocks, int row_blocks, const int8_t* q,
                  int64_t q_stride, const int32_t* q_sum, int m, int32_t* out) {
  const int n = row_blocks * kBlockRows;
  for (int row = 0; row < n; row += kBlockRows, codes += input_blocks * kBlockBytes) {
    int32_t* o = out + row;
    switch (m) {
      case 1: few_rows<1>(codes, input_blocks, q, q_stride, q_sum, o, n); break;
      case 2: few_rows<2>(codes, input_blocks, q, q_stride, q_sum, o, n); break;
      case 3: few_rows<3>(codes, input_blocks, q, q_stride, q_sum, o, n); break;
      case 4: few_rows<4>(codes, input_blocks, q, q_stride, q_sum, o, n); break;
      case 5: many_rows<5>(codes, input_blocks, q, q_stride, q_sum, o, n); break;
      case 6: many_rows<6>(codes, input_blocks, q, q_stride, q_sum, o, n); break;
      case 7: many_rows<7>(codes, input_blocks, q, q_stride, q_sum, o, n); break;
      case 8: many_rows<8>(codes, input_blocks, q, q_stride, q_sum, o, n); break;
      default: break;
    }
  }
}
static_assert(kMaxTileRows == 8, "tile_product has a case for every number of rows");

}  // namespace

Kernel avx512vnni_kernel() {
  return {"avx512vnni", quantize_row<float>, quantize_row<uint16_t>, tile_product};
}

}  // namespace bitjax
