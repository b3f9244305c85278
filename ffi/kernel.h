// The contract every instruction-set kernel fulfils, bit for bit.
//
// Activations, one token at a time (x of length K, float32; bfloat16 is widened exactly):
//   amax    = max(max_k |x_k|, 1e-5)
//   q_k     = clip(round_half_even(x_k * (127 / amax)), -128, 127)      int8
//   x_scale = amax * (1 / 127)                                           dequant(x) = q * x_scale
// Product with packed weights of code c = w + 1 (packed_format.h):
//   acc_n   = sum_k q_k * w_nk = sum_k q_k * c_nk - sum_k q_k            exact int32
// The final scaling is not a kernel's business: epilogue.h does it once for all of them.
//
// Kernels see raw pointers and sizes, allocate nothing, throw nothing, keep no state, and read and
// write only the bytes named here. No pointer needs more than its element type's alignment.
#ifndef BITJAX_FFI_KERNEL_H_
#define BITJAX_FFI_KERNEL_H_

#include <cstdint>

#include "packed_format.h"

namespace bitjax {

// Largest K. The tightest int32 accumulator holds plane 3 of the unshifted form, codes scaled by
// 64: a block adds at most 4 * (3 * 64) * 128 = 98304 in magnitude (code 3 and activation -128
// counted, so that even invalid bytes cannot wrap). 2^18 / 16 blocks * 98304 = 1.61e9 < 2^31.
constexpr int64_t kMaxInputs = int64_t{1} << 18;
static_assert(kMaxInputs / kBlockInputs * (kPlaneInputs * 3 * 64 * 128) < (int64_t{1} << 31),
              "the unshifted plane accumulators must fit int32");

// A tile's activation rows: 8 int32x16 accumulators, 4 decoded planes and a broadcast register fit
// the 16 registers of AVX2 as well, and 8 independent chains hide a dot product's 4-5 cycles.
constexpr int kMaxTileRows = 8;

// A tile's weight row blocks: 8 rows * 128 outputs * 4 bytes = 4 KiB of results, which stay in L1.
constexpr int kMaxTileBlocks = 8;

// The activations' smallest amax and their quantisation range.
constexpr float kMinAmax = 1e-5F;
constexpr float kQuantMax = 127.0F;
// A product, not a division: XLA compiles the reference's division by a constant to this product.
constexpr float kInverseQuantMax = 1.0F / kQuantMax;

// Quantises x [k] to q [k_padded], writes zeros to q[k..k_padded), and returns x_scale and the sum
// of q. k_padded is the multiple of 16 at or above k. A row that holds NaN or an infinity gets q =
// 0 and x_scale = NaN, which makes every output of the row NaN.
template <typename T>
using QuantizeRow = void (*)(const T* x, int64_t k, int64_t k_padded, int8_t* q, float* x_scale,
                             int32_t* q_sum);

// out[i * row_blocks*16 + n] = sum_k q[i * q_stride + k] * w[n][k], for i < m, n < row_blocks*16.
//   codes   row_blocks * input_blocks blocks of 64 bytes, one row block after the other
//   q       m rows of 16 * input_blocks activations, q_stride values apart
//   q_sum   the sum of each row of q
// 0 <= m <= kMaxTileRows, 0 <= row_blocks <= kMaxTileBlocks, 16 * input_blocks <= kMaxInputs.
using TileProduct = void (*)(const uint8_t* codes, int64_t input_blocks, int row_blocks,
                             const int8_t* q, int64_t q_stride, const int32_t* q_sum, int m,
                             int32_t* out);

struct Kernel {
  const char* name;
  QuantizeRow<float> quantize_f32;
  QuantizeRow<uint16_t> quantize_bf16;  // bfloat16 as its bits
  TileProduct tile_product;
};

// One for each file kernels_<name>.cc; which of them are linked is the build's choice.
Kernel scalar_kernel();
Kernel avx2_kernel();
Kernel avxvnni_kernel();
Kernel avx512vnni_kernel();
Kernel neon_kernel();

}  // namespace bitjax

#endif  // BITJAX_FFI_KERNEL_H_
