// Products with mostly zero activations: weights input by input, those of zeros never read.
//
// Four inputs at a time: their bytes are interleaved, so that a 32-bit lane holds one output's four
// codes for each plane, and meet four activations in a dot product like any other. All sums of a tile
// stay in registers, 4 vectors times planes; that takes an instruction set with 32 of them.
//
//   Isa::interleave(c)   bytes of four vectors c0..c3 to lanes c0[b] c1[b] c2[b] c3[b], in place: lane
//                        4h + i of vector v has b = 16h + 4v + i
#ifndef BITJAX_FFI_COLUMNS_H_
#define BITJAX_FFI_COLUMNS_H_

#include <cstdint>

#include "kernel.h"
#include "products.h"

namespace bitjax {

// Inputs that codes are asked for ahead of the products.
constexpr int64_t kPrefetchInputs = 64;

template <class Isa, template <class> class L>
void column_product(const uint8_t* tile, int64_t k, const SparseRow& x, int32_t* out) {
  using Lay = L<Isa>;
  using Dot = typename Isa::template Dot<Lay::kMaxCode>;
  constexpr int P = Lay::kPlanes;
  static_assert(Isa::kLanes == kBlockRows, "a vector is a column of a tile");
  typename Isa::Sums acc[4][P];
  for (int v = 0; v < 4; ++v)
    for (int s = 0; s < P; ++s) acc[v][s] = Isa::splat32(0);
  for (int64_t i = 0; i < x.count; i += 4) {
    // What comes next, in this tile or, with the same inputs, in the one that follows.
    for (int64_t j = i + kPrefetchInputs; j < i + kPrefetchInputs + 4; ++j) {
      const int64_t input = j < x.count       ? x.input[j]
                            : j < 2 * x.count ? k + x.input[j - x.count]
                                              : 0;
      prefetch_once(tile + input * kColumnBytes);
    }
    typename Isa::Bytes c[4];
    for (int j = 0; j < 4; ++j) c[j] = Isa::load(tile + x.input[i + j] * kColumnBytes);
    Isa::interleave(c);
    const int32_t group = four_activations(x.value + i);
    for (int v = 0; v < 4; ++v) {
      typename Isa::Bytes plane[P];
      Lay::scaled(c[v], plane);
      for (int s = 0; s < P; ++s) acc[v][s] = Dot::dot(acc[v][s], plane[s], group);
    }
  }
  for (int s = 0; s < P; ++s)
    for (int v = 0; v < 4; ++v) {
      // unscale() adds planes up; here they are outputs of their own.
      int32_t lane[kBlockRows];
      Isa::store_sums(lane, Lay::unscale_plane(acc[v][s], s));
      for (int n = 0; n < kBlockRows; ++n)
        out[s * kColumnBytes + n / 4 * 16 + 4 * v + n % 4] = lane[n];
    }
}

}  // namespace bitjax

#endif  // BITJAX_FFI_COLUMNS_H_
