// The custom call of cached attention: it checks its operands, turns queries and keys by their
// positions, stores keys and values in the cache, and attends. Names of dimensions: B sequences, T new
// tokens of each, H query heads, G key heads, h dimensions of a head, S slots of the cache.
//
//   bitjax_attention
//     qkv f32|bf16   [B, T, H + 2G, h]    queries, keys and values of the new tokens
//     turn f32       [B, T, h]            cosines (h/2), then sines of each token's rotary angles
//     positions s32  [B, T]               slot of each new token
//     keys T         [B, G, S/64, h, 64]  T = f32|bf16; attention.h has the layout
//     values T       [B, G, S, h]
//     -> mixed as qkv [B, T, H * h]; keys and values, updated in place
//
//   bitjax_attention_int8: likewise, with a cache of
//     keys s8        [B, G, S/64, h/2, 64, 2]
//     values s8      [B, G, S/2, h, 2]
//     scales bf16    [B, G, 2, S]
//
// A position outside 0..S-1 is not stored, and its token sees every slot.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "attention.h"
#include "cache_int8.h"
#include "dispatch.h"
#include "epilogue.h"
#include "handler_common.h"
#include "handlers.h"
#include "parallel.h"

namespace bitjax {
namespace {

// Multiply-adds that stay on the calling thread: a us of an AVX-512 core. Little, because the cache
// comes from memory, and because a pool's thread that has nothing to do for some 25 us goes to sleep,
// from which the product that follows would have to wake it (20-50 us in a virtual machine).
constexpr int64_t kSerialWork = int64_t{1} << 16;

struct Shape {
  int64_t B, T, H, G, h, S;
  int64_t group() const { return H / G; }
  int64_t rows() const { return T * group(); }  // of one sequence and key head
  int64_t tiles() const { return (rows() + kAttentionRows - 1) / kAttentionRows; }
};

void require_shape(const char* what, Dims got, const std::vector<int64_t>& wanted) {
  if (got.size() == wanted.size() && std::equal(wanted.begin(), wanted.end(), got.begin())) return;
  std::string all;
  for (const int64_t size : wanted) all += (all.empty() ? "" : ", ") + std::to_string(size);
  throw wrong(what, "[" + all + "]", text(got));
}

Shape shape_of(Dims qkv, Dims turn, Dims positions, Dims keys, bool int8, Dims values, Dims mixed) {
  if (int8 ? keys.size() != 6 || keys[4] != kStepSlots || keys[5] != 2
           : keys.size() != 5 || keys[4] != kStepSlots)
    throw wrong("keys", int8 ? "[B, G, S/64, h/2, 64, 2]" : "[B, G, S/64, h, 64]", text(keys));
  if (qkv.size() != 4) throw wrong("qkv", "[B, T, H + 2G, h]", text(qkv));
  Shape s{qkv[0], qkv[1], qkv[2] - 2 * keys[1], keys[1], qkv[3], keys[2] * kStepSlots};
  if (s.G < 1 || s.H < 1 || s.H % s.G != 0)
    throw wrong("qkv", "a multiple of the cache's " + std::to_string(s.G) + " heads as queries",
                text(qkv));
  if (s.h % 16 != 0 || s.h < 16 || s.h > kMaxHeadDim)
    throw wrong("qkv", "heads of 16..512 dimensions, a multiple of 16", text(qkv));
  if (s.S == 0) throw wrong("keys", "at least one block of slots", text(keys));
  require_shape("turn", turn, {s.B, s.T, s.h});
  require_shape("positions", positions, {s.B, s.T});
  if (int8) {
    require_shape("keys", keys, {s.B, s.G, s.S / kStepSlots, s.h / 2, kStepSlots, 2});
    require_shape("values", values, {s.B, s.G, s.S / 2, s.h, 2});
  } else {
    require_shape("keys", keys, {s.B, s.G, s.S / kStepSlots, s.h, kStepSlots});
    require_shape("values", values, {s.B, s.G, s.S, s.h});
  }
  require_shape("result", mixed, {s.B, s.T, s.H * s.h});
  return s;
}

// All of a cache; T = uint16_t is bfloat16.
template <typename T>
struct Cache {
  T* keys;
  T* values;

  HeadCache<T> head(const Shape& s, int64_t n) const {
    return {keys + n * s.S * s.h, values + n * s.S * s.h};
  }
  void store_key(const Shape& s, int64_t n, int64_t slot, const float* x) const {
    T* to = keys + (n * s.S + slot / kStepSlots * kStepSlots) * s.h + slot % kStepSlots;
    for (int64_t d = 0; d < s.h; ++d) store_output(x[d], to + d * kStepSlots);
  }
  void store_value(const Shape& s, int64_t n, int64_t slot, const float* x) const {
    T* to = values + (n * s.S + slot) * s.h;
    for (int64_t d = 0; d < s.h; ++d) store_output(x[d], to + d);
  }
};

template <>
struct Cache<int8_t> {
  int8_t* keys;
  int8_t* values;
  uint16_t* scales;

  HeadCache<int8_t> head(const Shape& s, int64_t n) const {
    const uint16_t* key_scale = scales + 2 * n * s.S;
    return {keys + n * s.S * s.h, values + n * s.S * s.h, key_scale, key_scale + s.S};
  }
  void store_key(const Shape& s, int64_t n, int64_t slot, const float* x) const {
    int8_t codes[kMaxHeadDim];
    scales[2 * n * s.S + slot] = quantize_slot(x, s.h, codes);
    int8_t* to = keys + (n * s.S + slot / kStepSlots * kStepSlots) * s.h + slot % kStepSlots * 2;
    for (int64_t d = 0; d < s.h; d += 2) std::memcpy(to + d * kStepSlots, codes + d, 2);
  }
  void store_value(const Shape& s, int64_t n, int64_t slot, const float* x) const {
    int8_t codes[kMaxHeadDim];
    scales[(2 * n + 1) * s.S + slot] = quantize_slot(x, s.h, codes);
    int8_t* to = values + (n * s.S + slot / 2 * 2) * s.h + slot % 2;
    for (int64_t d = 0; d < s.h; ++d) to[2 * d] = codes[d];
  }
};

void rotate(const float* x, const float* turn, int64_t h, float* y) {
  const int64_t half = h / 2;
  for (int64_t i = 0; i < half; ++i) {
    y[i] = x[i] * turn[i] - x[half + i] * turn[half + i];
    y[half + i] = x[half + i] * turn[i] + x[i] * turn[half + i];
  }
}

template <typename X, typename T>
struct Call {
  const Shape& s;
  Attend<T> attend;
  const X* qkv;
  const float* turn;
  const int32_t* positions;
  Cache<T> cache;
  X* mixed;
  std::unique_ptr<float[]> q;  // [B, G, T, H/G, h], turned and scaled
  std::vector<int64_t> seen;   // [B, T], last slot each token sees

  float* row(int64_t b, int64_t g, int64_t r) const {
    return &q[((b * s.G + g) * s.rows() + r) * s.h];
  }

  // Token t of sequence b with key head g: its queries turned, its key and value stored.
  void store(int64_t b, int64_t t, int64_t g) const {
    float x[kMaxHeadDim];
    float y[kMaxHeadDim];
    const X* token = qkv + (b * s.T + t) * (s.H + 2 * s.G) * s.h;
    const float* angle = turn + (b * s.T + t) * s.h;
    const auto load = [&](int64_t n) {
      for (int64_t d = 0; d < s.h; ++d) x[d] = widen(token[n * s.h + d]);
    };
    const float scale = 1.0F / std::sqrt(static_cast<float>(s.h));
    for (int64_t i = 0; i < s.group(); ++i) {
      load(g * s.group() + i);
      rotate(x, angle, s.h, y);
      float* to = row(b, g, t * s.group() + i);
      for (int64_t d = 0; d < s.h; ++d) to[d] = y[d] * scale;
    }
    const int64_t slot = positions[b * s.T + t];
    if (slot < 0 || slot >= s.S) return;
    load(s.H + g);
    rotate(x, angle, s.h, y);
    cache.store_key(s, b * s.G + g, slot, y);
    load(s.H + s.G + g);
    cache.store_value(s, b * s.G + g, slot, x);
  }

  struct Tile {
    int64_t b, g, first_row;
    int m;
    int64_t position[kAttentionRows];
    int64_t slots;  // that the tile's rows see
  };

  Tile tile(int64_t number) const {
    Tile tile{};
    tile.b = number / (s.G * s.tiles());
    tile.g = number / s.tiles() % s.G;
    tile.first_row = number % s.tiles() * kAttentionRows;
    tile.m = static_cast<int>(std::min<int64_t>(kAttentionRows, s.rows() - tile.first_row));
    for (int i = 0; i < tile.m; ++i) {
      tile.position[i] = seen[static_cast<size_t>(tile.b * s.T + (tile.first_row + i) / s.group())];
      tile.slots = std::max(tile.slots, tile.position[i] + 1);
    }
    return tile;
  }

  void split(const Tile& tile, int64_t first, Partial* partial, float* out) const {
    attend(row(tile.b, tile.g, tile.first_row), tile.position, tile.m, static_cast<int>(s.h),
           cache.head(s, tile.b * s.G + tile.g), first, std::min(tile.slots, first + kSplitSlots),
           partial, out);
  }

  // Adds what a later split gives.
  void join(int m, const Partial* partial, const float* out, Partial* all, float* all_out) const {
    for (int i = 0; i < m; ++i) {
      const float maximum = std::max(all[i].maximum, partial[i].maximum);
      const float keep = all[i].total == 0 ? 0 : std::exp(all[i].maximum - maximum);
      const float add = partial[i].total == 0 ? 0 : std::exp(partial[i].maximum - maximum);
      all[i] = {maximum, all[i].total * keep + partial[i].total * add};
      for (int64_t d = 0; d < s.h; ++d)
        all_out[i * s.h + d] = all_out[i * s.h + d] * keep + out[i * s.h + d] * add;
    }
  }

  void finish(const Tile& tile, const Partial* all, const float* all_out) const {
    for (int i = 0; i < tile.m; ++i) {
      const int64_t r = tile.first_row + i;
      const int64_t head = tile.g * s.group() + r % s.group();
      X* to = mixed + ((tile.b * s.T + r / s.group()) * s.H + head) * s.h;
      const float inverse = 1.0F / all[i].total;
      for (int64_t d = 0; d < s.h; ++d) store_output(all_out[i * s.h + d] * inverse, to + d);
    }
  }

  void whole_tile(int64_t number) const {
    Partial all[kAttentionRows];
    Partial partial[kAttentionRows];
    float all_out[kAttentionRows * kMaxHeadDim];
    float out[kAttentionRows * kMaxHeadDim];
    const Tile t = tile(number);
    split(t, 0, all, all_out);
    for (int64_t first = kSplitSlots; first < t.slots; first += kSplitSlots) {
      split(t, first, partial, out);
      join(t.m, partial, out, all, all_out);
    }
    finish(t, all, all_out);
  }
};

template <typename X, typename T>
void run(ffi::ThreadPool pool, const Shape& s, Attend<T> attend, const X* qkv, const float* turn,
         const int32_t* positions, const Cache<T>& cache, X* mixed) {
  if (s.B * s.T == 0) return;
  Call<X, T> call{s, attend, qkv, turn, positions, cache, mixed, nullptr, {}};
  call.q.reset(new float[static_cast<size_t>(s.B * s.T * s.H * s.h)]);
  int64_t slots = 0;
  for (int64_t i = 0; i < s.B * s.T; ++i) {
    const int64_t p = positions[i];
    call.seen.push_back(p < 0 || p >= s.S ? s.S - 1 : p);
    slots += call.seen.back() + 1;
  }
  const bool serial = slots * s.H * s.h * 2 <= kSerialWork;
  const auto each = [&](int64_t count, const auto& body) {
    if (serial) {
      for (int64_t i = 0; i < count; ++i) body(i);
    } else {
      parallel_for(pool, count, body);
    }
  };
  const int64_t tiles = s.B * s.G * s.tiles();
  const int64_t longest = *std::max_element(call.seen.begin(), call.seen.end()) + 1;
  const int64_t splits = (longest + kSplitSlots - 1) / kSplitSlots;
  if (splits == 1 && s.tiles() == 1) {  // a tile is all that sees what it stores
    return each(tiles, [&](int64_t number) {
      for (int64_t t = 0; t < s.T; ++t) call.store(number / s.G, t, number % s.G);
      call.whole_tile(number);
    });
  }
  const auto store = [&](int64_t i) {
    for (int64_t g = 0; g < s.G; ++g) call.store(i / s.T, i % s.T, g);
  };
  if (s.B * s.T < 8) {  // a few us; threads would spend as much on meeting
    for (int64_t i = 0; i < s.B * s.T; ++i) store(i);
  } else {
    each(s.B * s.T, store);
  }
  if (splits == 1 || s.tiles() > 8) {  // enough tiles to share out whole
    return each(tiles, [&](int64_t number) { call.whole_tile(number); });
  }
  // Splits are shared out too, and joined in the same order as above.
  const int64_t stride = kAttentionRows * s.h;
  const auto size = static_cast<size_t>(tiles * splits);
  const std::unique_ptr<float[]> out(new float[size * static_cast<size_t>(stride)]);
  const std::unique_ptr<Partial[]> partial(new Partial[size * kAttentionRows]);
  each(tiles * splits, [&](int64_t i) {
    const auto tile = call.tile(i / splits);
    const int64_t first = i % splits * kSplitSlots;
    if (first < tile.slots) call.split(tile, first, &partial[i * kAttentionRows], &out[i * stride]);
  });
  for (int64_t number = 0; number < tiles; ++number) {
    const auto tile = call.tile(number);
    const int64_t i = number * splits;
    for (int64_t n = 1; n < splits && n * kSplitSlots < tile.slots; ++n)
      call.join(tile.m, &partial[(i + n) * kAttentionRows], &out[(i + n) * stride],
                &partial[i * kAttentionRows], &out[i * stride]);
    call.finish(tile, &partial[i * kAttentionRows], &out[i * stride]);
  }
}

constexpr char kAttention[] = "bitjax_attention";
constexpr char kAttentionInt8[] = "bitjax_attention_int8";

// What both calls have besides the cache.
struct Tokens {
  ffi::AnyBuffer qkv, turn, positions, mixed;
};

template <typename T>
void run_tokens(ffi::ThreadPool pool, const Shape& s, Attend<T> attend, const Tokens& t,
                const Cache<T>& cache) {
  const auto run_typed = [&](auto* mixed) {
    run(pool, s, attend, data<std::remove_pointer_t<decltype(mixed)>>(t.qkv), data<float>(t.turn),
        data<int32_t>(t.positions), cache, mixed);
  };
  if (t.qkv.element_type() == ffi::DataType::F32) {
    run_typed(data<float>(t.mixed));
  } else {
    run_typed(data<uint16_t>(t.mixed));
  }
}

void require_float(const ffi::AnyBuffer& buffer, const char* what) {
  if (buffer.element_type() != ffi::DataType::F32 && buffer.element_type() != ffi::DataType::BF16)
    throw wrong(what, "f32 or bf16", text(buffer.element_type()));
}

Shape check(const Tokens& t, const ffi::AnyBuffer& keys, const ffi::AnyBuffer& values) {
  require_float(t.qkv, "qkv");
  require_type(t.turn, ffi::DataType::F32, "turn");
  require_type(t.positions, ffi::DataType::S32, "positions");
  require_type(values, keys.element_type(), "values");
  require_type(t.mixed, t.qkv.element_type(), "result");
  return shape_of(t.qkv.dimensions(), t.turn.dimensions(), t.positions.dimensions(),
                  keys.dimensions(), keys.element_type() == ffi::DataType::S8, values.dimensions(),
                  t.mixed.dimensions());
}

// XLA hands over results apart from operands: where it could not give them the same memory, the cache
// is copied first.
void carry_over(ffi::AnyBuffer from, ffi::AnyBuffer to, const char* what) {
  require_type(to, from.element_type(), what);
  if (to.size_bytes() != from.size_bytes())
    throw wrong("result", "the cache's shape", text(to.dimensions()));
  if (from.untyped_data() != to.untyped_data())
    std::memcpy(to.untyped_data(), from.untyped_data(), from.size_bytes());
}

ffi::Error attention(ffi::ThreadPool pool, ffi::AnyBuffer qkv, ffi::AnyBuffer turn,
                     ffi::AnyBuffer positions, ffi::AnyBuffer keys, ffi::AnyBuffer values,
                     ffi::Result<ffi::AnyBuffer> mixed, ffi::Result<ffi::AnyBuffer> new_keys,
                     ffi::Result<ffi::AnyBuffer> new_values) {
  return guarded(kAttention, [&] {
    const Tokens tokens{qkv, turn, positions, *mixed};
    require_float(keys, "keys");
    const Shape shape = check(tokens, keys, values);
    carry_over(keys, *new_keys, "new keys");
    carry_over(values, *new_values, "new values");
    const AttentionKernel& kernel = active_attention();
    count_call(kernel);
    if (keys.element_type() == ffi::DataType::F32) {
      run_tokens<float>(pool, shape, kernel.attend_f32, tokens,
                        {data<float>(*new_keys), data<float>(*new_values)});
    } else {
      run_tokens<uint16_t>(pool, shape, kernel.attend_bf16, tokens,
                           {data<uint16_t>(*new_keys), data<uint16_t>(*new_values)});
    }
  });
}

ffi::Error attention_int8(ffi::ThreadPool pool, ffi::AnyBuffer qkv, ffi::AnyBuffer turn,
                          ffi::AnyBuffer positions, ffi::AnyBuffer keys, ffi::AnyBuffer values,
                          ffi::AnyBuffer scales, ffi::Result<ffi::AnyBuffer> mixed,
                          ffi::Result<ffi::AnyBuffer> new_keys,
                          ffi::Result<ffi::AnyBuffer> new_values,
                          ffi::Result<ffi::AnyBuffer> new_scales) {
  return guarded(kAttentionInt8, [&] {
    const Tokens tokens{qkv, turn, positions, *mixed};
    require_type(keys, ffi::DataType::S8, "keys");
    const Shape shape = check(tokens, keys, values);
    require_type(scales, ffi::DataType::BF16, "scales");
    require_shape("scales", scales.dimensions(), {shape.B, shape.G, 2, shape.S});
    carry_over(keys, *new_keys, "new keys");
    carry_over(values, *new_values, "new values");
    carry_over(scales, *new_scales, "new scales");
    const AttentionKernel& kernel = active_attention();
    count_call(kernel);
    run_tokens<int8_t>(
        pool, shape, kernel.attend_int8, tokens,
        {data<int8_t>(*new_keys), data<int8_t>(*new_values), data<uint16_t>(*new_scales)});
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER(attention_handler, attention,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Arg<ffi::AnyBuffer>()    // qkv
                           .Arg<ffi::AnyBuffer>()    // turn
                           .Arg<ffi::AnyBuffer>()    // positions
                           .Arg<ffi::AnyBuffer>()    // keys
                           .Arg<ffi::AnyBuffer>()    // values
                           .Ret<ffi::AnyBuffer>()    // mixed
                           .Ret<ffi::AnyBuffer>()    // keys
                           .Ret<ffi::AnyBuffer>());  // values

XLA_FFI_DEFINE_HANDLER(attention_int8_handler, attention_int8,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Arg<ffi::AnyBuffer>()    // qkv
                           .Arg<ffi::AnyBuffer>()    // turn
                           .Arg<ffi::AnyBuffer>()    // positions
                           .Arg<ffi::AnyBuffer>()    // keys
                           .Arg<ffi::AnyBuffer>()    // values
                           .Arg<ffi::AnyBuffer>()    // scales
                           .Ret<ffi::AnyBuffer>()    // mixed
                           .Ret<ffi::AnyBuffer>()    // keys
                           .Ret<ffi::AnyBuffer>()    // values
                           .Ret<ffi::AnyBuffer>());  // scales

const Registration kAttentionRegistrations[2] = {{kAttention, attention_handler},
                                                 {kAttentionInt8, attention_int8_handler}};

}  // namespace bitjax
