// Causal grouped-query attention of a training step, forward and backward, one definition compiled for
// several instruction sets. All float32.
//
// The heads of a token lie together, [tokens][H + 2G][h]: H of queries, then G of keys, G of values.
//   q' = turn(q) / sqrt(h), k' = turn(k)             rotary positions, half-split (arXiv 2104.09864)
//   p[q, s] = e^(q'[q] . k'[s] - maximum[q]) / total[q]      for s <= q of the same segment, else 0
//   out[q]  = sum_s p[q, s] v[s]
// Backward, from d[q] = the gradient of out[q], p computed again from the rows' maxima and totals:
//   dv[s]   = sum_q p[q, s] d[q]
//   e[q, s] = p[q, s] (d[q] . v[s] - d[q] . out[q])
//   dk'[s]  = sum_q e[q, s] q'[q];    dq'[q] = sum_s e[q, s] k'[s];     then turned back
// Source: FlashAttention (arXiv 2205.14135, 2307.08691), by blocks of 64 queries and 64 keys, of which
// only those up to the diagonal are computed. Scores lie transposed, [key][query]: softmax then runs
// along lanes and never across them, and what must be transposed is the queries, once a block.
//
// Results depend on the operands alone, not on which thread computes what. A NaN or infinite score
// makes its query's row NaN; a NaN value reaches the queries of its block too. Kernels
// differ from each other by float32 rounding.
#ifndef BITJAX_FFI_TRAINING_ATTENTION_H_
#define BITJAX_FFI_TRAINING_ATTENTION_H_

#include <cstdint>

#include "attention.h"

namespace bitjax {

constexpr int kAttentionBlock = 64;  // queries, and keys, of a block

// One head of queries of one sequence, and the head of keys and values it reads.
struct TrainingHead {
  const float* q;  // of token 0, as k and v
  const float* k;
  const float* v;
  int64_t stride;           // floats from token to token
  const float* turn;        // [tokens][h], cosines, then sines
  const int32_t* segments;  // [tokens]; null: all are of one
  int64_t tokens;
  int h;  // a multiple of 16, kMaxHeadDim at most
};

// Floats of the memory that a call works in.
constexpr int64_t training_attention_scratch(int64_t h) {
  return 6 * kAttentionBlock * h + 2 * kAttentionBlock * kAttentionBlock;
}

struct TrainingAttentionKernel {
  // The block of queries from `first` on, a multiple of kAttentionBlock: writes out [n][h] (of
  // out_stride; out is that of token `first`) and maximum and total [n].
  void (*forward)(const TrainingHead& head, int64_t first, float* out, int64_t out_stride,
                  float* maximum, float* total, float* scratch);

  // The same block backward; out, d_out, maximum, total and dq (of head.stride) are those of token
  // `first`. Writes dq, turned back; adds to dk and dv (of token 0, kv_stride) of tokens up to the
  // block's end, dk not yet turned back; those of the block itself are written if they are fresh.
  void (*backward)(const TrainingHead& head, int64_t first, const float* out, const float* d_out,
                   int64_t out_stride, const float* maximum, const float* total, float* dq,
                   float* dk, float* dv, int64_t kv_stride, bool fresh, float* scratch);

  // y[r] = the sum of rows r of `count` parts (part_stride floats apart, rows x_stride), turned back
  // unless turn is null; y may be the only part.
  void (*finish)(const float* x, int64_t x_stride, int64_t count, int64_t part_stride, int64_t rows,
                 int h, const float* turn, float* y, int64_t y_stride);
};

// Compiled from training_attention.cc.
TrainingAttentionKernel scalar_training_attention();
TrainingAttentionKernel avx2_training_attention();
TrainingAttentionKernel avx512vnni_training_attention();
TrainingAttentionKernel neon_training_attention();

}  // namespace bitjax

#endif  // BITJAX_FFI_TRAINING_ATTENTION_H_
