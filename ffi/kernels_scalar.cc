// The kernel in plain loops: the definition the others are compared with, and the fallback.

#include <math.h>
#include <string.h>

#include "kernel.h"
#include "rows.h"

namespace bitjax {
namespace {

template <typename T>
void quantize_row(const T* x, int64_t k, int64_t k_padded, int8_t* q, float* x_scale) {
  float amax = kMinAmax;
  bool finite = true;
  for (int64_t i = 0; i < k; ++i) {
    const float magnitude = fabsf(widen(x[i]));
    finite &= magnitude < INFINITY;  // false for NaN as well
    if (magnitude > amax) amax = magnitude;
  }
  memset(q, 0, static_cast<size_t>(k_padded));
  *x_scale = NAN;
  if (!finite) return;

  // |x * inv| <= 127 * (1 + 2^-22) rounds to 127 at most, so the clip of the equation never acts.
  const float inv = kQuantMax / amax;
  for (int64_t i = 0; i < k; ++i) q[i] = static_cast<int8_t>(nearbyintf(widen(x[i]) * inv));
  *x_scale = amax * kInverseQuantMax;
}

// The weights of one byte, one for each plane, offset included; multipliers are not applied.
template <Layout layout>
void decode(int byte, int (&code)[spec(layout).planes]) {
  for (int s = 0; s < spec(layout).planes; ++s) {
    if (layout == Layout::kTernary2) code[s] = (byte >> (2 * s)) & 3;
    if (layout == Layout::kTernary16) code[s] = byte / kPowersOf3[s] % 3;
    if (layout == Layout::kInt4) code[s] = (byte >> (4 * s)) & 15;
    if (layout == Layout::kInt8) code[s] = byte;
  }
}

int multiplier(const PackedRows& w, Layout layout, int64_t row, int64_t kb) {
  const int group_blocks = spec(layout).group_blocks;
  if (group_blocks == 0) return 1;
  const int64_t groups = w.input_blocks / group_blocks;
  return w.multipliers[(row / kBlockRows * groups + kb / group_blocks) * kBlockRows +
                       row % kBlockRows];
}

template <Layout layout>
void few_rows(const PackedRows& w, const FewActivations& x, int32_t* out, int64_t out_stride) {
  constexpr LayoutSpec kSpec = spec(layout);
  constexpr int free_offset = kSpec.offset - few_rows_offset(layout);
  for (int i = 0; i < x.m; ++i)
    for (int64_t row = 0; row < w.row_blocks * kBlockRows; ++row) {
      const uint8_t* bytes = w.codes + row / kBlockRows * w.input_blocks * kBlockBytes +
                             row % kBlockRows * kLaneBytes;
      int32_t acc = 0;
      for (int64_t kb = 0; kb < w.input_blocks; ++kb, bytes += kBlockBytes) {
        const int8_t* q = x.q + i * x.q_stride + kb * kSpec.block_inputs();
        int32_t sum = 0;
        for (int j = 0; j < kLaneBytes; ++j) {
          int code[kSpec.planes];
          decode<layout>(bytes[j], code);
          for (int s = 0; s < kSpec.planes; ++s)
            sum += (code[s] - free_offset) * q[s * kLaneBytes + j];
        }
        acc += sum * multiplier(w, layout, row, kb);
      }
      out[i * out_stride + row] = acc;
    }
}

template <Layout layout>
void unpack_panel(const PackedRows& w, int64_t first, int64_t last, uint8_t* panel) {
  constexpr LayoutSpec kSpec = spec(layout);
  for (int64_t row = 0; row < w.row_blocks * kBlockRows; ++row)
    for (int64_t kb = first; kb < last; ++kb)
      for (int j = 0; j < kLaneBytes; ++j) {
        const int64_t block = row / kBlockRows * w.input_blocks + kb;
        int code[kSpec.planes];
        decode<layout>(w.codes[block * kBlockBytes + row % kBlockRows * kLaneBytes + j], code);
        for (int s = 0; s < kSpec.planes; ++s)
          panel[((kb - first) * kSpec.planes + s) * kBlockBytes + row * kLaneBytes + j] =
              static_cast<uint8_t>((code[s] - kSpec.offset) * multiplier(w, layout, row, kb) +
                                   panel_offset(layout));
      }
}

void panel_product(const uint8_t* panel, int64_t groups, const int8_t* q, int64_t q_stride, int m,
                   int32_t* acc) {
  for (int i = 0; i < m; ++i)
    for (int64_t g = 0; g < groups; ++g)
      for (int n = 0; n < kBlockRows; ++n)
        for (int j = 0; j < kLaneBytes; ++j)
          acc[i * kBlockRows + n] += q[i * q_stride + g * kLaneBytes + j] *
                                     panel[g * kBlockBytes + n * kLaneBytes + j];
}

int64_t find_nonzero(const int8_t* q, int64_t k, int32_t* input, int8_t* value) {
  int64_t count = 0;
  for (int64_t i = 0; i < k; ++i)
    if (q[i] != 0) {
      input[count] = static_cast<int32_t>(i);
      value[count++] = q[i];
    }
  for (int64_t i = count; i % 4 != 0; ++i) input[i] = value[i] = 0;
  return count;
}

template <Layout layout>
void column_product(const uint8_t* tile, int64_t /*k*/, const SparseRow& x, int32_t* out) {
  constexpr int kPlanes = spec(layout).planes;
  for (int n = 0; n < kColumnBytes * kPlanes; ++n) out[n] = 0;
  for (int64_t i = 0; i < x.count; ++i)
    for (int b = 0; b < kColumnBytes; ++b) {
      int code[kPlanes];
      decode<layout>(tile[x.input[i] * kColumnBytes + b], code);
      for (int s = 0; s < kPlanes; ++s) out[s * kColumnBytes + b] += code[s] * x.value[i];
    }
}

int64_t dot_rounds(int64_t rounds) {
  volatile int8_t q = 3;
  volatile uint8_t code = 2;
  int32_t acc = 0;
  for (int64_t r = 0; r < rounds; ++r) acc += q * code;
  volatile int32_t keep = acc;
  static_cast<void>(keep);
  return rounds;
}

}  // namespace

Kernel scalar_kernel() {
  return {"scalar",
          quantize_row<float>,
          quantize_row<uint16_t>,
          relu2_gate,
          silu_gate,
          rms_norm,
          dot<float>,
          dot<uint16_t>,
          largest,
          sum_exponentials,
          {few_rows<Layout::kTernary2>, few_rows<Layout::kTernary16>, few_rows<Layout::kInt4>,
           few_rows<Layout::kInt8>},
          kMaxFewRows,
          4,  // activation rows up to which it streams
          {unpack_panel<Layout::kTernary2>, unpack_panel<Layout::kTernary16>,
           unpack_panel<Layout::kInt4>, unpack_panel<Layout::kInt8>},
          panel_product,
          panel_product,
          find_nonzero,
          {column_product<Layout::kTernary2>, column_product<Layout::kTernary16>, nullptr, nullptr},
          dot_rounds,
          read_all,
          1,   // row blocks of a panel
          4};  // activation rows of a panel product
}

}  // namespace bitjax
