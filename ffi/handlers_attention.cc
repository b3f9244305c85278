// The custom call of cached attention: it checks its operands; attention_call.h does the work. Names of
// dimensions: B sequences, T new
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

#include "attention.h"
#include "attention_call.h"
#include "dispatch.h"
#include "handler_common.h"
#include "handlers.h"

namespace bitjax {
namespace {

constexpr char kAttention[] = "bitjax_attention";
constexpr char kAttentionInt8[] = "bitjax_attention_int8";

// What both calls have besides the cache.
struct Operands {
  ffi::AnyBuffer qkv, turn, positions, mixed;
};

Tokens check(const Operands& in, const ffi::AnyBuffer& key_buffer, const ffi::AnyBuffer& values) {
  require_float(in.qkv, "qkv");
  require_type(in.turn, ffi::DataType::F32, "turn");
  require_type(in.positions, ffi::DataType::S32, "positions");
  require_type(values, key_buffer.element_type(), "values");
  require_type(in.mixed, in.qkv.element_type(), "result");
  const Dims qkv = in.qkv.dimensions();
  const Dims keys = key_buffer.dimensions();
  const bool int8 = key_buffer.element_type() == ffi::DataType::S8;
  if (int8 ? keys.size() != 6 || keys[4] != kStepSlots || keys[5] != 2
           : keys.size() != 5 || keys[4] != kStepSlots)
    throw wrong("keys", int8 ? "[B, G, S/64, h/2, 64, 2]" : "[B, G, S/64, h, 64]", text(keys));
  if (qkv.size() != 4) throw wrong("qkv", "[B, T, H + 2G, h]", text(qkv));
  const int64_t B = qkv[0];
  const int64_t T = qkv[1];
  const int64_t blocks = keys[2];
  const int64_t S = blocks * kStepSlots;
  const Heads heads = heads_of(qkv, qkv[2], keys[1], qkv[3]);
  const auto [H, G, h] = heads;
  if (S == 0) throw wrong("keys", "at least one block of slots", text(keys));
  require_shape("turn", in.turn.dimensions(), {B, T, h});
  require_shape("positions", in.positions.dimensions(), {B, T});
  if (int8) {
    require_shape("keys", keys, {B, G, blocks, h / 2, kStepSlots, 2});
    require_shape("values", values.dimensions(), {B, G, S / 2, h, 2});
  } else {
    require_shape("keys", keys, {B, G, blocks, h, kStepSlots});
    require_shape("values", values.dimensions(), {B, G, S, h});
  }
  require_shape("result", in.mixed.dimensions(), {B, T, H * h});
  Tokens tokens{heads, {}, data<float>(in.turn), {}, {}, {nullptr, blocks, G}};
  const int32_t* position = data<int32_t>(in.positions);
  for (int64_t b = 0; b < B && T > 0; ++b) tokens.segments.push_back({b * T, T, b});
  for (int64_t i = 0; i < B * T; ++i) {
    const bool inside = position[i] >= 0 && position[i] < S;
    tokens.slot.push_back(inside ? position[i] : -1);
    tokens.seen.push_back(inside ? position[i] : S - 1);
  }
  return tokens;
}

ffi::Error attention(ffi::ThreadPool pool, ffi::AnyBuffer qkv, ffi::AnyBuffer turn,
                     ffi::AnyBuffer positions, ffi::AnyBuffer keys, ffi::AnyBuffer values,
                     ffi::Result<ffi::AnyBuffer> mixed, ffi::Result<ffi::AnyBuffer> new_keys,
                     ffi::Result<ffi::AnyBuffer> new_values) {
  return guarded(kAttention, [&] {
    require_float(keys, "keys");
    const Tokens tokens = check({qkv, turn, positions, *mixed}, keys, values);
    carry_over(keys, *new_keys, "new keys");
    carry_over(values, *new_values, "new values");
    const AttentionKernel& kernel = active_attention();
    count_call(kernel);
    if (keys.element_type() == ffi::DataType::F32) {
      run_either<float>(pool, tokens, kernel.attend_f32, qkv,
                        {data<float>(*new_keys), data<float>(*new_values)}, *mixed);
    } else {
      run_either<uint16_t>(pool, tokens, kernel.attend_bf16, qkv,
                           {data<uint16_t>(*new_keys), data<uint16_t>(*new_values)}, *mixed);
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
    require_type(keys, ffi::DataType::S8, "keys");
    const Tokens tokens = check({qkv, turn, positions, *mixed}, keys, values);
    const int64_t slots = tokens.blocks.per_row * kStepSlots;
    require_type(scales, ffi::DataType::BF16, "scales");
    require_shape("scales", scales.dimensions(), {keys.dimensions()[0], tokens.heads.G, 2, slots});
    carry_over(keys, *new_keys, "new keys");
    carry_over(values, *new_values, "new values");
    carry_over(scales, *new_scales, "new scales");
    const AttentionKernel& kernel = active_attention();
    count_call(kernel);
    run_either<int8_t>(
        pool, tokens, kernel.attend_int8, qkv,
        {data<int8_t>(*new_keys), data<int8_t>(*new_values), data<uint16_t>(*new_scales), slots},
        *mixed);
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
