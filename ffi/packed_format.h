// Packed ternary weights, format version 1: "ternary 2-bit, 16x16 blocks".
//
// This file is the specification; bitjax/packing.py is its Python twin and both are tested on the
// same golden bytes. A change of any byte needs a new version number, never a build option.
//
// A weight matrix W [N rows = output features, K columns = input features] holds w in {-1, 0, +1}.
//   stored code      c = w + 1 in {0, 1, 2}; 3 is invalid and never written
//   dequantised      W = (c - 1) * w_scale, with one float32 w_scale per tensor, which MULTIPLIES
//   padding          N and K are padded up to multiples of 16 with code 1 (weight 0)
//   buffer           uint8 [NB = ceil(N/16)] [KB = ceil(K/16)] [64 bytes], no gaps, no header
//   inside a block   byte r*4 + j, bits 2s and 2s+1, hold the code of
//                      row    nb*16 + r          r = 0..15
//                      input  kb*16 + 4*s + j    s = 0..3 (the plane), j = 0..3
//
// Why so: the 4 bytes of a row meet 4 consecutive activations, which is the operand shape of the
// integer dot instructions (vpdpbusd, sdot), and the 16 rows fill one 512-bit register: no
// horizontal sums, no shuffles, one 64-byte cache line a block. Masking a plane in place leaves
// codes scaled by 4^s, so one row of activations needs no shifts until the very end.
#ifndef BITJAX_FFI_PACKED_FORMAT_H_
#define BITJAX_FFI_PACKED_FORMAT_H_

#include <cstdint>

namespace bitjax {

constexpr int kFormatVersion = 1;
constexpr int kBlockRows = 16;    // output features in a block
constexpr int kBlockInputs = 16;  // input features in a block
constexpr int kBitsPerCode = 2;
constexpr int kPlanes = 8 / kBitsPerCode;             // codes in a byte
constexpr int kPlaneInputs = kBlockInputs / kPlanes;  // consecutive inputs in one plane
constexpr int kBlockBytes = kBlockRows * kPlaneInputs;
constexpr uint8_t kCodeMask = (1 << kBitsPerCode) - 1;
constexpr uint8_t kPaddingCode = 1;     // weight 0
constexpr uint8_t kPaddingByte = 0x55;  // four padding codes

static_assert(kPlanes == 4, "a byte holds one code of each of four planes");
static_assert(kPlaneInputs == 4, "a plane is the 4-byte group of the integer dot instructions");
static_assert(kBlockBytes == 64, "a block is one cache line and one 512-bit register");
static_assert(kBlockBytes * 8 == kBlockRows * kBlockInputs * kBitsPerCode, "a block has no gaps");
static_assert(kPaddingByte == kPaddingCode * 0x55, "every plane of a padding byte is padding");

// Number of 16-wide blocks that cover n features.
constexpr int64_t blocks_of(int64_t n) { return (n + kBlockRows - 1) / kBlockRows; }
static_assert(kBlockRows == kBlockInputs, "blocks_of serves rows and inputs alike");

// Where one code lives: byte offset from the start of the buffer, and the shift inside that byte.
struct CodePosition {
  int64_t byte;
  int shift;
};

constexpr CodePosition code_position(int64_t row, int64_t input, int64_t input_blocks) {
  const int64_t block = (row / kBlockRows) * input_blocks + input / kBlockInputs;
  const int64_t r = row % kBlockRows;
  const int64_t s = input % kBlockInputs / kPlaneInputs;
  const int64_t j = input % kPlaneInputs;
  return {block * kBlockBytes + r * kPlaneInputs + j, static_cast<int>(s) * kBitsPerCode};
}

// The weight, -1, 0 or +1, at (row, input). The invalid code 3 decodes to 2.
inline int decode_weight(const uint8_t* codes, int64_t row, int64_t input, int64_t input_blocks) {
  const CodePosition at = code_position(row, input, input_blocks);
  return ((codes[at.byte] >> at.shift) & kCodeMask) - 1;
}

// Overwrites the code at (row, input) with that of weight w in {-1, 0, +1}.
inline void encode_weight(uint8_t* codes, int64_t row, int64_t input, int64_t input_blocks, int w) {
  const CodePosition at = code_position(row, input, input_blocks);
  const int cleared = codes[at.byte] & ~(kCodeMask << at.shift);
  codes[at.byte] = static_cast<uint8_t>(cleared | ((w + 1) << at.shift));
}

}  // namespace bitjax

#endif  // BITJAX_FFI_PACKED_FORMAT_H_
