// Causal grouped-query attention over a KV cache, one definition compiled for every instruction set.
//
//   out_r = sum_s softmax_s(q_r . k_s) v_s      over the slots s <= position of row r
//
// Rows are the queries that share a key head: all tokens times the query heads of the group. Keys lie
// in blocks of 64 slots, so that a vector holds one dimension of several keys and no sum runs across
// lanes; values lie slot by slot, a vector holding several dimensions of one. Both are read from
// front to back. In an int8 cache two neighbours lie together, as dot products take them: two
// dimensions of a key, two slots of values; cache_int8.h defines its codes and scales.
//
//   keys     T [S/64][h][64]            slot s, dimension d at ((s/64)*h + d)*64 + s%64
//   values   T [S][h]
//   keys     int8 [S/64][h/2][64][2]    slot s, dimension d at (((s/64)*h/2 + d/2)*64 + s%64)*2 + d%2
//   values   int8 [S/2][h][2]           slot s, dimension d at ((s/2)*h + d)*2 + s%2
//   scales   bfloat16 [2][S]            of keys, of values
//
// Blocks of 64 slots lie one behind the other, or wherever a table of pages says.
//
// Slots are taken in splits of 1024, which are joined in order: within one the scores come first, then
// their softmax, then the mix. A row's result depends on nothing but its query, its position and
// the cache: not on the rows beside it, the number of threads or the tiling (as long as values are
// finite: a NaN value reaches all rows of the tiles that read its slot). Kernels differ from each
// other by float32 rounding, for they contract to fused multiply-adds where there are any.
//
// Over an int8 cache the products are exact integers of int16 codes: a query's, rounded to 15 bits and
// a sign by its largest element, and those of weight times value scale, rounded to 15 bits by
// the largest of 64 slots. A score is then off by max|q| / 65534 * sum |k|, and what 64 slots add to
// the result by max(weight * scale) / 65534 * sum |code|: 1/500 of the cache's own rounding, or less,
// where one slot prevails.
#ifndef BITJAX_FFI_ATTENTION_H_
#define BITJAX_FFI_ATTENTION_H_

#include <cstdint>

namespace bitjax {

constexpr int kStepSlots = 64;      // slots of a key block, and of a step of the kernels
constexpr int kSplitSlots = 1024;   // slots that one thread sums before anything is joined
constexpr int kAttentionRows = 6;   // rows of a tile, at most
constexpr int kMaxHeadDim = 512;
static_assert(kSplitSlots % kStepSlots == 0, "whole steps");

// What a split of slots gives to one row: sum_s e^(score - maximum) and the same sum times v_s.
// A split without visible slots has total 0.
struct Partial {
  float maximum;
  float total;
};

// Where the blocks of 64 slots of one key head lie: one behind the other, or at page[n] * stride.
struct PagedBlocks {
  const int32_t* page = nullptr;  // of each block; null: one behind the other
  int64_t count = 0;              // of pages
  int64_t stride = 0;             // elements of keys, and of values, from page to page

  // First element of the slot's block, which starts at a multiple of 64; h dimensions.
  int64_t at(int64_t slot, int64_t h) const {
    return page == nullptr ? slot * h : page[slot / kStepSlots] * stride;
  }
  // Of the block that is read next, or this one again where no other follows.
  int64_t after(int64_t slot, int64_t h) const {
    if (page == nullptr) return (slot + kStepSlots) * h;
    const int64_t n = slot / kStepSlots;
    return page[n + 1 < count ? n + 1 : n] * stride;
  }
};

// One key head of a sequence's cache, from slot 0 on: float32, bfloat16 as its bits, or int8.
template <typename T>
struct HeadCache {
  const T* keys;
  const T* values;
  PagedBlocks blocks = {};
};

template <>
struct HeadCache<int8_t> {
  const int8_t* keys;
  const int8_t* values;
  const uint16_t* key_scale;    // bfloat16, one for each slot
  const uint16_t* value_scale;
  PagedBlocks blocks = {};
  int64_t scale_stride = 0;  // from page to page

  int64_t scale_at(int64_t slot) const {
    return blocks.page == nullptr ? slot : blocks.page[slot / kStepSlots] * scale_stride;
  }
};

// Attention of m rows over the slots [first, last) of one key head; first is a multiple of
// kSplitSlots and last - first at most that. q [m][h] is scaled already; row i sees slots up to
// position[i]; partial [m] and out [m][h] are written. 1 <= m <= kAttentionRows, h a multiple of 16
// up to kMaxHeadDim.
template <typename T>
using Attend = void (*)(const float* q, const int64_t* position, int m, int h,
                        const HeadCache<T>& cache, int64_t first, int64_t last, Partial* partial,
                        float* out);

struct AttentionKernel {
  Attend<float> attend_f32;
  Attend<uint16_t> attend_bf16;
  Attend<int8_t> attend_int8;
};

// One for each kernels_<name>.cc, compiled from attention.cc.
AttentionKernel scalar_attention();
AttentionKernel avx2_attention();
AttentionKernel avxvnni_attention();
AttentionKernel avx512vnni_attention();
AttentionKernel avx512vbmi_attention();
AttentionKernel neon_attention();
AttentionKernel dotprod_attention();
AttentionKernel i8mm_attention();

}  // namespace bitjax

#endif  // BITJAX_FFI_ATTENTION_H_
