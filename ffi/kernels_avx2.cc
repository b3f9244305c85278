// AVX2: products in int16, sums in int32.
//
// Differs from the scalar kernel only in the order of exact integer sums: vpmaddubsw adds two
// products of code and activation, of magnitude 2 * max_code * 128; an int16 lane takes a span of
// such sums before vpmaddwd widens them, for int4 by the multipliers. Codes that are scaled by 4 for
// want of a shift (products.h) have shorter spans. int8 codes are split into nibbles, which are small
// enough.

#include "ymm.h"

namespace bitjax {
namespace {

constexpr int kLanes = 8;

struct Avx2 : Ymm {
  // Both halves of a block, for a few chains of additions, as long as the sums have registers.
  static constexpr int stream_vectors(int m) { return m <= 2 ? 2 : 1; }
  static constexpr bool mask_in_place(int) { return false; }
  static constexpr bool pairs(Layout layout) {
    return layout == Layout::kTernary2 || layout == Layout::kTernary16;
  }

  template <int max_code>
  struct Dot {
    using Narrow = __m256i;  // 16 int16
    static constexpr int64_t kSpan = 32767 / (2 * max_code * 128);
    static Narrow none() { return _mm256_setzero_si256(); }
    static Narrow dot(Narrow acc, Bytes codes, int32_t group) {
      // Not the intrinsics: GCC 12 then makes many products before it adds any, and spills.
      __m256i product;
      asm("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0"
          : "+x"(acc), "=&x"(product)
          : "x"(codes), "x"(_mm256_set1_epi32(group)));
      return acc;
    }
    static Sums widen(Sums acc, Narrow narrow) {
      return _mm256_add_epi32(acc, _mm256_madd_epi16(narrow, _mm256_set1_epi16(1)));
    }
    // A half of what is taken off goes to each int16 of a lane. They are sums of 16 products of a code
    // and an activation, less 4 times the sum of 32 activations: 4 * 128 * 16 + 11 * 128 * 16 at most.
    static Narrow group_start(int32_t offset, int32_t sum) {
      return _mm256_set1_epi16(static_cast<int16_t>(-offset / 2 * sum));
    }
    template <int M>
    static void add_multiplied(Sums (&acc)[M], const Narrow (&group)[M],
                               const uint8_t* multipliers) {
      // 8 bytes in both halves; to both int16 of a lane, of rows 0 to 3 and of rows 4 to 7
      const __m256i to_pairs = _mm256_setr_epi8(
          0, -1, 0, -1, 1, -1, 1, -1, 2, -1, 2, -1, 3, -1, 3, -1,
          4, -1, 4, -1, 5, -1, 5, -1, 6, -1, 6, -1, 7, -1, 7, -1);
      long long eight;
      __builtin_memcpy(&eight, multipliers, sizeof eight);
      const __m256i m = _mm256_shuffle_epi8(_mm256_set1_epi64x(eight), to_pairs);
      for (int i = 0; i < M; ++i)
        acc[i] = _mm256_add_epi32(acc[i], _mm256_madd_epi16(group[i], m));
    }
  };
};

template <>
struct Avx2::Dot<255> {
  using Narrow = __m256i;  // 8 int32
  static constexpr int64_t kSpan = int64_t{1} << 40;
  static Narrow none() { return _mm256_setzero_si256(); }
  static Narrow dot(Narrow acc, Bytes codes, int32_t group) {
    const __m256i q = _mm256_set1_epi32(group);
    const __m256i mask = _mm256_set1_epi8(15);
    const __m256i low = _mm256_maddubs_epi16(_mm256_and_si256(codes, mask), q);
    const __m256i high =
        _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16(codes, 4), mask), q);
    const __m256i sum = _mm256_add_epi32(_mm256_madd_epi16(low, _mm256_set1_epi16(1)),
                                         _mm256_madd_epi16(high, _mm256_set1_epi16(16)));
    return _mm256_add_epi32(acc, sum);
  }
  static Sums widen(Sums acc, Narrow narrow) { return _mm256_add_epi32(acc, narrow); }
};

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

template <typename T>
void quantize_row(const T* x, int64_t k, int64_t k_padded, int8_t* q, float* x_scale) {
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
  for (int64_t i = 0; i < k_padded; i += kLanes) {
    __m256i rounded = _mm256_setzero_si256();
    if (i < used) rounded = _mm256_cvtps_epi32(_mm256_mul_ps(load_first(x + i, used - i), inv));
    const __m128i words =
        _mm_packs_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(q + i), _mm_packs_epi16(words, words));
  }
  *x_scale = finite ? amax * kInverseQuantMax : __builtin_nanf("");
}

}  // namespace

Kernel avx2_kernel() {
  return make_kernel<Avx2>("avx2", quantize_row<float>, quantize_row<uint16_t>);
}

}  // namespace bitjax
