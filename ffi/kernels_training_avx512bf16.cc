// Products of a training step with AVX-512 F, BW, VL, VNNI and BF16.

#include <immintrin.h>

#include "training.h"

namespace bitjax {
namespace {

constexpr int kLanes = 16;
constexpr int kRows = 6;  // of a tile in registers, times kVectors
constexpr int kVectors = 4;
static_assert(kVectors * kLanes == kPanelColumns && kStripRows % kRows == 0, "whole tiles");

__mmask16 first_lanes(int64_t n) {
  if (n <= 0) return 0;
  return n >= kLanes ? 0xFFFF : static_cast<__mmask16>((1U << n) - 1U);
}

// ---- packing ------------------------------------------------------------------------------------

void pack_codes(const float* w, int64_t n, int64_t k, uint8_t* panel) {
  const int64_t groups = whole(k, kGroupBytes);
  for (int64_t r = 0; r < kPanelColumns; ++r) {
    for (int64_t i = 0; i < k; i += kLanes) {
      const __mmask16 mask = r < n ? first_lanes(k - i) : 0;
      const float* from = r < n ? w + r * k + i : w;
      const __m512i code = _mm512_cvtps_epi32(_mm512_maskz_loadu_ps(mask, from));
      alignas(16) uint32_t four[4];
      _mm_store_si128(reinterpret_cast<__m128i*>(four),
                      _mm512_cvtepi32_epi8(_mm512_maskz_add_epi32(mask, code, _mm512_set1_epi32(1))));
      const int64_t g = i / kGroupBytes;
      for (int64_t j = 0; j < 4 && g + j < groups; ++j)
        __builtin_memcpy(panel + ((g + j) * kPanelColumns + r) * kGroupBytes, &four[j], kGroupBytes);
    }
  }
}

// Rows of the source, 16 values at a time, as float32.
struct Floats {
  const float* x;
  const float* scale;
  int64_t stride;
  __m512 operator()(int64_t row, int64_t column, __mmask16 mask) const {
    const __m512 v = _mm512_maskz_loadu_ps(mask, x + row * stride + column);
    return scale == nullptr ? v : _mm512_mul_ps(v, _mm512_set1_ps(scale[row]));
  }
};

struct Bytes {
  const int8_t* x;
  int64_t stride;
  __m512 operator()(int64_t row, int64_t column, __mmask16 mask) const {
    return _mm512_cvtepi32_ps(
        _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(mask, x + row * stride + column)));
  }
};

// Lanes of two rows side by side: of cvtne2ps's result, whose upper half is the second row.
const __m512i pair_lanes() {
  alignas(64) static constexpr uint16_t kIndex[32] = {
      0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_load_si512(kIndex);
}

template <class Source>
void pack_pairs(const Source& source, int64_t depth, int64_t columns, int64_t width,
                uint16_t* packed) {
  const __m512i lanes = pair_lanes();
  for (int64_t d = 0; d < depth; d += 2) {
    for (int64_t c = 0; c < width; c += kLanes) {
      const __mmask16 mask = first_lanes(columns - c);
      const int64_t from = mask == 0 ? 0 : c;
      const __m512 low = source(d, from, mask);
      const __m512 high = d + 1 < depth ? source(d + 1, from, mask) : _mm512_setzero_ps();
      const __m512i both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
      _mm512_storeu_si512(packed + (d / 2 * width + c) * 2, _mm512_permutexvar_epi16(lanes, both));
    }
  }
}

void pack_floats(const float* x, const float* scale, int64_t depth, int64_t stride, int64_t columns,
                 int64_t width, uint16_t* packed) {
  pack_pairs(Floats{x, scale, stride}, depth, columns, width, packed);
}

void pack_bytes(const int8_t* x, int64_t depth, int64_t stride, int64_t columns, int64_t width,
                uint16_t* packed) {
  pack_pairs(Bytes{x, stride}, depth, columns, width, packed);
}

void round_row(const float* x, const float* scale, int64_t n, uint16_t* y) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const __mmask16 mask = first_lanes(n - i);
    const __m512 v =
        _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x + i), _mm512_maskz_loadu_ps(mask, scale + i));
    _mm256_mask_storeu_epi16(y + i, first_lanes(whole(n, 2) * 2 - i),
                             reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)));
  }
}

int32_t sum(const int8_t* q, int64_t k) {
  __m512i total = _mm512_setzero_si512();
  const __m512i ones = _mm512_set1_epi8(1);
  for (int64_t i = 0; i < k; i += 64) {
    const uint64_t rest = k - i >= 64 ? ~uint64_t{0} : (uint64_t{1} << (k - i)) - 1;
    total = _mm512_dpbusd_epi32(total, ones, _mm512_maskz_loadu_epi8(rest, q + i));
  }
  return _mm512_reduce_add_epi32(total);
}

// ---- tiles --------------------------------------------------------------------------------------

// Assembler, for GCC 12 copies the accumulator of these intrinsics to another register and back.
struct Integers {
  static __m512i dot(__m512i acc, __m512i panel, __m512i group) {
    asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(panel), "v"(group));
    return acc;
  }
};

struct Pairs {
  static __m512i dot(__m512i acc, __m512i panel, __m512i group) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(panel), "v"(group));
    return acc;
  }
};

template <class Dot, int R>
void sums_of(const Groups& x, const uint8_t* panel, int64_t groups, __m512i (&acc)[R][kVectors]) {
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < kVectors; ++v) acc[r][v] = _mm512_setzero_si512();
  const uint8_t* at = x.first;
  for (int64_t g = 0; g < groups; ++g, at += x.group, panel += kPanelColumns * kGroupBytes) {
    __m512i b[kVectors];
    for (int v = 0; v < kVectors; ++v) b[v] = _mm512_loadu_si512(panel + v * 64);
    for (int r = 0; r < R; ++r) {
      int32_t group;
      __builtin_memcpy(&group, at + r * x.row, sizeof group);
      const __m512i all = _mm512_set1_epi32(group);
      for (int v = 0; v < kVectors; ++v) acc[r][v] = Dot::dot(acc[r][v], b[v], all);
    }
  }
}

template <int R>
void integer_rows(const Groups& q, const uint8_t* panel, int64_t groups, const int32_t* sums,
                  const float* x_scale, const float* w_scale, const Tile& t) {
  __m512i acc[R][kVectors];
  sums_of<Integers, R>(q, panel, groups, acc);
  for (int v = 0; v < kVectors; ++v) {
    const __mmask16 mask = first_lanes(t.columns - v * kLanes);
    if (mask == 0) break;
    const __m512 scale = _mm512_maskz_loadu_ps(mask, w_scale + v * kLanes);
    for (int r = 0; r < R; ++r) {
      const __m512 exact =
          _mm512_cvtepi32_ps(_mm512_sub_epi32(acc[r][v], _mm512_set1_epi32(sums[r])));
      const __m512 both = _mm512_mul_ps(_mm512_set1_ps(x_scale[r]), scale);
      _mm512_mask_storeu_ps(t.out + r * t.stride + v * kLanes, mask, _mm512_mul_ps(exact, both));
    }
  }
}

template <int R>
void float_rows(const Groups& x, const uint8_t* panel, int64_t groups, bool add, const Tile& t) {
  __m512i acc[R][kVectors];
  sums_of<Pairs, R>(x, panel, groups, acc);
  for (int v = 0; v < kVectors; ++v) {
    const __mmask16 mask = first_lanes(t.columns - v * kLanes);
    if (mask == 0) break;
    for (int r = 0; r < R; ++r) {
      float* out = t.out + r * t.stride + v * kLanes;
      __m512 value = _mm512_castsi512_ps(acc[r][v]);
      if (add) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(mask, out));
      _mm512_mask_storeu_ps(out, mask, value);
    }
  }
}

Tile part(const Tile& t, int64_t row, int64_t rows) {
  return {t.out + row * t.stride, t.stride, rows, t.columns};
}

Groups part(const Groups& x, int64_t row) { return {x.first + row * x.row, x.row, x.group}; }

int64_t rows_at(const Tile& t, int64_t row) { return t.rows - row < kRows ? t.rows - row : kRows; }

void integer_tile(const Groups& q, const uint8_t* panel, int64_t groups, const int32_t* sums,
                  const float* x_scale, const float* w_scale, const Tile& t) {
  constexpr decltype(&integer_rows<1>) kOf[] = {nullptr,         integer_rows<1>, integer_rows<2>,
                                                integer_rows<3>, integer_rows<4>, integer_rows<5>,
                                                integer_rows<6>};
  for (int64_t row = 0; row < t.rows; row += kRows) {
    const int64_t rows = rows_at(t, row);
    kOf[rows](part(q, row), panel, groups, sums + row, x_scale + row, w_scale, part(t, row, rows));
  }
}

void float_tile(const Groups& x, const uint8_t* panel, int64_t groups, bool add, const Tile& t) {
  constexpr decltype(&float_rows<1>) kOf[] = {nullptr,       float_rows<1>, float_rows<2>,
                                              float_rows<3>, float_rows<4>, float_rows<5>,
                                              float_rows<6>};
  for (int64_t row = 0; row < t.rows; row += kRows) {
    const int64_t rows = rows_at(t, row);
    kOf[rows](part(x, row), panel, groups, add, part(t, row, rows));
  }
}

}  // namespace

TrainingKernel avx512bf16_training() {
  return {pack_codes, pack_floats, pack_bytes, round_row, sum, integer_tile, float_tile};
}

}  // namespace bitjax
