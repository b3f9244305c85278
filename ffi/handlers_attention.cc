// The custom call of cached attention: it checks its operands, turns queries and keys by their
// positions, stores keys and values in the cache, and attends. Names of dimensions: B sequences, T new
// tokens of each, H query heads, G key heads, h dimensions of a head, S slots of the cache.
//
//   bitjax_attention
//     qkv f32|bf16   [B, T, H + 2G, h]    queries, keys and values of the new tokens
//     turn f32       [B, T, h]            cosines (h/2), then sines of each token's rotary angles
//     positions s32  [B, T]               slot of each new token
//     keys T         [B, G, S/16, h, 16]  T = f32|bf16; attention.h has the layout
//     values T       [B, G, S, h]
//     -> mixed as qkv [B, T, H * h]; keys and values, updated in place
//
// A position outside 0..S-1 is not stored, and its token sees every slot.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "attention.h"
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

Shape shape_of(Dims qkv, Dims turn, Dims positions, Dims keys, Dims values, Dims mixed) {
  if (keys.size() != 5 || keys[4] != kKeyBlock)
    throw wrong("keys", "[B, G, S/16, h, 16]", text(keys));
  if (qkv.size() != 4) throw wrong("qkv", "[B, T, H + 2G, h]", text(qkv));
  Shape s{qkv[0], qkv[1], qkv[2] - 2 * keys[1], keys[1], qkv[3], keys[2] * kKeyBlock};
  if (s.G < 1 || s.H < 1 || s.H % s.G != 0)
    throw wrong("qkv", "a multiple of the cache's " + std::to_string(s.G) + " heads as queries",
                text(qkv));
  if (s.h % 16 != 0 || s.h < 16 || s.h > kMaxHeadDim)
    throw wrong("qkv", "heads of 16..512 dimensions, a multiple of 16", text(qkv));
  if (s.S % kStepSlots != 0 || s.S == 0)
    throw wrong("keys", "slots in multiples of " + std::to_string(kStepSlots), text(keys));
  const auto require = [](const char* what, Dims got, std::initializer_list<int64_t> wanted) {
    if (got.size() == wanted.size() && std::equal(wanted.begin(), wanted.end(), got.begin()))
      return;
    std::string all;
    for (const int64_t size : wanted) all += (all.empty() ? "" : ", ") + std::to_string(size);
    throw wrong(what, "[" + all + "]", text(got));
  };
  require("turn", turn, {s.B, s.T, s.h});
  require("positions", positions, {s.B, s.T});
  require("keys", keys, {s.B, s.G, s.S / kKeyBlock, s.h, kKeyBlock});
  require("values", values, {s.B, s.G, s.S, s.h});
  require("result", mixed, {s.B, s.T, s.H * s.h});
  return s;
}

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
  T* keys;
  T* values;
  X* mixed;
  std::unique_ptr<float[]> q;  // [B, G, T, H/G, h], turned and scaled
  std::vector<int64_t> seen;   // [B, T], last slot each token sees

  float* row(int64_t b, int64_t g, int64_t r) const {
    return &q[((b * s.G + g) * s.rows() + r) * s.h];
  }

  // Token t of sequence b: its queries turned, its keys and values stored.
  void store(int64_t b, int64_t t) const {
    float x[kMaxHeadDim];
    float y[kMaxHeadDim];
    const X* token = qkv + (b * s.T + t) * (s.H + 2 * s.G) * s.h;
    const float* angle = turn + (b * s.T + t) * s.h;
    const int64_t slot = positions[b * s.T + t];
    const bool stored = slot >= 0 && slot < s.S;
    const float scale = 1.0F / std::sqrt(static_cast<float>(s.h));
    for (int64_t n = 0; n < s.H + s.G; ++n) {
      for (int64_t d = 0; d < s.h; ++d) x[d] = widen(token[n * s.h + d]);
      rotate(x, angle, s.h, y);
      if (n < s.H) {
        float* to = row(b, n / s.group(), t * s.group() + n % s.group());
        for (int64_t d = 0; d < s.h; ++d) to[d] = y[d] * scale;
      } else if (stored) {
        T* to = keys + ((b * s.G + n - s.H) * s.S / kKeyBlock + slot / kKeyBlock) * s.h * kKeyBlock +
                slot % kKeyBlock;
        for (int64_t d = 0; d < s.h; ++d) store_output(y[d], to + d * kKeyBlock);
      }
    }
    for (int64_t g = 0; stored && g < s.G; ++g) {
      const X* from = token + (s.H + s.G + g) * s.h;
      T* to = values + ((b * s.G + g) * s.S + slot) * s.h;
      for (int64_t d = 0; d < s.h; ++d) store_output(widen(from[d]), to + d);
    }
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
    const int64_t head = tile.b * s.G + tile.g;
    attend(row(tile.b, tile.g, tile.first_row), tile.position, tile.m, static_cast<int>(s.h),
           keys + head * s.S * s.h, values + head * s.S * s.h, first,
           std::min(tile.slots, first + kSplitSlots), partial, out);
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
         const int32_t* positions, T* keys, T* values, X* mixed) {
  if (s.B * s.T == 0) return;
  Call<X, T> call{s, attend, qkv, turn, positions, keys, values, mixed, nullptr, {}};
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
  const auto store = [&](int64_t i) { call.store(i / s.T, i % s.T); };
  if (s.B * s.T < 8) {  // a few us; threads would spend as much on meeting
    for (int64_t i = 0; i < s.B * s.T; ++i) store(i);
  } else {
    each(s.B * s.T, store);
  }

  const int64_t tiles = s.B * s.G * s.tiles();
  const int64_t longest = *std::max_element(call.seen.begin(), call.seen.end()) + 1;
  const int64_t splits = (longest + kSplitSlots - 1) / kSplitSlots;
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

template <typename X>
void run_with_cache(ffi::ThreadPool pool, const Shape& s, ffi::AnyBuffer qkv, ffi::AnyBuffer turn,
                    ffi::AnyBuffer positions, ffi::AnyBuffer keys, ffi::AnyBuffer values,
                    ffi::AnyBuffer mixed) {
  const AttentionKernel& kernel = active_attention();
  if (keys.element_type() == ffi::DataType::F32) {
    run(pool, s, kernel.attend_f32, data<X>(qkv), data<float>(turn), data<int32_t>(positions),
        data<float>(keys), data<float>(values), data<X>(mixed));
  } else {
    run(pool, s, kernel.attend_bf16, data<X>(qkv), data<float>(turn), data<int32_t>(positions),
        data<uint16_t>(keys), data<uint16_t>(values), data<X>(mixed));
  }
}

// XLA hands over results apart from operands: where it could not give them the same memory, the cache
// is copied first.
void carry_over(ffi::AnyBuffer from, ffi::AnyBuffer to) {
  if (from.untyped_data() != to.untyped_data())
    std::memcpy(to.untyped_data(), from.untyped_data(), from.size_bytes());
}

ffi::Error attention(ffi::ThreadPool pool, ffi::AnyBuffer qkv, ffi::AnyBuffer turn,
                     ffi::AnyBuffer positions, ffi::AnyBuffer keys, ffi::AnyBuffer values,
                     ffi::Result<ffi::AnyBuffer> mixed, ffi::Result<ffi::AnyBuffer> new_keys,
                     ffi::Result<ffi::AnyBuffer> new_values) {
  return guarded(kAttention, [&] {
    for (const auto& [buffer, what] : {std::pair(qkv, "qkv"), std::pair(keys, "keys")})
      if (buffer.element_type() != ffi::DataType::F32 &&
          buffer.element_type() != ffi::DataType::BF16)
        throw wrong(what, "f32 or bf16", text(buffer.element_type()));
    require_type(turn, ffi::DataType::F32, "turn");
    require_type(positions, ffi::DataType::S32, "positions");
    require_type(values, keys.element_type(), "values");
    require_type(*mixed, qkv.element_type(), "result");
    require_type(*new_keys, keys.element_type(), "new keys");
    require_type(*new_values, keys.element_type(), "new values");
    const Shape shape =
        shape_of(qkv.dimensions(), turn.dimensions(), positions.dimensions(), keys.dimensions(),
                 values.dimensions(), mixed->dimensions());
    if (new_keys->size_bytes() != keys.size_bytes() ||
        new_values->size_bytes() != values.size_bytes())
      throw wrong("result", "the cache's shape", text(new_keys->dimensions()));
    carry_over(keys, *new_keys);
    carry_over(values, *new_values);
    (qkv.element_type() == ffi::DataType::F32 ? run_with_cache<float> : run_with_cache<uint16_t>)(
        pool, shape, qkv, turn, positions, *new_keys, *new_values, *mixed);
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

const Registration kAttentionRegistrations[1] = {{kAttention, attention_handler}};

}  // namespace bitjax
