// Compiled once for each instruction set, with BITJAX_TRAINING_ATTENTION naming the function it
// defines and with contraction to fused multiply-adds allowed.

#include "training_attention.h"

#include "rows.h"

namespace bitjax {
namespace {

constexpr int kBlock = kAttentionBlock;
constexpr int kBlockVectors = kBlock / kFloats;
constexpr int kRows = 6;  // of a tile in registers, times kVectors

// 6 rows x 4 fill the 32 wide registers of AVX-512; elsewhere a vector is several registers.
#ifdef __AVX512F__
constexpr int kVectors = 4;
#else
constexpr int kVectors = 1;
#endif

constexpr float kLowest = -3.4028235e38F;

constexpr int64_t whole(int64_t n, int64_t of) { return (n + of - 1) / of; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- products -----------------------------------------------------------------------------------

// The first factor: row m's value at depth k is at[m * row + k * step].
struct Factor {
  const float* at;
  int64_t row, step;
};

inline void load(const float* p, Floats* v) { __builtin_memcpy(v, p, sizeof *v); }

// c[m][n] = or += sum_k a[m, k] b[k][n], for M rows and V vectors of columns.
template <int M, int V>
void tile(const Factor& a, const float* b, int64_t b_row, int64_t depth, bool add, float* c,
          int64_t c_row) {
  // Registers one by one: GCC 12 keeps an array of Float16 in memory.
  Floats acc[M][V * kRegisters];
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < V * kRegisters; ++v) acc[m][v] = Floats{};
  const float* from = a.at;
  for (int64_t k = 0; k < depth; ++k, from += a.step, b += b_row) {
    Floats column[V * kRegisters];
    for (int v = 0; v < V * kRegisters; ++v) load(b + v * kRegisterFloats, &column[v]);
    for (int m = 0; m < M; ++m) {
      const float value = from[m * a.row];
      for (int v = 0; v < V * kRegisters; ++v) acc[m][v] += column[v] * value;
    }
  }
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < V * kRegisters; ++v) {
      float* const to = c + m * c_row + v * kRegisterFloats;
      if (add) {
        Floats before;
        load(to, &before);
        acc[m][v] += before;
      }
      __builtin_memcpy(to, &acc[m][v], sizeof acc[m][v]);
    }
}

using Tile = decltype(&tile<1, 1>);

template <int V>
Tile tile_of(int64_t rows) {
  static constexpr Tile kOf[] = {tile<1, V>, tile<2, V>, tile<3, V>, tile<4, V>, tile<5, V>, tile<6, V>};
  static_assert(sizeof kOf / sizeof *kOf == kRows, "one for each number of rows");
  return kOf[rows - 1];
}

Tile tile_of(int64_t rows, int64_t vectors) {
#ifdef __AVX512F__
  switch (vectors) {
    case 1: return tile_of<1>(rows);
    case 2: return tile_of<2>(rows);
    case 3: return tile_of<3>(rows);
    default: return tile_of<kVectors>(rows);
  }
#else
  static_cast<void>(vectors);
  return tile_of<kVectors>(rows);
#endif
}

// The same for 1 to kRows rows and a multiple of 16 columns.
void product(const Factor& a, const float* b, int64_t b_row, int64_t depth, bool add, int64_t rows,
             int64_t columns, float* c, int64_t c_row) {
  for (int64_t n = 0; n < columns; n += kVectors * kFloats) {
    const int64_t vectors = smaller(kVectors, (columns - n) / kFloats);
    tile_of(rows, vectors)(a, b + n, b_row, depth, add, c + n, c_row);
  }
}

// ---- rows ---------------------------------------------------------------------------------------

// y[r] = turn(x[r]) * scale, for `rows` rows; y [..][h].
void turn_rows(const float* x, int64_t stride, const float* turn, int64_t rows, int h, float scale,
               float* __restrict y) {
  const int half = h / 2;
  for (int64_t r = 0; r < rows; ++r, x += stride, turn += h, y += h) {
    const float* __restrict first = x;
    const float* __restrict cosine = turn;
    for (int i = 0; i < half; ++i) {
      const float c = cosine[i] * scale, s = cosine[half + i] * scale;
      y[i] = first[i] * c - first[half + i] * s;
      y[half + i] = first[half + i] * c + first[i] * s;
    }
  }
}

void copy_rows(const float* x, int64_t stride, int64_t rows, int h, float* y) {
  for (int64_t r = 0; r < rows; ++r)
    __builtin_memcpy(y + r * h, x + r * stride, static_cast<size_t>(h) * sizeof(float));
}

void zero_rows(int64_t first, int64_t end, int h, float* y) {
  for (int64_t i = first * h; i < end * h; ++i) y[i] = 0;
}

void finish(const float* x, int64_t x_stride, int64_t count, int64_t part_stride, int64_t rows, int h,
            const float* turn, float* y, int64_t y_stride) {
  const int half = h / 2;
  float sum[kMaxHeadDim];
  for (int64_t r = 0; r < rows; ++r, x += x_stride, y += y_stride) {
    for (int i = 0; i < h; ++i) sum[i] = x[i];
    for (int64_t p = 1; p < count; ++p)
      for (int i = 0; i < h; ++i) sum[i] += x[p * part_stride + i];
    if (turn == nullptr) {
      for (int i = 0; i < h; ++i) y[i] = sum[i];
      continue;
    }
    for (int i = 0; i < half; ++i) {
      y[i] = sum[i] * turn[i] + sum[half + i] * turn[half + i];
      y[half + i] = sum[half + i] * turn[i] - sum[i] * turn[half + i];
    }
    turn += h;
  }
}

float dot(const float* x, const float* y, int h) {
  Float16 sum = {};
  for (int i = 0; i < h; i += kFloats) {
    Float16 a, b;
    load_floats(x + i, &a);
    load_floats(y + i, &b);
    sum += a * b;
  }
  return fold(sum);
}

// a0 b0 a1 b1, or a2 b2 a3 b3.
template <bool Upper>
Float4 mixed(const Float4& a, const Float4& b) {
  constexpr int k = Upper ? 2 : 0;
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, k, k + 4, k + 1, k + 5);
#else
  typedef int Index __attribute__((vector_size(16)));
  return __builtin_shuffle(a, b, Index{k, k + 4, k + 1, k + 5});
#endif
}

// y[d][r] = x[r][d] for a block of rows of h.
void transpose(const float* x, int h, float* y) {
  for (int r = 0; r < kBlock; r += 4)
    for (int d = 0; d < h; d += 4) {
      Float4 row[4];
      for (int i = 0; i < 4; ++i)
        __builtin_memcpy(&row[i], x + static_cast<int64_t>(r + i) * h + d, sizeof row[i]);
      const Float4 low[2] = {mixed<false>(row[0], row[2]), mixed<false>(row[1], row[3])};
      const Float4 high[2] = {mixed<true>(row[0], row[2]), mixed<true>(row[1], row[3])};
      const Float4 column[4] = {mixed<false>(low[0], low[1]), mixed<true>(low[0], low[1]),
                                mixed<false>(high[0], high[1]), mixed<true>(high[0], high[1])};
      for (int i = 0; i < 4; ++i)
        __builtin_memcpy(y + static_cast<int64_t>(d + i) * kBlock + r, &column[i], sizeof column[i]);
    }
}

// ---- what a block of queries sees of a block of keys --------------------------------------------

// By segments; at the diagonal, of what is not later.
enum class Sight { kNothing, kPart, kAll };

// The first n segments' numbers lie in [low, high].
struct SegmentRange {
  int32_t low = 0, high = 0;
  SegmentRange(const int32_t* segments, int64_t n) {
    if (segments == nullptr) return;
    low = high = segments[0];
    for (int64_t i = 1; i < n; ++i) {
      if (segments[i] < low) low = segments[i];
      if (segments[i] > high) high = segments[i];
    }
  }
};

// Blocks meet at the diagonal or lie left of it; queries and keys are counted within theirs.
struct Meeting {
  const int32_t* query_segments;  // [kBlock], or null
  const int32_t* key_segments;
  int64_t queries, keys;
  bool diagonal;

  Sight sight() const {
    const SegmentRange q(query_segments, queries), k(key_segments, keys);
    if (q.low > k.high || k.low > q.high) return Sight::kNothing;
    return q.low != q.high || k.low != k.high ? Sight::kPart : Sight::kAll;
  }

  // Scores are computed by tiles of kRows keys, from the vector of queries on in which the first of
  // them can be seen.
  int64_t first_vector(int64_t key) const { return diagonal ? key / kFloats : 0; }
  int64_t vectors() const { return whole(queries, kFloats); }
  // End of the keys for which the v-th vector of queries was computed.
  int64_t end_key(int64_t v) const {
    return diagonal ? smaller(keys, whole((v + 1) * kFloats, kRows) * kRows) : keys;
  }

  // The first key that is not seen by all of the v-th vector of queries, if there is one.
  int64_t first_masked(int64_t v, Sight sight) const {
    if (sight == Sight::kPart) return 0;
    return diagonal ? smaller(v * kFloats, end_key(v)) : end_key(v);
  }

  // The lanes of the v-th vector of queries that see a key.
  Ints16 visible(int64_t v, int64_t key, Sight sight) const {
    Ints16 mask;
    const int32_t before = static_cast<int32_t>(diagonal ? key - v * kFloats - 1 : -1);
    for (int i = 0; i < kRegisters; ++i) {
      Ints lane;
      for (int j = 0; j < kRegisterFloats; ++j) lane[j] = i * kRegisterFloats + j;
      mask.part[i] = lane > before;
      if (sight == Sight::kPart) {
        Ints segment;
        __builtin_memcpy(&segment, query_segments + v * kFloats + i * kRegisterFloats,
                         sizeof segment);
        mask.part[i] &= segment == key_segments[key];
      }
    }
    return mask;
  }
};

// [key][query] = x[key] . queries, for the pairs that a meeting's tiles hold.
void transposed_scores(const Meeting& meeting, const float* x, int64_t stride, const float* queries,
                       int h, float* scores) {
  for (int64_t s = 0; s < meeting.keys; s += kRows) {
    const int64_t from = meeting.first_vector(s), columns = (meeting.vectors() - from) * kFloats;
    if (columns > 0)
      product({x + s * stride, stride, 1}, queries + from * kFloats, kBlock, h, false,
              smaller(kRows, meeting.keys - s), columns, scores + s * kBlock + from * kFloats, kBlock);
  }
}

// Sums over the keys each query sees: y[query] = or += sum_s w[s][query] x[s].
void mix_keys(const Meeting& meeting, const float* w, const float* x, int h, bool add, float* y,
              int64_t y_stride) {
  for (int64_t q = 0; q < meeting.queries; q += kRows) {
    const int64_t depth = meeting.diagonal ? smaller(meeting.keys, q + kRows) : meeting.keys;
    product({w + q, 1, kBlock}, x, h, depth, add, smaller(kRows, meeting.queries - q), h,
            y + q * y_stride, y_stride);
  }
}

// Sums over the queries that see each key: y[s] = or += sum_q w[s][q] x[q].
void mix_queries(const Meeting& meeting, const float* w, const float* x, int h, bool add, float* y,
                 int64_t y_stride) {
  for (int64_t s = 0; s < meeting.keys; s += kRows) {
    const int64_t from = meeting.diagonal ? s : 0;
    product({w + s * kBlock + from, kBlock, 1}, x + from * h, h, meeting.queries - from, add,
            smaller(kRows, meeting.keys - s), h, y + s * y_stride, y_stride);
  }
}

// A block of queries: their numbers, and a copy of their segments that vectors may be read from.
struct Queries {
  const TrainingHead& head;
  int64_t first, count;
  alignas(64) int32_t segments[kBlock] = {};

  Queries(const TrainingHead& of, int64_t from)
      : head(of), first(from), count(smaller(kBlock, of.tokens - from)) {
    if (head.segments != nullptr)
      for (int64_t i = 0; i < count; ++i) segments[i] = head.segments[first + i];
  }

  Meeting with(int64_t key) const {
    const bool apart = head.segments != nullptr;
    return {apart ? segments : nullptr, apart ? head.segments + key : nullptr, count,
            smaller(kBlock, head.tokens - key), key == first};
  }

  // q', zeros beyond the count, by rows and transposed.
  void turned(float* rows, float* transposed) const {
    const float scale = 1.0F / __builtin_sqrtf(static_cast<float>(head.h));
    turn_rows(head.q + first * head.stride, head.stride, head.turn + first * head.h, count, head.h,
              scale, rows);
    zero_rows(count, kBlock, head.h, rows);
    transpose(rows, head.h, transposed);
  }

  void turned_keys(int64_t key, int64_t count_of, float* rows) const {
    turn_rows(head.k + key * head.stride, head.stride, head.turn + key * head.h, count_of, head.h,
              1.0F, rows);
  }
};

// ---- forward ------------------------------------------------------------------------------------

// Scores to e^(score - top), with the new largest; `total` and what is summed so far shrink by the
// factors written to `shrink`.
void weigh(const Meeting& meeting, Sight sight, int64_t v, float* scores, Float16* top,
           Float16* total, float* shrink) {
  constexpr int kChains = 4;  // a comparison's latency, in comparisons of one a cycle
  const int64_t end = meeting.end_key(v), masked = meeting.first_masked(v, sight);
  float* const column = scores + v * kFloats;
  const auto score = [&](int64_t s) {
    Float16 x;
    load_floats(column + s * kBlock, &x);
    return x;
  };
  Float16 high[kChains], poison[kChains];  // comparisons lose NaNs
  for (int c = 0; c < kChains; ++c) high[c] = *top, poison[c] = 0.0F;
  const auto join = [&](const Float16& x, int c) {
    poison[c] += x * 0.0F;
    high[c] = larger(x, high[c]);
  };
  int64_t s = 0;
  for (; s + kChains <= masked; s += kChains)
    for (int c = 0; c < kChains; ++c) join(score(s + c), c);
  for (; s < masked; ++s) join(score(s), 0);
  for (; s < end; ++s) join(select(meeting.visible(v, s, sight), score(s), high[0]), 0);
  const Float16 now = larger(larger(high[0], high[1]), larger(high[2], high[3]));
  const Float16 factor = exponential(*top - now);
  Float16 sum = *total * factor + ((poison[0] + poison[1]) + (poison[2] + poison[3]));
  for (s = 0; s < end; ++s) {
    Float16 x = exponential(score(s) - now);
    if (s >= masked) x = select(meeting.visible(v, s, sight), x, 0.0F);
    sum += x;
    store_floats(column + s * kBlock, x);
  }
  *top = now;
  *total = sum;
  store_floats(shrink + v * kFloats, factor);
}

void scale_rows(const float* factor, int64_t rows, int h, float* y, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r) {
    const float f = factor[r];
    if (f == 1.0F) continue;
    for (int i = 0; i < h; ++i) y[r * stride + i] *= f;
  }
}

void forward(const TrainingHead& head, int64_t first, float* out, int64_t out_stride, float* maximum,
             float* total, float* scratch) {
  const int h = head.h;
  const int64_t size = static_cast<int64_t>(kBlock) * h;
  float* const rows = scratch;
  float* const transposed = rows + size;
  float* const keys = transposed + size;
  float* const values = keys + size;
  float* const scores = values + size;
  const Queries queries(head, first);
  queries.turned(rows, transposed);
  alignas(64) float shrink[kBlock];
  Float16 top[kBlockVectors], sum[kBlockVectors];
  for (int v = 0; v < kBlockVectors; ++v) top[v] = kLowest, sum[v] = 0.0F;

  // The diagonal comes first: in it every query sees itself, so that all have a maximum.
  for (int64_t key = first; key >= 0; key -= kBlock) {
    const Meeting meeting = queries.with(key);
    const Sight sight = meeting.sight();
    if (sight == Sight::kNothing) continue;
    queries.turned_keys(key, meeting.keys, keys);
    copy_rows(head.v + key * head.stride, head.stride, meeting.keys, h, values);
    transposed_scores(meeting, keys, h, transposed, h, scores);
    for (int64_t v = 0; v < meeting.vectors(); ++v)
      weigh(meeting, sight, v, scores, &top[v], &sum[v], shrink);
    if (!meeting.diagonal) scale_rows(shrink, queries.count, h, out, out_stride);
    mix_keys(meeting, scores, values, h, !meeting.diagonal, out, out_stride);
  }
  alignas(64) float last[2][kBlock];
  for (int v = 0; v < kBlockVectors; ++v) {
    store_floats(last[0] + v * kFloats, top[v]);
    store_floats(last[1] + v * kFloats, sum[v]);
  }
  for (int64_t i = 0; i < queries.count; ++i) {
    maximum[i] = last[0][i];
    total[i] = last[1][i];
    shrink[i] = 1.0F / total[i];
  }
  scale_rows(shrink, queries.count, h, out, out_stride);
}

// ---- backward -----------------------------------------------------------------------------------

// Of each query of a block; zeros beyond their number.
struct QueryNumbers {
  alignas(64) float maximum[kBlock] = {};
  alignas(64) float inverse[kBlock] = {};  // of the total
  alignas(64) float delta[kBlock] = {};    // d_out . out
};

// Scores become p, and d_out . v becomes e.
void weigh_back(const Meeting& meeting, Sight sight, int64_t v, const QueryNumbers& of,
                float* scores, float* gradients) {
  Float16 maximum, inverse, delta;
  load_floats(of.maximum + v * kFloats, &maximum);
  load_floats(of.inverse + v * kFloats, &inverse);
  load_floats(of.delta + v * kFloats, &delta);
  const int64_t end = meeting.end_key(v), masked = meeting.first_masked(v, sight);
  for (int64_t s = 0; s < end; ++s) {
    float* const score = scores + s * kBlock + v * kFloats;
    float* const gradient = gradients + s * kBlock + v * kFloats;
    Float16 x, g;
    load_floats(score, &x);
    load_floats(gradient, &g);
    x = exponential(x - maximum) * inverse;
    if (s >= masked) x = select(meeting.visible(v, s, sight), x, 0.0F);
    store_floats(score, x);
    store_floats(gradient, x * (g - delta));
  }
}

void backward(const TrainingHead& head, int64_t first, const float* out, const float* d_out,
              int64_t out_stride, const float* maximum, const float* total, float* dq, float* dk,
              float* dv, int64_t kv_stride, bool fresh, float* scratch) {
  const int h = head.h;
  const int64_t size = static_cast<int64_t>(kBlock) * h;
  float* const rows = scratch;
  float* const transposed = rows + size;
  float* const d_rows = transposed + size;
  float* const d_transposed = d_rows + size;
  float* const keys = d_transposed + size;
  float* const dq_rows = keys + size;
  float* const scores = dq_rows + size;
  float* const gradients = scores + kBlock * kBlock;
  const Queries queries(head, first);
  queries.turned(rows, transposed);
  copy_rows(d_out, out_stride, queries.count, h, d_rows);
  zero_rows(queries.count, kBlock, h, d_rows);
  transpose(d_rows, h, d_transposed);
  QueryNumbers of;
  for (int64_t i = 0; i < queries.count; ++i) {
    of.maximum[i] = maximum[i];
    of.inverse[i] = 1.0F / total[i];
    of.delta[i] = dot(d_out + i * out_stride, out + i * out_stride, h);
  }

  for (int64_t key = first; key >= 0; key -= kBlock) {
    const Meeting meeting = queries.with(key);
    const Sight sight = meeting.sight();
    if (sight == Sight::kNothing) continue;
    queries.turned_keys(key, meeting.keys, keys);
    transposed_scores(meeting, keys, h, transposed, h, scores);
    transposed_scores(meeting, head.v + key * head.stride, head.stride, d_transposed, h, gradients);
    for (int64_t v = 0; v < meeting.vectors(); ++v)
      weigh_back(meeting, sight, v, of, scores, gradients);
    const bool add = !(fresh && meeting.diagonal);
    mix_queries(meeting, scores, d_rows, h, add, dv + key * kv_stride, kv_stride);
    mix_queries(meeting, gradients, rows, h, add, dk + key * kv_stride, kv_stride);
    mix_keys(meeting, gradients, keys, h, !meeting.diagonal, dq_rows, h);
  }
  const float scale = 1.0F / __builtin_sqrtf(static_cast<float>(h));
  for (int64_t i = 0; i < queries.count * h; ++i) dq_rows[i] *= scale;
  finish(dq_rows, h, 1, 0, queries.count, h, head.turn + first * h, dq, head.stride);
}

}  // namespace

TrainingAttentionKernel BITJAX_TRAINING_ATTENTION() { return {forward, backward, finish}; }

}  // namespace bitjax
