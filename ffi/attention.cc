// Compiled once for each instruction set, with BITJAX_ATTENTION naming the function it defines and
// with contraction to fused multiply-adds allowed.

#include "attention.h"

#ifdef __AVX2__
#include <immintrin.h>
#endif

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

// How far ahead memory is asked for: two of its pages, for the hardware's own prefetcher stops at the end of
// one. Past the end of a split lies what its thread reads next.
constexpr int kPrefetchBytes = 8192;
constexpr int kLine = 64;  // bytes of a cache line, one request each

inline void prefetch(const void* p, int count) {
  for (int i = 0; i < count; i += kLine) __builtin_prefetch(static_cast<const char*>(p) + i);
}

// What will be read kPrefetchBytes after an element of a block (a block's length after it, if that is
// less): an element of this block or of the one that is read next.
template <typename T>
class Ahead {
 public:
  Ahead(const T* block, const T* next, int64_t elements)
      : distance_(elements < kFar ? elements : kFar),
        rest_(elements - distance_),
        here_(block + distance_),
        next_(next - rest_) {}
  const T* operator()(int64_t element) const { return (element < rest_ ? here_ : next_) + element; }

 private:
  static constexpr int64_t kFar = kPrefetchBytes / static_cast<int64_t>(sizeof(T));
  const int64_t distance_, rest_;
  const T* const here_;
  const T* const next_;
};

template <typename T>
Ahead<T> ahead_of(const T* all, const PagedBlocks& blocks, int64_t slot, int64_t h) {
  return {all + blocks.at(slot, h), all + blocks.after(slot, h), kStepSlots * h};
}

using Shorts32 = Vector<int16_t>;

inline void load_vector(const float* p, Float16* v) { load_floats(p, v); }
inline void load_vector(const uint16_t* p, Float16* v) { load_bf16(p, v); }

inline void load_pairs(const int8_t* p, Shorts32* v) {
#if defined(__AVX512BW__)
  // The intrinsics, for GCC 12 converts half by half.
  v->part[0] = reinterpret_cast<Shorts32::Register>(
      _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__AVX2__)
  for (int i = 0; i < kRegisters; ++i)
    v->part[i] = reinterpret_cast<Shorts32::Register>(
        _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p) + i)));
#else
  typedef int8_t Narrow __attribute__((vector_size(kRegisterBytes / 2)));
  for (int i = 0; i < kRegisters; ++i) {
    Narrow narrow;
    __builtin_memcpy(&narrow, p + i * sizeof narrow, sizeof narrow);
    v->part[i] = __builtin_convertvector(narrow, Shorts32::Register);
  }
#endif
}

// sum_l += x_2l * pair_0 + x_2l+1 * pair_1, a pair being two int16 in the bits of an int32.
inline void add_pair_products(const Shorts32& x, const int32_t pair, Ints16* sum) {
  for (int i = 0; i < kRegisters; ++i) {
#if defined(__AVX512VNNI__)
    // Not the intrinsic: GCC 12 copies its accumulator to another register and back.
    asm("vpdpwssd %2, %1, %0" : "+v"(sum->part[i]) : "v"(x.part[i]), "v"(Ints{} + pair));
#elif defined(__AVX2__)
    sum->part[i] += reinterpret_cast<Ints>(_mm256_madd_epi16(
        reinterpret_cast<__m256i>(x.part[i]), _mm256_set1_epi32(pair)));
#else
    const Ints both = reinterpret_cast<Ints>(x.part[i]);
    int16_t factor[2];
    __builtin_memcpy(factor, &pair, sizeof factor);
    sum->part[i] += (both << 16 >> 16) * factor[0] + (both >> 16) * factor[1];  // little-endian
#endif
  }
}

inline Float16 to_floats(const Ints16& x) {
  Float16 result;
  for (int i = 0; i < kRegisters; ++i) result.part[i] = __builtin_convertvector(x.part[i], Floats);
  return result;
}

inline float largest(const Float16& v) {
  return fold(v, [](const auto& a, const auto& b) { return a > b ? a : b; });
}

// What differs by the cache's type, for M rows:
//
//   scores   score[i][slot - first ..] = q_i . k_s for the kStepSlots slots from `slot` on
//   mix      out_i += sum_s weight[i][s - first] v_s over `slots` slots
//
// score and weight are rows of kSplitSlots.
template <typename T, int M>
class Rows {
 public:
  Rows(const float* q, int h) : q_(q), h_(h) {}

  void scores(const HeadCache<T>& cache, int64_t slot, float* score) const {
    const T* block = cache.keys + cache.blocks.at(slot, h_);
    const Ahead<T> ahead = ahead_of(cache.keys, cache.blocks, slot, h_);
    for (int c = 0; c < kStepSlots; c += kVectors * kFloats) {
      Float16 acc[M][kVectors] = {};
      for (int d = 0; d < h_; ++d) {
        const T* k = block + d * kStepSlots + c;
        prefetch(ahead(d * kStepSlots + c), kVectors * kFloats * sizeof(T));
        Float16 key[kVectors];
        for (int v = 0; v < kVectors; ++v) load_vector(k + v * kFloats, &key[v]);
        for (int i = 0; i < M; ++i)
          for (int v = 0; v < kVectors; ++v) acc[i][v] += q_[i * h_ + d] * key[v];
      }
      for (int i = 0; i < M; ++i)
        for (int v = 0; v < kVectors; ++v)
          store_floats(score + i * kSplitSlots + c + v * kFloats, acc[i][v]);
    }
  }

  void mix(const HeadCache<T>& cache, int64_t slot, int slots, const float* weight, float* out) const {
    // So many slots at a time as fill 64 bytes of each dimension: what is asked for ahead is beyond.
    constexpr int kChunk = kLine / sizeof(T);
    const T* block = cache.values + cache.blocks.at(slot, h_);
    const Ahead<T> ahead = ahead_of(cache.values, cache.blocks, slot, h_);
    for (int s = 0; s < slots; s += kChunk) {
      const T* values = block + s * h_;
      const int count = slots - s < kChunk ? slots - s : kChunk;
      const float* w = weight + s;
      int d = 0;
      for (; d + kVectors * kFloats <= h_; d += kVectors * kFloats)
        mix_vectors<kVectors>(values + d, ahead(s * h_ + d * kChunk), count, w, out + d);
      for (; d < h_; d += kFloats)
        mix_vectors<1>(values + d, ahead(s * h_ + d * kChunk), count, w, out + d);
    }
  }

 private:
  template <int V>
  void mix_vectors(const T* values, const T* ahead, int slots, const float* weight, float* out) const {
    Float16 acc[M][V];
    for (int i = 0; i < M; ++i)
      for (int v = 0; v < V; ++v) load_floats(out + i * h_ + v * kFloats, &acc[i][v]);
    for (int s = 0; s < slots; ++s) {
      Float16 value[V];
      const T* from = values + static_cast<int64_t>(s) * h_;
      prefetch(ahead, V * kFloats * sizeof(T));
      ahead += V * kFloats;
      for (int v = 0; v < V; ++v) load_vector(from + v * kFloats, &value[v]);
      for (int i = 0; i < M; ++i)
        for (int v = 0; v < V; ++v) acc[i][v] += weight[i * kSplitSlots + s] * value[v];
    }
    for (int i = 0; i < M; ++i)
      for (int v = 0; v < V; ++v) store_floats(out + i * h_ + v * kFloats, acc[i][v]);
  }

  const float* const q_;
  const int h_;
};

// Products of int16 and int8 in int32, exact: 32767 * 127 * 512 < 2^31 for a query's dimensions, and
// a step's slots are fewer.
template <int M>
class Rows<int8_t, M> {
 public:
  Rows(const float* q, int h) : h_(h) {
    for (int i = 0; i < M; ++i) {
      Float16 top = {};
      Float16 poison = {};
      for (int d = 0; d < h; d += kFloats) {
        Float16 x;
        load_floats(q + i * h + d, &x);
        top = larger(top, larger(x, 0.0F - x));
        poison += x * 0.0F;
      }
      const float step = step_of(largest(top));
      for (int d = 0; d < h; d += kFloats) {
        Float16 x;
        load_floats(q + i * h + d, &x);
        store_shorts(x * (1.0F / step), q_ + i * kMaxHeadDim + d);
      }
      step_[i] = step + fold(poison);
    }
  }

  void scores(const HeadCache<int8_t>& cache, int64_t slot, float* score) const {
    const int8_t* block = cache.keys + cache.blocks.at(slot, h_);
    const Ahead<int8_t> ahead = ahead_of(cache.keys, cache.blocks, slot, h_);
    const uint16_t* key_scale = cache.key_scale + cache.scale_at(slot);
    for (int c = 0; c < kStepSlots; c += kVectors * kFloats) {
      Ints16 acc[M][kVectors] = {};
      for (int d = 0; d < h_; d += 2) {
        const int8_t* k = block + d * kStepSlots + 2 * c;
        prefetch(ahead(d * kStepSlots + 2 * c), 2 * kVectors * kFloats);
        Shorts32 key[kVectors];
        for (int v = 0; v < kVectors; ++v) load_pairs(k + 2 * v * kFloats, &key[v]);
        for (int i = 0; i < M; ++i) {
          const int32_t pair = pair_at(q_ + i * kMaxHeadDim + d);
          for (int v = 0; v < kVectors; ++v) add_pair_products(key[v], pair, &acc[i][v]);
        }
      }
      for (int v = 0; v < kVectors; ++v) {
        Float16 scale;
        load_vector(key_scale + c + v * kFloats, &scale);
        for (int i = 0; i < M; ++i)
          store_floats(score + i * kSplitSlots + c + v * kFloats,
                       rounded(to_floats(acc[i][v]) * (scale * step_[i])));
      }
    }
  }

  // Weights times the values' scales are rounded to 15 bits of the largest of the step.
  void mix(const HeadCache<int8_t>& cache, int64_t slot, int, const float* weight, float* out) const {
    int16_t codes[M][kStepSlots];
    float step[M];
    const uint16_t* value_scale = cache.value_scale + cache.scale_at(slot);
    for (int i = 0; i < M; ++i) {
      Float16 scaled[kStepSlots / kFloats];
      Float16 top = {};
      Float16 poison = {};
      for (int v = 0; v < kStepSlots / kFloats; ++v) {
        Float16 w;
        load_floats(weight + i * kSplitSlots + v * kFloats, &w);
        load_vector(value_scale + v * kFloats, &scaled[v]);
        scaled[v] = select(w > 0.0F, rounded(w * scaled[v]), 0.0F);  // a slot that is not seen may hold a NaN
        top = larger(top, scaled[v]);
        poison += scaled[v] * 0.0F;
      }
      step[i] = step_of(largest(top));
      for (int v = 0; v < kStepSlots / kFloats; ++v)
        store_shorts(scaled[v] * (1.0F / step[i]), codes[i] + v * kFloats);
      step[i] += fold(poison);
    }
    const int8_t* values = cache.values + cache.blocks.at(slot, h_);
    const Ahead<int8_t> ahead = ahead_of(cache.values, cache.blocks, slot, h_);
    int d = 0;
    for (; d + kVectors * kFloats <= h_; d += kVectors * kFloats)
      mix_vectors<kVectors>(values + 2 * d, ahead(d * kStepSlots), codes, step, out + d);
    for (; d < h_; d += kFloats)
      mix_vectors<1>(values + 2 * d, ahead(d * kStepSlots), codes, step, out + d);
  }

 private:
  // The step of 15-bit codes for numbers up to `absmax`; its inverse is finite.
  static float step_of(float absmax) {
    constexpr float kSmallest = 0x1p-100F;
    return (absmax > kSmallest ? absmax : kSmallest) / 32767.0F;
  }

  // Rounds to the nearest integer; |x| < 32768.
  static void store_shorts(const Float16& x, int16_t* codes) {
    typedef int16_t Narrow __attribute__((vector_size(kRegisterBytes / 2)));
    const Float16 shifted = rounded(x) + 12582912.0F;  // 1.5 * 2^23: the low bits are the integer
    for (int i = 0; i < kRegisters; ++i) {
      const Narrow low = __builtin_convertvector(reinterpret_cast<Ints>(shifted.part[i]), Narrow);
      __builtin_memcpy(codes + i * kRegisterFloats, &low, sizeof low);
    }
  }

  static int32_t pair_at(const int16_t* p) {
    int32_t pair;
    __builtin_memcpy(&pair, p, sizeof pair);
    return pair;
  }

  // A function of its own, and its last loops unrolled: otherwise GCC 12 keeps the sums in memory.
  template <int V>
  __attribute__((noinline)) void mix_vectors(const int8_t* values, const int8_t* ahead,
                                             const int16_t (*codes)[kStepSlots],
                                             const float* step, float* out) const {
    Ints16 acc[M][V] = {};
    for (int s = 0; s < kStepSlots; s += 2) {
      Shorts32 value[V];
      const int8_t* from = values + static_cast<int64_t>(s) * h_;
      prefetch(ahead, 2 * V * kFloats);
      ahead += 2 * V * kFloats;
      for (int v = 0; v < V; ++v) load_pairs(from + 2 * v * kFloats, &value[v]);
      for (int i = 0; i < M; ++i) {
        const int32_t pair = pair_at(codes[i] + s);
        for (int v = 0; v < V; ++v) add_pair_products(value[v], pair, &acc[i][v]);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        Float16 sum;
        load_floats(out + i * h_ + v * kFloats, &sum);
        sum += rounded(to_floats(acc[i][v]) * step[i]);
        store_floats(out + i * h_ + v * kFloats, sum);
      }
  }

  int16_t q_[M * kMaxHeadDim];
  float step_[M];
  const int h_;
};

// Which of the lanes are among the first n.
inline Ints16 first_lanes(int64_t n) {
  Ints16 lane;
  for (int i = 0; i < kFloats; ++i) lane.part[i / kRegisterFloats][i % kRegisterFloats] = i;
  return Ints16(static_cast<int32_t>(n < kFloats ? n : kFloats)) > lane;
}

// Joins a step's scores, the first `visible` of them, to the row's maximum in each lane, and to a
// poison: NaN if a score is NaN or infinite, else 0, for comparisons lose NaNs.
inline void join_scores(const float* score, int64_t visible, Float16* top, Float16* poison) {
  for (int s = 0; s < kStepSlots && s < visible; s += kFloats) {
    Float16 x;
    load_floats(score + s, &x);
    x = select(first_lanes(visible - s), x, *top);
    *top = larger(*top, x);
    *poison += x * 0.0F;
  }
}

// A step's scores to weights, e^(score - maximum), the first `visible` of them, else 0; adds them up.
inline void weigh(float* score, int64_t visible, float maximum, Float16* sum) {
  for (int s = 0; s < kStepSlots; s += kFloats) {
    Float16 x = {};
    if (s < visible) {
      load_floats(score + s, &x);
      x = select(first_lanes(visible - s), exponential(x - maximum), 0.0F);
      *sum += x;
    }
    store_floats(score + s, x);
  }
}

// Two passes over the slots: scores and their maximum, then weights and the mix.
template <typename T, int M>
void attend_rows(const float* q, const int64_t* position, int h, const HeadCache<T>& cache,
                 int64_t first, int64_t last, Partial* partial, float* out) {
  const Rows<T, M> rows(q, h);
  alignas(64) float score[M * kSplitSlots];
  Float16 top[M];
  Float16 sum[M];
  for (int i = 0; i < M; ++i) {
    top[i] = kLowest;
    sum[i] = 0.0F;
  }
  for (int64_t slot = first; slot < last; slot += kStepSlots) {
    float* step = score + (slot - first);
    rows.scores(cache, slot, step);
    for (int i = 0; i < M; ++i)
      join_scores(step + i * kSplitSlots, position[i] + 1 - slot, &top[i], &sum[i]);
  }
  for (int i = 0; i < M; ++i) partial[i].maximum = largest(top[i]);
  for (int64_t i = 0; i < static_cast<int64_t>(M) * h; ++i) out[i] = 0;
  for (int64_t slot = first; slot < last; slot += kStepSlots) {
    float* step = score + (slot - first);
    for (int i = 0; i < M; ++i)
      weigh(step + i * kSplitSlots, position[i] + 1 - slot, partial[i].maximum, &sum[i]);
    const int64_t left = last - slot;
    rows.mix(cache, slot, static_cast<int>(left < kStepSlots ? left : kStepSlots), step, out);
  }
  for (int i = 0; i < M; ++i) partial[i].total = fold(sum[i]);
}

template <typename T>
void attend(const float* q, const int64_t* position, int m, int h, const HeadCache<T>& cache,
            int64_t first, int64_t last, Partial* partial, float* out) {
  switch (m) {
    case 1: return attend_rows<T, 1>(q, position, h, cache, first, last, partial, out);
    case 2: return attend_rows<T, 2>(q, position, h, cache, first, last, partial, out);
    case 3: return attend_rows<T, 3>(q, position, h, cache, first, last, partial, out);
    case 4: return attend_rows<T, 4>(q, position, h, cache, first, last, partial, out);
    case 5: return attend_rows<T, 5>(q, position, h, cache, first, last, partial, out);
    default: return attend_rows<T, 6>(q, position, h, cache, first, last, partial, out);
  }
}
static_assert(kAttentionRows == 6, "attend has a case for every number of rows");

}  // namespace

AttentionKernel BITJAX_ATTENTION() { return {attend<float>, attend<uint16_t>, attend<int8_t>}; }

}  // namespace bitjax
