// AVX-VNNI: the AVX-512 VNNI kernel in 256-bit halves of a block; quantisation is the AVX2
// kernel's.
//
// Differs from the scalar kernel only in the order of exact integer sums (see
// kernels_avx512vnni.cc). The dot product is an alias: with BITJAX_AVXVNNI_EVEX the same source
// uses the EVEX encoding of the same instruction, so that its logic can be tested on machines that
// have AVX-512 VNNI but not AVX-VNNI. That variant is never part of the extension.

#include <immintrin.h>

#include "kernel.h"

namespace bitjax {
namespace {

constexpr int kLanes = 8;
constexpr int kHalfBytes = kBlockBytes / 2;

__m256i dot4(__m256i acc, __m256i unsigned_bytes, __m256i signed_bytes) {
#ifdef BITJAX_AVXVNNI_EVEX
  return _mm256_dpbusd_epi32(acc, unsigned_bytes, signed_bytes);
#else
  return _mm256_dpbusd_avx_epi32(acc, unsigned_bytes, signed_bytes);
#endif
}

__m256i broadcast4(const int8_t* q) {
  int32_t group;
  __builtin_memcpy(&group, q, sizeof group);
  return _mm256_set1_epi32(group);
}

__m256i load(const uint8_t* codes) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
}

void store(int32_t* out, __m256i sum, int32_t q_sum) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out),
                      _mm256_sub_epi32(sum, _mm256_set1_epi32(q_sum)));
}

__m256i unscale_and_add(const __m256i (&acc)[kPlanes]) {
  const __m256i sum01 = _mm256_add_epi32(acc[0], _mm256_srai_epi32(acc[1], 2));
  const __m256i sum23 =
      _mm256_add_epi32(_mm256_srai_epi32(acc[2], 4), _mm256_srai_epi32(acc[3], 6));
  return _mm256_add_epi32(sum01, sum23);
}

// Few rows: H halves of every block with M rows, planes masked in place; 4 * H * M accumulators.
template <int H, int M>
void few_rows(const uint8_t* codes, int64_t input_blocks, const int8_t* q, int64_t q_stride,
              const int32_t* q_sum, int32_t* out, int out_stride) {
  __m256i acc[H][M][kPlanes];
  for (int h = 0; h < H; ++h)
    for (int i = 0; i < M; ++i)
      for (int s = 0; s < kPlanes; ++s) acc[h][i][s] = _mm256_setzero_si256();
  for (int64_t kb = 0; kb < input_blocks; ++kb) {
    __m256i half[H];
    for (int h = 0; h < H; ++h) half[h] = load(codes + kb * kBlockBytes + h * kHalfBytes);
    const int8_t* a = q + kb * kBlockInputs;
    for (int s = 0; s < kPlanes; ++s) {
      const __m256i mask = _mm256_set1_epi8(static_cast<char>(kCodeMask << (s * kBitsPerCode)));
      for (int i = 0; i < M; ++i) {
        const __m256i group = broadcast4(a + i * q_stride + s * kPlaneInputs);
        for (int h = 0; h < H; ++h)
          acc[h][i][s] = dot4(acc[h][i][s], _mm256_and_si256(half[h], mask), group);
      }
    }
  }
  for (int h = 0; h < H; ++h)
    for (int i = 0; i < M; ++i)
      store(out + i * out_stride + h * kLanes, unscale_and_add(acc[h][i]), q_sum[i]);
}

// Many rows: one half of every block, planes decoded once a block, one accumulator a row.
template <int M>
void many_rows(const uint8_t* codes, int64_t input_blocks, const int8_t* q, int64_t q_stride,
               const int32_t* q_sum, int32_t* out, int out_stride) {
  const __m256i mask = _mm256_set1_epi8(kCodeMask);
  __m256i acc[M];
  for (int i = 0; i < M; ++i) acc[i] = _mm256_setzero_si256();
  for (int64_t kb = 0; kb < input_blocks; ++kb) {
    const __m256i half = load(codes + kb * kBlockBytes);
    // 16-bit shifts drag bits of the neighbouring byte in from the left; the mask removes them.
    const __m256i plane0 = _mm256_and_si256(half, mask);
    const __m256i plane1 = _mm256_and_si256(_mm256_srli_epi16(half, 2), mask);
    const __m256i plane2 = _mm256_and_si256(_mm256_srli_epi16(half, 4), mask);
    const __m256i plane3 = _mm256_and_si256(_mm256_srli_epi16(half, 6), mask);
    const int8_t* a = q + kb * kBlockInputs;
    for (int i = 0; i < M; ++i, a += q_stride) {
      acc[i] = dot4(acc[i], plane0, broadcast4(a));
      acc[i] = dot4(acc[i], plane1, broadcast4(a + 4));
      acc[i] = dot4(acc[i], plane2, broadcast4(a + 8));
      acc[i] = dot4(acc[i], plane3, broadcast4(a + 12));
    }
  }
  for (int i = 0; i < M; ++i) store(out + i * out_stride, acc[i], q_sum[i]);
}

void tile_product(const uint8_t* codes, int64_t input_blocks, int row_blocks, const int8_t* q,
                  int64_t q_stride, const int32_t* q_sum, int m, int32_t* out) {
  const int n = row_blocks * kBlockRows;
  for (int row = 0; row < n; row += kBlockRows, codes += input_blocks * kBlockBytes) {
    if (m == 1) {  // 8 accumulators; whole blocks in one stream
      few_rows<2, 1>(codes, input_blocks, q, q_stride, q_sum, out + row, n);
      continue;
    }
    for (int half = 0; half < 2; ++half) {
      const uint8_t* c = codes + half * kHalfBytes;
      int32_t* o = out + row + half * kLanes;
      switch (m) {
        case 2: few_rows<1, 2>(c, input_blocks, q, q_stride, q_sum, o, n); break;
        case 3: few_rows<1, 3>(c, input_blocks, q, q_stride, q_sum, o, n); break;
        case 4: many_rows<4>(c, input_blocks, q, q_stride, q_sum, o, n); break;
        case 5: many_rows<5>(c, input_blocks, q, q_stride, q_sum, o, n); break;
        case 6: many_rows<6>(c, input_blocks, q, q_stride, q_sum, o, n); break;
        case 7: many_rows<7>(c, input_blocks, q, q_stride, q_sum, o, n); break;
        case 8: many_rows<8>(c, input_blocks, q, q_stride, q_sum, o, n); break;
        default: break;
      }
    }
  }
}
static_assert(kMaxTileRows == 8, "tile_product has a case for every number of rows");

}  // namespace

#ifdef BITJAX_AVXVNNI_EVEX
Kernel avxvnni_evex_kernel();
Kernel avxvnni_evex_kernel() {
  const Kernel avx2 = avx2_kernel();
  return {"avxvnni-evex", avx2.quantize_f32, avx2.quantize_bf16, tile_product};
}
#else
Kernel avxvnni_kernel() {
  const Kernel avx2 = avx2_kernel();  // AVX-VNNI implies AVX2
  return {"avxvnni", avx2.quantize_f32, avx2.quantize_bf16, tile_product};
}
#endif

}  // namespace bitjax
