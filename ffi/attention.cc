// Compiled once for each instruction set, with BITJAX_ATTENTION naming the function it defines and
// with contraction to fused multiply-adds allowed.

#include "attention.h"

#include "rows.h"

namespace bitjax {
namespace {

// Vectors of 16 that a row's accumulators take at once: 6 rows x 4 fill the 32 wide registers of
// AVX-512; elsewhere a vector is several registers.
#ifdef __AVX512F__
constexpr int kVectors = 4;
#else
constexpr int kVectors = 1;
#endif

constexpr float kLowest = -3.4028235e38F;

inline void load_vector(const float* p, Float16* v) { load_floats(p, v); }

inline void load_vector(const uint16_t* p, Float16* v) {
  typedef uint16_t Bits16 __attribute__((vector_size(32)));
  typedef uint32_t Bits32 __attribute__((vector_size(64)));
  Bits16 narrow;
  __builtin_memcpy(&narrow, p, sizeof narrow);
  const Bits32 wide = __builtin_convertvector(narrow, Bits32) << 16;
  __builtin_memcpy(v, &wide, sizeof *v);
}

inline float largest(const Float16& v) {
  float lane[kFloats];
  store_floats(lane, v);
  for (int half = kFloats / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] = lane[i] > lane[i + half] ? lane[i] : lane[i + half];
  return lane[0];
}

// score[i][0..64) = q_i . k_s of the slots from `slot` on.
template <typename T, int M>
inline void scores(const float* q, int h, const T* keys, int64_t slot, float (*score)[kStepSlots]) {
  for (int c = 0; c < kStepSlots / kKeyBlock; c += kVectors) {
    const T* k = keys + (slot / kKeyBlock + c) * h * kKeyBlock;
    Float16 acc[M][kVectors] = {};
    for (int d = 0; d < h; ++d) {
      Float16 key[kVectors];
      for (int v = 0; v < kVectors; ++v)
        load_vector(k + (static_cast<int64_t>(v) * h + d) * kKeyBlock, &key[v]);
      for (int i = 0; i < M; ++i)
        for (int v = 0; v < kVectors; ++v) acc[i][v] += q[i * h + d] * key[v];
    }
    for (int i = 0; i < M; ++i)
      for (int v = 0; v < kVectors; ++v) store_floats(score[i] + (c + v) * kKeyBlock, acc[i][v]);
  }
}

// out_i = out_i * keep_i + sum_s weight[i][s] v_s over `slots` slots, for V vectors of dimensions.
template <typename T, int M, int V>
inline void mix_vectors(const float (*weight)[kStepSlots], const float* keep, int h,
                        const T* values, int slots, float* out) {
  Float16 acc[M][V];
  for (int i = 0; i < M; ++i)
    for (int v = 0; v < V; ++v) {
      load_floats(out + i * h + v * kFloats, &acc[i][v]);
      acc[i][v] *= keep[i];
    }
  for (int s = 0; s < slots; ++s) {
    Float16 value[V];
    for (int v = 0; v < V; ++v)
      load_vector(values + static_cast<int64_t>(s) * h + v * kFloats, &value[v]);
    for (int i = 0; i < M; ++i)
      for (int v = 0; v < V; ++v) acc[i][v] += weight[i][s] * value[v];
  }
  for (int i = 0; i < M; ++i)
    for (int v = 0; v < V; ++v) store_floats(out + i * h + v * kFloats, acc[i][v]);
}

template <typename T, int M>
inline void mix(const float (*weight)[kStepSlots], const float* keep, int h, const T* values,
                int slots, float* out) {
  int d = 0;
  for (; d + kVectors * kFloats <= h; d += kVectors * kFloats)
    mix_vectors<T, M, kVectors>(weight, keep, h, values + d, slots, out + d);
  for (; d < h; d += kFloats) mix_vectors<T, M, 1>(weight, keep, h, values + d, slots, out + d);
}

template <typename T, int M>
void attend_rows(const float* q, const int64_t* position, int h, const T* keys, const T* values,
                 int64_t first, int64_t last, Partial* partial, float* out) {
  float score[M][kStepSlots];
  for (int i = 0; i < M; ++i) partial[i] = {kLowest, 0};
  for (int64_t i = 0; i < static_cast<int64_t>(M) * h; ++i) out[i] = 0;
  for (int64_t slot = first; slot < last; slot += kStepSlots) {
    scores<T, M>(q, h, keys, slot, score);
    float keep[M];
    for (int i = 0; i < M; ++i) {
      const int64_t visible = position[i] + 1 - slot;
      if (visible <= 0) {
        for (float& s : score[i]) s = 0;
        keep[i] = 1;
        continue;
      }
      for (int64_t s = visible; s < kStepSlots; ++s) score[i][s] = kLowest;
      Float16 step[kStepSlots / kFloats];
      Float16 top = {};
      Float16 poison = {};  // NaN if a score is NaN or infinite, else 0: comparisons lose NaNs
      for (int v = 0; v < kStepSlots / kFloats; ++v) {
        load_floats(score[i] + v * kFloats, &step[v]);
        if (v == 0) top = step[0];
        top = top > step[v] ? top : step[v];
        poison += step[v] * 0.0F;
      }
      const float seen = largest(top);
      const float maximum = seen > partial[i].maximum ? seen : partial[i].maximum;
      Float16 shrink = Float16{} + (partial[i].maximum - maximum);
      exponential(&shrink);
      keep[i] = partial[i].total == 0 ? 0 : shrink[0];
      Float16 sum = poison;
      for (int v = 0; v < kStepSlots / kFloats; ++v) {
        step[v] -= maximum;
        exponential(&step[v]);
        store_floats(score[i] + v * kFloats, step[v]);
      }
      for (int64_t s = visible; s < kStepSlots; ++s) score[i][s] = 0;
      for (int v = 0; v < kStepSlots / kFloats; ++v) {
        Float16 weight;
        load_floats(score[i] + v * kFloats, &weight);
        sum += weight;
      }
      partial[i].total = partial[i].total * keep[i] + fold(sum);
      partial[i].maximum = maximum;
    }
    const int64_t left = last - slot;
    mix<T, M>(score, keep, h, values + slot * h,
              static_cast<int>(left < kStepSlots ? left : kStepSlots), out);
  }
}

template <typename T>
void attend(const float* q, const int64_t* position, int m, int h, const T* keys, const T* values,
            int64_t first, int64_t last, Partial* partial, float* out) {
  switch (m) {
    case 1: return attend_rows<T, 1>(q, position, h, keys, values, first, last, partial, out);
    case 2: return attend_rows<T, 2>(q, position, h, keys, values, first, last, partial, out);
    case 3: return attend_rows<T, 3>(q, position, h, keys, values, first, last, partial, out);
    case 4: return attend_rows<T, 4>(q, position, h, keys, values, first, last, partial, out);
    case 5: return attend_rows<T, 5>(q, position, h, keys, values, first, last, partial, out);
    default: return attend_rows<T, 6>(q, position, h, keys, values, first, last, partial, out);
  }
}
static_assert(kAttentionRows == 6, "attend has a case for every number of rows");

}  // namespace

AttentionKernel BITJAX_ATTENTION() { return {attend<float>, attend<uint16_t>}; }

}  // namespace bitjax
