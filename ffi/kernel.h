// The contract every instruction-set kernel fulfils, bit for bit.
//
// Activations, one token at a time (x of length K, float32; bfloat16 is widened exactly):
//   amax    = max(max_k |x_k|, 1e-5)
//   q_k     = clip(round_half_even(x_k * (127 / amax)), -128, 127)      int8
//   x_scale = amax * (1 / 127)                                           dequant(x) = q * x_scale
// Product with packed weights of code c = w + offset (packed_format.h):
//   acc_n   = sum_k q_k * w_nk = sum_k q_k * c_nk - offset * sum_k q_k    exact int32
// and for int4, whose groups g of 32 inputs have multipliers m_ng:
//   acc_n   = sum_g m_ng * sum_{k in g} q_k * w_nk                        exact int32
// The final scaling is not a kernel's business: epilogue.h does it once for all of them.
//
// A few rows of activations are multiplied with the packed codes as they stream by. Many rows are
// taken a few at a time, if the instruction set unpacks codes beside the products; otherwise a panel
// of codes is unpacked once, to one byte a weight, and meets all rows from the cache.
//
// Kernels see raw pointers and sizes, allocate nothing, throw nothing, keep no state, and read and
// write only the bytes named here. No pointer needs more than its element type's alignment.
#ifndef BITJAX_FFI_KERNEL_H_
#define BITJAX_FFI_KERNEL_H_

#include <cstdint>

#include "packed_format.h"

namespace bitjax {

// Largest K. Every int32 accumulator is exact for any int8 activations and any bytes as codes:
//   ternary2 masked in place, scaled by 64:  4 * 192 * 128 an input block of 16    6144 an input
//   ternary1.6, digit 4 scaled by 81:        4 * 162 * 128 an input block of 20    4148 an input
//   int4, times multipliers up to 255:       8 * 128 * 255                       261120 an input
//   int8:                                    255 * 128                            32640 an input
// so 2^18 inputs of ternary (1.61e9 < 2^31), 2^16 of int8 (2.14e9 < 2^31). For int4 valid
// multipliers are at most 15 (15360 an input), and valid weights at most 120 after multiplying.
// Kernels that sum in int16 first do so over spans that are exact for the codes of valid bytes and
// for ternary2's value 3; other bytes that stand for no weight may wrap there, within these bounds.
constexpr int64_t max_inputs(Layout layout) {
  return layout == Layout::kTernary2 || layout == Layout::kTernary16 ? int64_t{1} << 18
                                                                    : int64_t{1} << 16;
}
static_assert(max_inputs(Layout::kTernary2) * 6144 < (int64_t{1} << 31), "int32 suffices");
static_assert(max_inputs(Layout::kInt8) * 32640 < (int64_t{1} << 31), "int32 suffices");
static_assert(max_inputs(Layout::kInt4) * 15360 < (int64_t{1} << 31), "int32 suffices");

// Activation rows are padded with zeros to a multiple of this, which whole vectors of every
// instruction set and whole input blocks of every layout then fit: see padded_inputs().
constexpr int64_t kRowPadding = 64;
constexpr int64_t padded_inputs(Layout layout, int64_t k) {
  const int64_t inputs = input_blocks_of(layout, k) * spec(layout).block_inputs();
  return (inputs + kRowPadding - 1) / kRowPadding * kRowPadding;
}

// Most rows that any kernel's few_rows() takes.
constexpr int kMaxFewRows = 8;

// The activations' smallest amax and their quantisation range.
constexpr float kMinAmax = 1e-5F;
constexpr float kQuantMax = 127.0F;
// A product, not a division: XLA compiles the reference's division by a constant to this product.
constexpr float kInverseQuantMax = 1.0F / kQuantMax;

// Quantises x [k] to q [k_padded], writes zeros to q[k..k_padded), and returns x_scale. k_padded is
// a multiple of kRowPadding, at least k. A row that holds NaN or an infinity gets q = 0 and x_scale = NaN,
// which makes every output of the row NaN.
template <typename T>
using QuantizeRow = void (*)(const T* x, int64_t k, int64_t k_padded, int8_t* q, float* x_scale);

// What may precede quantisation, in float32 (rows.h): a gate joins two halves of a row of 2k values
// to k, a norm scales k values. Results need not be the same as XLA's to the last bit, but every
// kernel gives the same.
enum class Gate : int { kNone = 0, kRelu2 = 1, kSilu = 2 };
using GateRow = void (*)(const float* x, int64_t k, float* y);
using NormRow = void (*)(const float* x, int64_t k, const float* scale, float eps, float* y);

// Packed rows: row_blocks consecutive row blocks of a matrix.
struct PackedRows {
  const uint8_t* codes;        // row_blocks * input_blocks blocks of 64 bytes
  const uint8_t* multipliers;  // int4: row_blocks * input_blocks/4 groups of 16 bytes; else null
  int64_t input_blocks;        // of a row block
  int row_blocks;
};

// Activation rows for few_rows().
struct FewActivations {
  const int8_t* q;            // m rows of at least input_blocks * block_inputs values
  int64_t q_stride;           // values from row to row
  const int32_t* group_sums;  // int4: m rows of the sums of q over each group of 32; else unused
  int64_t group_stride;
  int m;                      // 1..Kernel::few_rows_limit
};

// out[i * out_stride + n] = sum_k q[i][k] * (w_nk + few_rows_offset), for n < row_blocks*16, with
// w_nk times its multiplier for int4.
using FewRows = void (*)(const PackedRows& weights, const FewActivations& rows, int32_t* out,
                         int64_t out_stride);
constexpr int few_rows_offset(Layout layout) {
  return layout == Layout::kInt4 ? 0 : spec(layout).offset;
}

// Unpacks input blocks [first, last) of the rows to bytes w * multiplier + panel_offset, for a panel
// of `panel_blocks` row blocks:
//   panel[((kb - first) * planes + s) * panel_blocks*64 + row*4 + j],   row < row_blocks*16
// Rows of the panel beyond row_blocks are left as they are.
using UnpackPanel = void (*)(const PackedRows& weights, int64_t first, int64_t last,
                             uint8_t* panel);

constexpr int panel_offset(Layout layout) {
  return layout == Layout::kInt4 ? 128 : spec(layout).offset;
}

// Adds to acc[i * panel_blocks*16 + n] the sum over `groups` groups of four inputs g of
// q[i*q_stride + 4g + j] * panel[g * panel_blocks*64 + n*4 + j], for i < m, 1 <= m <= tile_rows.
// Panel bytes are at most 3 for the ternary form, any for the other.
using PanelProduct = void (*)(const uint8_t* panel, int64_t groups, const int8_t* q,
                              int64_t q_stride, int m, int32_t* acc);

// Non-zero activations of a row, in any order; count is a multiple of 4, filled up with zeros.
struct SparseRow {
  const int32_t* input;  // position of each
  const int8_t* value;
  int64_t count;
};

// Lists the non-zero values of q [k], k a multiple of kRowPadding; returns how many there are. `input` and
// `value` have room for k and may be written to the end; entries from the last to the next multiple of
// 4 are of value 0 and input 0.
using FindNonZero = int64_t (*)(const int8_t* q, int64_t k, int32_t* input, int8_t* value);

// out[n] = sum_i value_i * (w_n,input_i + offset) for the 64 * planes rows n of a tile of columns
// [k][64], 0 <= input_i < k. May ask for, but does not read, what follows the tile.
using ColumnProduct = void (*)(const uint8_t* tile, int64_t k, const SparseRow& x, int32_t* out);

// sum_i x_i w_i of k values, w in float32 or bfloat16, in float32 and in an order that every kernel
// keeps (rows.h): each value passes through at most k + 8 roundings.
template <typename W>
using Dot = float (*)(const float* x, const W* w, int64_t k);

// The largest of n > 0 values, NaN if one is NaN or infinite; and the sum of e^((x_i - most) * scale), in 16 sums of every
// sixteenth value, folded in halves (rows.h).
using LargestOf = float (*)(const float* x, int64_t n);
using SumExponentials = float (*)(const float* x, int64_t n, float most, float scale);

// For measuring the machine: `rounds` rounds of independent dot products in registers, returning how
// many multiply-adds they were; and a read of n bytes, returning something that depends on all.
using DotRounds = int64_t (*)(int64_t rounds);
using ReadAll = uint64_t (*)(const uint8_t* p, int64_t n);

constexpr int kMaxPanelBlocks = 4;  // row blocks of a panel, at most; 1, 2 or 4

struct Kernel {
  const char* name;
  QuantizeRow<float> quantize_f32;
  QuantizeRow<uint16_t> quantize_bf16;  // bfloat16 as its bits
  GateRow relu2_gate;
  GateRow silu_gate;
  NormRow rms_norm;
  Dot<float> dot_f32;
  Dot<uint16_t> dot_bf16;
  LargestOf largest;
  SumExponentials sum_exponentials;
  FewRows few_rows[kLayoutCount];
  int few_rows_limit;        // activation rows of few_rows(), at most kMaxFewRows
  int64_t streamed_rows;     // activation rows up to which few_rows() beats panels
  UnpackPanel unpack_panel[kLayoutCount];
  PanelProduct ternary_panel;  // panel bytes of the ternary layouts
  PanelProduct byte_panel;     // of int4 and int8
  FindNonZero find_nonzero;      // null, and so are column_product, where skipping zeros does not pay
  ColumnProduct column_product[kLayoutCount];  // null for int4 and int8
  DotRounds dot_rounds;
  ReadAll read_all;
  int panel_blocks;            // row blocks of a panel
  int tile_rows;               // activation rows of a panel product, at most
};

// One for each file kernels_<name>.cc; which of them are linked is the build's choice.
Kernel scalar_kernel();
Kernel avx2_kernel();
Kernel avxvnni_kernel();
Kernel avx512vnni_kernel();
Kernel avx512vbmi_kernel();
Kernel neon_kernel();
Kernel dotprod_kernel();
Kernel i8mm_kernel();

}  // namespace bitjax

#endif  // BITJAX_FFI_KERNEL_H_
