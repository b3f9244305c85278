// Packed weights, format version 2: four layouts of 64-byte blocks.
//
// This file is the specification; bitjax/packing.py is its Python twin and both are tested on the
// same golden bytes. A change of any byte needs a new version number, never a build option.
//
// A weight matrix W [N rows = output features, K columns = input features] is stored as codes
// c = w + offset of small integers w, the same layout for a whole matrix:
//
//   layout      w           offset  planes  inputs a block  bits a weight
//   ternary2    -1..1       1       4       16              2
//   ternary1.6  -1..1       1       5       20              1.6
//   int4        -8..7       8       2       8               4 (+ 0.25 for multipliers)
//   int8        -127..127   128     1       4               8
//
//   buffer           uint8 [NB = ceil(N/16)] [KB] [64 bytes], no gaps, no header
//   inside a block   byte r*4 + j holds, for row nb*16 + r (r = 0..15) and each plane s, the code of
//                    input kb*(4*planes) + 4*s + j (j = 0..3):
//                      ternary2    at bits 2s and 2s+1; the value 3 is invalid
//                      ternary1.6  as digit s of a number in base 3, 0..242; 243..255 are invalid
//                      int4        at bits 4s..4s+3
//                      int8        the byte; the value 0 is invalid
//   KB               ceil(K / inputs a block); for int4 rounded up to a multiple of 4, whole groups
//   padding          rows and inputs beyond N and K hold weight 0 (code = offset)
//
// Dequantised, with float32 scales that MULTIPLY, one a tensor or one a row:
//   ternary2, ternary1.6, int8    W = w * scale
//   int4                          W = w * multiplier * scale, where uint8 multipliers 1..15
//                                 [NB] [KB/4] [16] hold one integer for each row and each group of
//                                 32 inputs. |w * multiplier| <= 120: int4 is a compressed int8.
//
// Columns: a ternary matrix once more, input by input, for products whose activations are mostly zero.
//   buffer           uint8 [T = ceil(N / (64 * planes))] [K] [64 bytes]
//   byte b of tile t and input k holds, for each plane s, the code of row t*64*planes + 64*s + b, as
//   above; rows beyond N hold weight 0
//
// Why so: the 4 bytes of a row meet 4 consecutive activations, which is the operand shape of the
// integer dot-product instructions of x86 and Arm. A 512-bit load is a block, a lane of 32 bits is a
// row, so no sum runs across lanes, and a plane is reached by a mask or a table, without shuffles.
#ifndef BITJAX_FFI_PACKED_FORMAT_H_
#define BITJAX_FFI_PACKED_FORMAT_H_

#include <cstdint>

namespace bitjax {

constexpr int kFormatVersion = 2;
constexpr int kBlockRows = 16;  // output features in a block
constexpr int kLaneBytes = 4;   // consecutive inputs of a plane
constexpr int kBlockBytes = kBlockRows * kLaneBytes;
static_assert(kBlockBytes == 64, "a block is one cache line and one 512-bit register");

enum class Layout : int { kTernary2 = 0, kTernary16 = 1, kInt4 = 2, kInt8 = 3 };
constexpr int kLayoutCount = 4;

struct LayoutSpec {
  const char* name;
  int planes;        // codes in a byte
  int offset;        // code of weight 0
  int group_blocks;  // blocks that share a multiplier; 0: no multipliers, any number of blocks

  constexpr int block_inputs() const { return planes * kLaneBytes; }
};

constexpr LayoutSpec kLayouts[kLayoutCount] = {
    {"ternary2", 4, 1, 0},
    {"ternary1.6", 5, 1, 0},
    {"int4", 2, 8, 4},
    {"int8", 1, 128, 0},
};

constexpr const LayoutSpec& spec(Layout layout) { return kLayouts[static_cast<int>(layout)]; }
static_assert(spec(Layout::kTernary2).block_inputs() == 16, "2 bits a weight");
static_assert(spec(Layout::kTernary16).block_inputs() == 20, "1.6 bits a weight");
static_assert(spec(Layout::kInt4).group_blocks * spec(Layout::kInt4).block_inputs() == 32,
              "a group is 32 inputs");

// Number of row blocks that cover n rows, and of input blocks that cover k inputs.
constexpr int64_t row_blocks_of(int64_t n) { return (n + kBlockRows - 1) / kBlockRows; }
constexpr int64_t input_blocks_of(Layout layout, int64_t k) {
  const int64_t unit = spec(layout).group_blocks == 0 ? 1 : spec(layout).group_blocks;
  const int64_t inputs = spec(layout).block_inputs() * unit;
  return (k + inputs - 1) / inputs * unit;
}

// Columns: bytes of an input in a tile, and the number of tiles that cover n rows.
constexpr int kColumnBytes = 64;
constexpr bool has_columns(Layout layout) {
  return layout == Layout::kTernary2 || layout == Layout::kTernary16;
}
constexpr int64_t column_tiles_of(Layout layout, int64_t n) {
  const int64_t rows = int64_t{kColumnBytes} * spec(layout).planes;
  return (n + rows - 1) / rows;
}
constexpr int kMaxTileRows = kColumnBytes * 5;

constexpr int kPowersOf3[5] = {1, 3, 9, 27, 81};

// The weight at (row, input), multiplier not applied. For invalid codes the kernels may find other
// weights than this, of no larger magnitude than the accumulator bound in kernel.h counts.
inline int decode_weight(Layout layout, const uint8_t* codes, int64_t row, int64_t input,
                         int64_t input_blocks) {
  const LayoutSpec& s = spec(layout);
  const int64_t block = row / kBlockRows * input_blocks + input / s.block_inputs();
  const int plane = static_cast<int>(input % s.block_inputs() / kLaneBytes);
  const int byte = codes[block * kBlockBytes + row % kBlockRows * kLaneBytes + input % kLaneBytes];
  switch (layout) {
    case Layout::kTernary2: return ((byte >> (2 * plane)) & 3) - s.offset;
    case Layout::kTernary16: return byte / kPowersOf3[plane] % 3 - s.offset;
    case Layout::kInt4: return ((byte >> (4 * plane)) & 15) - s.offset;
    default: return byte - s.offset;
  }
}

}  // namespace bitjax

#endif  // BITJAX_FFI_PACKED_FORMAT_H_
