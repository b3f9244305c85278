// Causal grouped-query attention over a KV cache, one definition compiled for every instruction set.
//
//   out_r = sum_s softmax_s(q_r . k_s) v_s      over the slots s <= position of row r
//
// Rows are the queries that share a key head: all tokens times the query heads of the group. Keys lie
// in blocks of 16 slots, so that a vector holds one dimension of 16 keys and no sum runs across
// lanes; values lie slot by slot, a vector holding 16 dimensions of one.
//
//   keys     T [S/16][h][16]        slot s, dimension d at ((s/16)*h + d)*16 + s%16
//   values   T [S][h]
//
// The softmax is computed on line over blocks of 64 slots; splits of kSplitSlots slots are summed
// apart and then joined in order. A row's result depends on nothing but its query, its position and
// the cache: not on the rows beside it, the number of threads or the tiling (as long as values are
// finite: a NaN value reaches all rows of the tiles that read its slot). Kernels differ from each
// other by float32 rounding, for they contract to fused multiply-adds where there are any.
#ifndef BITJAX_FFI_ATTENTION_H_
#define BITJAX_FFI_ATTENTION_H_

#include <cstdint>

namespace bitjax {

constexpr int kKeyBlock = 16;       // slots of a key block
constexpr int kStepSlots = 64;      // slots between two updates of the running maximum
constexpr int kSplitSlots = 1024;   // slots that one thread sums before anything is joined
constexpr int kAttentionRows = 6;   // rows of a tile, at most
constexpr int kMaxHeadDim = 512;
static_assert(kSplitSlots % kStepSlots == 0 && kStepSlots % kKeyBlock == 0, "whole steps");

// What a split of slots gives to one row: sum_s e^(score - maximum) and the same sum times v_s.
// A split without visible slots has total 0.
struct Partial {
  float maximum;
  float total;
};

// Attention of m rows over the slots [first, last) of one key head; first is a multiple of
// kSplitSlots. q [m][h] is scaled already; row i sees slots up to position[i]; partial [m] and
// out [m][h] are written. 1 <= m <= kAttentionRows, h a multiple of 16 up to kMaxHeadDim.
template <typename T>
using Attend = void (*)(const float* q, const int64_t* position, int m, int h, const T* keys,
                        const T* values, int64_t first, int64_t last, Partial* partial, float* out);

struct AttentionKernel {
  Attend<float> attend_f32;
  Attend<uint16_t> attend_bf16;  // bfloat16 as its bits
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
