// Draws the next token of a row of logits. A row's token depends on nothing but the row, its settings and
// its noise: sums run in a fixed order, on one thread.
//
//   l' = l / r if l > 0 else l * r             for the tokens listed as seen
//   l' - presence (c > 0) - frequency c + bias  c times in the text; a bias of -100 or less forbids
//   forbidden where the mask has no bit
//   p  = softmax(l' / temperature)
//   kept: the top_k likeliest; of them the smallest set whose probability reaches top_p; of them those
//         with p >= min_p max(p); the likeliest always
//   token: the first, in falling order of p (by token where nothing is filtered), at which the sum of p
//         exceeds u times all of it; u in (0, 1) is a hash of seed, sample and position
//
// Temperature 0 takes the largest l', of equals the lowest token. Log-probabilities are those of l.
#ifndef BITJAX_FFI_SAMPLING_H_
#define BITJAX_FFI_SAMPLING_H_

#include <cstdint>

#include "kernel.h"

namespace bitjax {

// A token whose logit is changed.
struct Edit {
  float seen;   // 0 or 1: whether the repetition penalty concerns it
  float count;  // in the text so far, without the prompt
  float bias;
};

struct SampleRow {
  const float* logits;  // [V]
  float temperature, top_p, min_p, repetition, presence, frequency;
  int64_t top_k;       // 0: all
  uint64_t seed, sample, position;
  const int32_t* tokens;  // of the edits
  const Edit* edits;
  int64_t edit_count;
  const uint32_t* mask;  // a bit for each token, the lowest first; null: all are allowed
};

// What was drawn; token -1 if no token is allowed, -2 if logits are not finite.
struct Drawn {
  int32_t token;
  float logprob;
};

// The likeliest `count` tokens in falling order, with their log-probabilities.
Drawn sample_row(const Kernel& kernel, const SampleRow& row, int64_t vocabulary, int64_t count,
                 int32_t* top_tokens, float* top_logprobs, bool wants_logprob);

// In (0, 1), 52 bits.
double noise(uint64_t seed, uint64_t sample, uint64_t position);

}  // namespace bitjax

#endif  // BITJAX_FFI_SAMPLING_H_
