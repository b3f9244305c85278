// A call of cached attention: it turns queries and keys by their positions, stores keys and values in the
// cache, and attends. Shared by handlers_attention.cc (a cache of its own for each sequence) and
// handlers_paged.cc (blocks of 64 slots from a common store).
#ifndef BITJAX_FFI_ATTENTION_CALL_H_
#define BITJAX_FFI_ATTENTION_CALL_H_

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>

#include "attention.h"
#include "cache_int8.h"
#include "epilogue.h"
#include "handler_common.h"
#include "parallel.h"

namespace bitjax {
namespace {

// Multiply-adds that stay on the calling thread: a us of an AVX-512 core. Little, because the cache
// comes from memory, and because a pool's thread that has nothing to do for some 25 us goes to sleep,
// from which the product that follows would have to wake it (20-50 us in a virtual machine).
constexpr int64_t kSerialWork = int64_t{1} << 16;

// Tiles that are enough to be shared out whole, each with all of its slots.
constexpr size_t kManyTiles = 8;

struct Heads {
  int64_t H, G, h;
  int64_t group() const { return H / G; }
};

// Consecutive new tokens of one sequence, which is row `row` of the cache or of the page tables.
struct Segment {
  int64_t first, tokens, row;
};

// Where blocks of 64 slots lie, counted in blocks.
struct Blocks {
  const int32_t* tables;  // [rows, per_row]: pages, of G blocks each; null: rows of G * per_row blocks
  int64_t per_row;
  int64_t G;

  int64_t at(int64_t row, int64_t g, int64_t slot) const {
    const int64_t n = slot / kStepSlots;
    return tables == nullptr ? (row * G + g) * per_row + n : tables[row * per_row + n] * G + g;
  }
  // As kernels take it: of one head, from block 0 of the row.
  PagedBlocks of(int64_t row, int64_t h) const {
    if (tables == nullptr) return {nullptr, 0, 0};
    return {tables + row * per_row, per_row, G * kStepSlots * h};
  }
};

// All of a cache; T = uint16_t is bfloat16.
template <typename T>
struct Cache {
  T* keys;
  T* values;

  HeadCache<T> head(const Blocks& blocks, int64_t h, int64_t row, int64_t g) const {
    const int64_t first = blocks.tables == nullptr ? blocks.at(row, g, 0) : g;
    return {keys + first * kStepSlots * h, values + first * kStepSlots * h, blocks.of(row, h)};
  }
  void store_key(int64_t block, int64_t place, int64_t h, const float* x) const {
    T* to = keys + block * kStepSlots * h + place;
    for (int64_t d = 0; d < h; ++d) store_output(x[d], to + d * kStepSlots);
  }
  void store_value(int64_t block, int64_t place, int64_t h, const float* x) const {
    T* to = values + (block * kStepSlots + place) * h;
    for (int64_t d = 0; d < h; ++d) store_output(x[d], to + d);
  }
};

// Scales lie behind one another: those of the keys of a row's or page's slots, then of its values.
template <>
struct Cache<int8_t> {
  int8_t* keys;
  int8_t* values;
  uint16_t* scales;
  int64_t slots;  // of a row, or of a page

  uint16_t* scales_of(int64_t block, int64_t which) const {
    const int64_t of_head = slots / kStepSlots;
    return scales + (2 * (block / of_head) + which) * slots + block % of_head * kStepSlots;
  }
  HeadCache<int8_t> head(const Blocks& blocks, int64_t h, int64_t row, int64_t g) const {
    const int64_t first = blocks.tables == nullptr ? blocks.at(row, g, 0) : g;
    return {keys + first * kStepSlots * h, values + first * kStepSlots * h, scales_of(first, 0),
            scales_of(first, 1), blocks.of(row, h), blocks.G * 2 * slots};
  }
  void store_key(int64_t block, int64_t place, int64_t h, const float* x) const {
    int8_t codes[kMaxHeadDim];
    scales_of(block, 0)[place] = quantize_slot(x, h, codes);
    int8_t* to = keys + block * kStepSlots * h + place * 2;
    for (int64_t d = 0; d < h; d += 2) std::memcpy(to + d * kStepSlots, codes + d, 2);
  }
  void store_value(int64_t block, int64_t place, int64_t h, const float* x) const {
    int8_t codes[kMaxHeadDim];
    scales_of(block, 1)[place] = quantize_slot(x, h, codes);
    int8_t* to = values + (block * kStepSlots + place / 2 * 2) * h + place % 2;
    for (int64_t d = 0; d < h; ++d) to[2 * d] = codes[d];
  }
};

inline void rotate(const float* x, const float* turn, int64_t h, float* y) {
  const int64_t half = h / 2;
  for (int64_t i = 0; i < half; ++i) {
    y[i] = x[i] * turn[i] - x[half + i] * turn[half + i];
    y[half + i] = x[half + i] * turn[i] + x[i] * turn[half + i];
  }
}

// What does not differ by the types of activations and cache.
struct Tokens {
  Heads heads;
  std::vector<Segment> segments;
  const float* turn;         // [tokens, h]
  std::vector<int64_t> slot;  // of each token; < 0: it is not stored
  std::vector<int64_t> seen;  // last slot each token sees
  Blocks blocks;
};

template <typename X, typename T>
struct Call {
  const Tokens& tokens;
  Attend<T> attend;
  const X* qkv;
  Cache<T> cache;
  X* mixed;
  float* q;  // of each segment [G, tokens, H/G, h], turned and scaled

  const Heads& heads() const { return tokens.heads; }

  float* row(const Segment& s, int64_t g, int64_t r) const {
    return q + (s.first * heads().H + g * s.tokens * heads().group() + r) * heads().h;
  }

  // Token t of the segment with key head g: its queries turned, its key and value stored.
  void store(const Segment& s, int64_t t, int64_t g) const {
    float x[kMaxHeadDim] = {};  // compilers see an h of 0
    float y[kMaxHeadDim];
    const auto [H, G, h] = heads();
    const X* token = qkv + (s.first + t) * (H + 2 * G) * h;
    const float* angle = tokens.turn + (s.first + t) * h;
    const int64_t group = heads().group();
    const auto load = [&x, token, h = h](int64_t n) {
      for (int64_t d = 0; d < h; ++d) x[d] = widen(token[n * h + d]);
    };
    const float scale = 1.0F / std::sqrt(static_cast<float>(h));
    for (int64_t i = 0; i < group; ++i) {
      load(g * group + i);
      rotate(x, angle, h, y);
      float* to = row(s, g, t * group + i);
      for (int64_t d = 0; d < h; ++d) to[d] = y[d] * scale;
    }
    const int64_t slot = tokens.slot[static_cast<size_t>(s.first + t)];
    if (slot < 0) return;
    const int64_t block = tokens.blocks.at(s.row, g, slot);
    load(H + g);
    rotate(x, angle, h, y);
    cache.store_key(block, slot % kStepSlots, h, y);
    load(H + G + g);
    cache.store_value(block, slot % kStepSlots, h, x);
  }

  struct Tile {
    const Segment* segment;
    int64_t g, first_row;
    int m;
    int64_t position[kAttentionRows];
    int64_t slots;  // that the tile's rows see
  };

  Tile tile(const Segment& s, int64_t g, int64_t first_row) const {
    Tile tile{};
    tile.segment = &s;
    tile.g = g;
    tile.first_row = first_row;
    const int64_t rows = s.tokens * heads().group();
    tile.m = static_cast<int>(std::min<int64_t>(kAttentionRows, rows - first_row));
    for (int i = 0; i < tile.m; ++i) {
      const int64_t t = (first_row + i) / heads().group();
      tile.position[i] = tokens.seen[static_cast<size_t>(s.first + t)];
      tile.slots = std::max(tile.slots, tile.position[i] + 1);
    }
    return tile;
  }

  void split(const Tile& t, int64_t first, Partial* partial, float* out) const {
    attend(row(*t.segment, t.g, t.first_row), t.position, t.m, static_cast<int>(heads().h),
           cache.head(tokens.blocks, heads().h, t.segment->row, t.g), first,
           std::min(t.slots, first + kSplitSlots), partial, out);
  }

  // Adds what a later split gives.
  void join(int m, const Partial* partial, const float* out, Partial* all, float* all_out) const {
    const int64_t h = heads().h;
    for (int i = 0; i < m; ++i) {
      const float maximum = std::max(all[i].maximum, partial[i].maximum);
      const float keep = all[i].total == 0 ? 0 : std::exp(all[i].maximum - maximum);
      const float add = partial[i].total == 0 ? 0 : std::exp(partial[i].maximum - maximum);
      all[i] = {maximum, all[i].total * keep + partial[i].total * add};
      for (int64_t d = 0; d < h; ++d)
        all_out[i * h + d] = all_out[i * h + d] * keep + out[i * h + d] * add;
    }
  }

  void finish(const Tile& tile, const Partial* all, const float* all_out) const {
    const auto [H, G, h] = heads();
    const int64_t group = heads().group();
    for (int i = 0; i < tile.m; ++i) {
      const int64_t r = tile.first_row + i;
      const int64_t head = tile.g * group + r % group;
      X* to = mixed + ((tile.segment->first + r / group) * H + head) * h;
      const float inverse = 1.0F / all[i].total;
      for (int64_t d = 0; d < h; ++d) store_output(all_out[i * h + d] * inverse, to + d);
    }
  }

  void whole_tile(const Tile& t) const {
    Partial all[kAttentionRows];
    Partial partial[kAttentionRows];
    float all_out[kAttentionRows * kMaxHeadDim];
    float out[kAttentionRows * kMaxHeadDim];
    split(t, 0, all, all_out);
    for (int64_t first = kSplitSlots; first < t.slots; first += kSplitSlots) {
      split(t, first, partial, out);
      join(t.m, partial, out, all, all_out);
    }
    finish(t, all, all_out);
  }
};

// A tile by its number, and whether it is all that sees what its segment stores for this head.
struct TileName {
  int32_t segment, g;
  int64_t first_row;
  bool alone;
};

inline std::vector<TileName> tiles_of(const Tokens& tokens) {
  std::vector<TileName> names;
  for (size_t i = 0; i < tokens.segments.size(); ++i) {
    const int64_t rows = tokens.segments[i].tokens * tokens.heads.group();
    for (int64_t g = 0; g < tokens.heads.G; ++g)
      for (int64_t r = 0; r < rows; r += kAttentionRows)
        names.push_back({static_cast<int32_t>(i), static_cast<int32_t>(g), r, rows <= kAttentionRows});
  }
  return names;
}

// Every token belongs to one segment, in order.
template <typename X, typename T>
void run(ffi::ThreadPool pool, const Tokens& tokens, Attend<T> attend, const X* qkv,
         const Cache<T>& cache, X* mixed) {
  const Heads& heads = tokens.heads;
  const auto count = static_cast<int64_t>(tokens.seen.size());
  if (count == 0) return;
  const std::unique_ptr<float[]> q(new float[static_cast<size_t>(count * heads.H * heads.h)]);
  const Call<X, T> call{tokens, attend, qkv, cache, mixed, q.get()};
  int64_t slots = 0;
  for (const int64_t seen : tokens.seen) slots += seen + 1;
  const bool serial = slots * heads.H * heads.h * 2 <= kSerialWork;
  const auto each = [&](int64_t number, const auto& body) {
    if (serial) {
      for (int64_t i = 0; i < number; ++i) body(i);
    } else {
      parallel_for(pool, number, body);
    }
  };
  const std::vector<TileName> names = tiles_of(tokens);
  const auto tiles = static_cast<int64_t>(names.size());
  const auto tile_at = [&](int64_t i) {
    const TileName& name = names[static_cast<size_t>(i)];
    return call.tile(tokens.segments[static_cast<size_t>(name.segment)], name.g, name.first_row);
  };
  const int64_t longest = *std::max_element(tokens.seen.begin(), tokens.seen.end()) + 1;
  const int64_t splits = (longest + kSplitSlots - 1) / kSplitSlots;
  const bool whole = splits == 1 || names.size() > kManyTiles;

  // What several tiles see is stored before any of them is begun; the rest by its only tile.
  std::vector<std::pair<int32_t, int64_t>> first;  // segment, token
  for (size_t i = 0; i < tokens.segments.size(); ++i)
    if (!whole || tokens.segments[i].tokens * heads.group() > kAttentionRows)
      for (int64_t t = 0; t < tokens.segments[i].tokens; ++t)
        first.emplace_back(static_cast<int32_t>(i), t);
  const auto store = [&](int64_t i) {
    const auto [segment, t] = first[static_cast<size_t>(i)];
    for (int64_t g = 0; g < heads.G; ++g)
      call.store(tokens.segments[static_cast<size_t>(segment)], t, g);
  };
  const auto stored = static_cast<int64_t>(first.size());
  if (stored < 8) {  // a few us; threads would spend as much on meeting
    for (int64_t i = 0; i < stored; ++i) store(i);
  } else {
    each(stored, store);
  }
  if (whole) {
    return each(tiles, [&](int64_t i) {
      const auto tile = tile_at(i);
      if (names[static_cast<size_t>(i)].alone)
        for (int64_t t = 0; t < tile.segment->tokens; ++t) call.store(*tile.segment, t, tile.g);
      call.whole_tile(tile);
    });
  }
  // Splits are shared out too, and joined in the same order as by whole_tile().
  const int64_t stride = kAttentionRows * heads.h;
  const auto size = static_cast<size_t>(tiles * splits);
  const std::unique_ptr<float[]> out(new float[size * static_cast<size_t>(stride)]);
  const std::unique_ptr<Partial[]> partial(new Partial[size * kAttentionRows]);
  each(tiles * splits, [&](int64_t i) {
    const auto tile = tile_at(i / splits);
    const int64_t slot = i % splits * kSplitSlots;
    if (slot < tile.slots) call.split(tile, slot, &partial[i * kAttentionRows], &out[i * stride]);
  });
  for (int64_t number = 0; number < tiles; ++number) {
    const auto tile = tile_at(number);
    const int64_t i = number * splits;
    for (int64_t n = 1; n < splits && n * kSplitSlots < tile.slots; ++n)
      call.join(tile.m, &partial[(i + n) * kAttentionRows], &out[(i + n) * stride],
                &partial[i * kAttentionRows], &out[i * stride]);
    call.finish(tile, &partial[i * kAttentionRows], &out[i * stride]);
  }
}

template <typename T>
void run_either(ffi::ThreadPool pool, const Tokens& tokens, Attend<T> attend,
                const ffi::AnyBuffer& qkv, const Cache<T>& cache, const ffi::AnyBuffer& mixed) {
  if (qkv.element_type() == ffi::DataType::F32) {
    run(pool, tokens, attend, data<float>(qkv), cache, data<float>(mixed));
  } else {
    run(pool, tokens, attend, data<uint16_t>(qkv), cache, data<uint16_t>(mixed));
  }
}

// ---- checks ------------------------------------------------------------------------------------

inline void require_shape(const char* what, Dims got, const std::vector<int64_t>& wanted) {
  if (got.size() == wanted.size() && std::equal(wanted.begin(), wanted.end(), got.begin())) return;
  std::string all;
  for (const int64_t size : wanted) all += (all.empty() ? "" : ", ") + std::to_string(size);
  throw wrong(what, "[" + all + "]", text(got));
}

inline void require_float(const ffi::AnyBuffer& buffer, const char* what) {
  if (buffer.element_type() != ffi::DataType::F32 && buffer.element_type() != ffi::DataType::BF16)
    throw wrong(what, "f32 or bf16", text(buffer.element_type()));
}

// Of qkv with `all` heads of h dimensions and a cache of G.
inline Heads heads_of(Dims qkv, int64_t all, int64_t G, int64_t h) {
  const Heads heads{all - 2 * G, G, h};
  if (G < 1 || heads.H < 1 || heads.H % G != 0)
    throw wrong("qkv", "a multiple of the cache's " + std::to_string(G) + " heads as queries",
                text(qkv));
  if (h % 16 != 0 || h < 16 || h > kMaxHeadDim)
    throw wrong("qkv", "heads of 16..512 dimensions, a multiple of 16", text(qkv));
  return heads;
}

// XLA hands over results apart from operands: where it could not give them the same memory, the cache
// is copied first.
inline void carry_over(ffi::AnyBuffer from, ffi::AnyBuffer to, const char* what) {
  require_type(to, from.element_type(), what);
  if (to.size_bytes() != from.size_bytes())
    throw wrong("result", "the cache's shape", text(to.dimensions()));
  if (from.untyped_data() != to.untyped_data())
    std::memcpy(to.untyped_data(), from.untyped_data(), from.size_bytes());
}

}  // namespace
}  // namespace bitjax

#endif  // BITJAX_FFI_ATTENTION_CALL_H_
