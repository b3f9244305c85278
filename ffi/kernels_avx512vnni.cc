// AVX-512 F, BW, VL and VNNI, with VBMI when kernels_avx512vbmi.cc includes this file.
//
// A vector is a whole block, a lane an output row. Differs from the scalar kernel only in the order
// of exact integer sums.

#include <immintrin.h>

#include <limits>

#include "columns.h"
#include "products.h"

namespace bitjax {
namespace {

constexpr int kLanes = 16;

struct Avx512 {
  using Bytes = __m512i;
  using Sums = __m512i;
  static constexpr int kLanes = 16;
  // 6 rows x 4 vectors: 24 accumulators, 4 vectors of codes and a broadcast are 29 of 32 registers,
  // and 10 loads serve 24 products, of which 2 start in a cycle.
  static constexpr int kPanelBlocks = 4;
  static constexpr int kTileVectors = 4;
  static constexpr int kTileRows = 6;
  // Two row blocks for 8 rows: 16 accumulators, and unpacking on the ports that products leave idle.
  static constexpr int kFewRows = 8;
  static constexpr int stream_vectors(int) { return 1; }
  static constexpr int stream_blocks(int m) { return m <= 2 ? 1 : 2; }
  static constexpr bool mask_in_place(int m) { return m <= 2; }
  static constexpr bool pairs(Layout) { return false; }
  static constexpr bool multiply_first(int m) { return m > 2; }

  static Bytes load(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static void store(uint8_t* p, Bytes b) { _mm512_storeu_si512(p, b); }
  static Bytes splat(uint8_t b) { return _mm512_set1_epi8(static_cast<char>(b)); }
  static Bytes land(Bytes a, Bytes b) { return _mm512_and_si512(a, b); }
  static Bytes sub(Bytes a, Bytes b) { return _mm512_sub_epi8(a, b); }
  static Bytes add_bytes(Bytes a, Bytes b) { return _mm512_add_epi8(a, b); }
  static Bytes umin(Bytes a, Bytes b) { return _mm512_min_epu8(a, b); }
  template <int n>
  static Bytes shr(Bytes a) {
    return _mm512_srli_epi16(a, n);
  }
  static Bytes mul_bytes(Bytes a, Bytes b) { return _mm512_mullo_epi16(a, shr<8>(b)); }
  static Bytes repeat_lane_bytes(const uint8_t* p) {
    return _mm512_mullo_epi32(load_lane_bytes(p), _mm512_set1_epi32(0x01010101));
  }

  static void interleave(Bytes (&c)[4]) {
    const Bytes low01 = _mm512_unpacklo_epi8(c[0], c[1]);
    const Bytes high01 = _mm512_unpackhi_epi8(c[0], c[1]);
    const Bytes low23 = _mm512_unpacklo_epi8(c[2], c[3]);
    const Bytes high23 = _mm512_unpackhi_epi8(c[2], c[3]);
    c[0] = _mm512_unpacklo_epi16(low01, low23);
    c[1] = _mm512_unpackhi_epi16(low01, low23);
    c[2] = _mm512_unpacklo_epi16(high01, high23);
    c[3] = _mm512_unpackhi_epi16(high01, high23);
  }

  static Sums splat32(int32_t x) { return _mm512_set1_epi32(x); }
  static Sums add(Sums a, Sums b) { return _mm512_add_epi32(a, b); }
  static Sums mul32(Sums a, Sums b) { return _mm512_mullo_epi32(a, b); }
  template <int n>
  static Sums sar(Sums a) {
    return _mm512_srai_epi32(a, n);
  }
  static Sums load_sums(const int32_t* p) { return _mm512_loadu_si512(p); }
  static void store_sums(int32_t* p, Sums a) { _mm512_storeu_si512(p, a); }
  static Sums load_lane_bytes(const uint8_t* p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }

  template <int max_code>
  struct Dot : WideGroups<Avx512> {
    using Narrow = Sums;
    static constexpr int64_t kSpan = int64_t{1} << 40;
    static Narrow none() { return _mm512_setzero_si512(); }
    static Narrow dot(Narrow acc, Bytes codes, int32_t group) {
      // Not _mm512_dpbusd_epi32: GCC 12 copies its accumulator to another register and back.
      asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(codes), "v"(_mm512_set1_epi32(group)));
      return acc;
    }
    static Sums widen(Sums acc, Narrow narrow) { return _mm512_add_epi32(acc, narrow); }
  };

#ifdef __AVX512VBMI__
  static constexpr int64_t kStreamedRows = std::numeric_limits<int64_t>::max();
  static constexpr bool kHasTritTable = true;
  static Bytes trit_fields(Bytes b) {
    alignas(64) static constexpr TritFields kTable;
    return _mm512_permutex2var_epi8(load(kTable.fields), b, load(kTable.fields + 64));
  }
#else
  static constexpr int64_t kStreamedRows = 16;
  static constexpr bool kHasTritTable = false;
  static Bytes lookup(const uint8_t (&table)[16], Bytes b) {
    const __m128i entries = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(entries), b);
  }
  // Two multiples side by side are a multiple of 16 bits, which the inverse of n modulo 2^16 divides.
  template <int n>
  static Bytes divided(Bytes b) {
    return _mm512_mullo_epi16(b, _mm512_set1_epi16(static_cast<int16_t>(inverse_of(n))));
  }
#endif
};

__mmask16 first_lanes(int64_t n) {
  if (n <= 0) return 0;
  return n >= kLanes ? 0xFFFF : static_cast<__mmask16>((1U << n) - 1U);
}

__m512 load(const float* x, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, x); }

__m512 load(const uint16_t* bf16, __mmask16 mask) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, bf16));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

template <typename T>
void quantize_row(const T* x, int64_t k, int64_t k_padded, int8_t* q, float* x_scale) {
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
  for (int64_t i = 0; i < k_padded; i += kLanes) {
    const __mmask16 mask = finite ? first_lanes(k - i) : 0;
    const __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(load(x + i, mask), inv));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(q + i), _mm512_cvtsepi32_epi8(rounded));
  }
  *x_scale = finite ? amax * kInverseQuantMax : __builtin_nanf("");
}

int64_t find_nonzero(const int8_t* q, int64_t k, int32_t* input, int8_t* value) {
  const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  int64_t count = 0;
  for (int64_t i = 0; i < k; i += kLanes) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(q + i));
    const __mmask16 mask = _mm_test_epi8_mask(bytes, bytes);
    const __m512i inputs = _mm512_add_epi32(lanes, _mm512_set1_epi32(static_cast<int32_t>(i)));
    const __m512i values = _mm512_maskz_compress_epi32(mask, _mm512_cvtepi8_epi32(bytes));
    _mm512_storeu_si512(input + count, _mm512_maskz_compress_epi32(mask, inputs));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(value + count), _mm512_cvtepi32_epi8(values));
    count += __builtin_popcount(mask);
  }
  for (int64_t i = count; i % 4 != 0; ++i) input[i] = value[i] = 0;
  return count;
}

Kernel kernel(const char* name) {
  Kernel result = make_kernel<Avx512>(name, quantize_row<float>, quantize_row<uint16_t>);
  result.find_nonzero = find_nonzero;
  result.column_product[static_cast<int>(Layout::kTernary2)] = column_product<Avx512, Ternary2>;
  result.column_product[static_cast<int>(Layout::kTernary16)] = column_product<Avx512, Ternary16>;
  return result;
}

}  // namespace

#ifdef __AVX512VBMI__
Kernel avx512vbmi_kernel() { return kernel("avx512vbmi"); }
#else
Kernel avx512vnni_kernel() { return kernel("avx512vnni"); }
#endif

}  // namespace bitjax
