// The products of a training step with ternary weights, forward and backward.
//
// Forward, for x [M, K] and codes w [N, K] in {-1, 0, 1} with scales s_w [N]:
//   q, s_x  = quantise(x)                           int8, a row at a time: kernel.h
//   y[m, n] = float(sum_k q[m, k] w[n, k]) * (s_x[m] * s_w[n])          an exact integer, scaled
// Backward, for the gradient dy [M, N], straight through the quantisation of x:
//   dx[m, k] = sum_n bf16(dy[m, n] * s_w[n]) * w[n, k]
//   dw[n, k] = sum_m bf16(dy[m, n] * s_x[m]) * q[m, k]     of w * s_w, hence of the master weights
// Codes and q are exact in bfloat16: backward, the rounding of dy (to nearest even) is the only one
// but float32 sums, whose order is not fixed. Subnormal numbers may count as zero.
//
// All three are products of 32-bit groups, four bytes or two bfloat16 values of the depth (what is
// summed over), and share one tiling. Their second factor is packed in panels of kPanelColumns
// columns, panel[group][column]; of the first, groups are read one by one from anywhere.
#ifndef BITJAX_FFI_TRAINING_H_
#define BITJAX_FFI_TRAINING_H_

#include <cstdint>

namespace bitjax {

// Columns of a panel: four vectors, which with six rows fill 24 of 32 registers with sums.
constexpr int64_t kPanelColumns = 64;
// Rows of the first factor in a strip, when depth leads in memory: whole tiles and whole vectors.
constexpr int64_t kStripRows = 48;
constexpr int64_t kGroupBytes = 4;

constexpr int64_t whole(int64_t n, int64_t of) { return (n + of - 1) / of; }

// Groups of the first factor: row r's g-th at first + r * row + g * group, in bytes. Rows are less
// than kStripRows when strips follow each other.
struct Groups {
  const uint8_t* first;
  int64_t row, group;
};

// A part of the result, `rows` times at most kPanelColumns.
struct Tile {
  float* out;
  int64_t stride;  // values from row to row
  int64_t rows, columns;
};

struct TrainingKernel {
  // Packs codes w, float32 [n, k] of which n <= kPanelColumns, as bytes w + 1, four a group, zeros
  // beyond n and k: panel [ceil(k/4)][kPanelColumns][4].
  void (*pack_codes)(const float* w, int64_t n, int64_t k, uint8_t* panel);

  // Packs `columns` <= width columns of `depth` rows of `stride` values, times a scale for each row
  // unless that is null, as bfloat16: packed [ceil(depth/2)][width][2], zeros beyond. width is a
  // multiple of 16.
  void (*pack_floats)(const float* x, const float* scale, int64_t depth, int64_t stride,
                      int64_t columns, int64_t width, uint16_t* packed);
  void (*pack_bytes)(const int8_t* x, int64_t depth, int64_t stride, int64_t columns, int64_t width,
                     uint16_t* packed);

  // bf16(x[i] * scale[i]), i < n; a zero at y[n] if n is odd.
  void (*round_row)(const float* x, const float* scale, int64_t n, uint16_t* y);

  // Sum of k int8 values.
  int32_t (*sum)(const int8_t* q, int64_t k);

  // out[m, n] = float(sum - sums[m]) * (x_scale[m] * w_scale[n]), over all groups of bytes.
  void (*integer_tile)(const Groups& q, const uint8_t* panel, int64_t groups, const int32_t* sums,
                       const float* x_scale, const float* w_scale, const Tile& tile);

  // out[m, n] = or += the sum over groups of pairs of bfloat16.
  void (*float_tile)(const Groups& x, const uint8_t* panel, int64_t groups, bool add,
                     const Tile& tile);
};

// Null where the processor lacks AVX-512 F, BW, VL, VNNI or BF16.
const TrainingKernel* training_kernel();

#ifdef BITJAX_HAVE_AVX512BF16
TrainingKernel avx512bf16_training();
#endif

}  // namespace bitjax

#endif  // BITJAX_FFI_TRAINING_H_
