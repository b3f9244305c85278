// The custom call of attention over pages: as handlers_attention.cc, but for new tokens of several
// sequences, any number of each, over a store of pages of 64 slots. Names of dimensions: R rows, each a
// new token, those of a sequence side by side; H query heads, G key heads, h dimensions of a head; P pages;
// Q tables of N pages.
//
//   bitjax_paged_attention
//     qkv f32|bf16   [R, H + 2G, h]     queries, keys and values
//     turn f32       [R, h]             cosines (h/2), then sines of each row's rotary angles
//     positions s32  [R]                slot of each row in its sequence, in 0..64N-1
//     sequences s32  [R]                table of each row, in 0..Q-1
//     tables s32     [Q, N]             pages of each sequence, first slots first, in 0..P-1 as far as
//                                       they are read
//     rows s32       [1]                how many of the R rows are wanted; the others of the result are left
//                                       as they are
//     keys T         [P, G, 1, h, 64]   T = f32|bf16; attention.h has the layout
//     values T       [P, G, 64, h]
//     -> mixed as qkv [R, H * h]; keys and values, updated in place
//
//   bitjax_paged_attention_int8: likewise, with a store of
//     keys s8        [P, G, 1, h/2, 64, 2]
//     values s8      [P, G, 32, h, 2]
//     scales bf16    [P, G, 2, 64]
//
// Rows of one sequence are stored before any of them attends; a page that one sequence stores to in a call
// may be read by no other in the same call.

#include "attention.h"
#include "attention_call.h"
#include "dispatch.h"
#include "handler_common.h"
#include "handlers.h"

namespace bitjax {
namespace {

constexpr char kPaged[] = "bitjax_paged_attention";
constexpr char kPagedInt8[] = "bitjax_paged_attention_int8";

// What both calls have besides the cache.
struct Operands {
  ffi::AnyBuffer qkv, turn, positions, sequences, tables, rows, mixed;
};

void check_shapes(const Operands& in, const Heads& heads, const ffi::AnyBuffer& keys,
                  const ffi::AnyBuffer& values) {
  const auto [H, G, h] = heads;
  const int64_t R = in.qkv.dimensions()[0];
  const int64_t P = keys.dimensions()[0];
  require_shape("turn", in.turn.dimensions(), {R, h});
  require_shape("positions", in.positions.dimensions(), {R});
  require_shape("sequences", in.sequences.dimensions(), {R});
  require_shape("rows", in.rows.dimensions(), {1});
  require_shape("result", in.mixed.dimensions(), {R, H * h});
  if (in.tables.dimensions().size() != 2)
    throw wrong("tables", "[Q, N]", text(in.tables.dimensions()));
  if (keys.element_type() == ffi::DataType::S8) {
    require_shape("keys", keys.dimensions(), {P, G, 1, h / 2, kStepSlots, 2});
    require_shape("values", values.dimensions(), {P, G, kStepSlots / 2, h, 2});
  } else {
    require_shape("keys", keys.dimensions(), {P, G, 1, h, kStepSlots});
    require_shape("values", values.dimensions(), {P, G, kStepSlots, h});
  }
}

void require_within(const char* what, int64_t value, int64_t end) {
  if (value < 0 || value >= end)
    throw wrong(what, "0.." + std::to_string(end - 1), std::to_string(value));
}

Tokens check(const Operands& in, const ffi::AnyBuffer& keys, const ffi::AnyBuffer& values) {
  require_float(in.qkv, "qkv");
  require_type(in.turn, ffi::DataType::F32, "turn");
  for (const auto& [buffer, what] :
       {std::pair(in.positions, "positions"), std::pair(in.sequences, "sequences"),
        std::pair(in.tables, "tables"), std::pair(in.rows, "rows")})
    require_type(buffer, ffi::DataType::S32, what);
  require_type(values, keys.element_type(), "values");
  require_type(in.mixed, in.qkv.element_type(), "result");
  const Dims qkv = in.qkv.dimensions();
  if (qkv.size() != 3) throw wrong("qkv", "[R, H + 2G, h]", text(qkv));
  if (keys.dimensions().size() < 5) throw wrong("keys", "[P, G, 1, ...]", text(keys.dimensions()));
  const Heads heads = heads_of(qkv, qkv[1], keys.dimensions()[1], qkv[2]);
  check_shapes(in, heads, keys, values);

  const int64_t P = keys.dimensions()[0];
  const int64_t Q = in.tables.dimensions()[0];
  const int64_t N = in.tables.dimensions()[1];
  const int32_t* tables = data<int32_t>(in.tables);
  const int32_t* position = data<int32_t>(in.positions);
  const int32_t* sequence = data<int32_t>(in.sequences);
  Tokens tokens{heads, {}, data<float>(in.turn), {}, {}, {tables, N, heads.G}};
  const int64_t rows = std::clamp<int64_t>(*data<int32_t>(in.rows), 0, qkv[0]);
  for (int64_t r = 0; r < rows; ++r) {
    require_within("sequences", sequence[r], Q);
    require_within("positions", position[r], N * kStepSlots);
    if (r == 0 || sequence[r] != sequence[r - 1]) tokens.segments.push_back({r, 0, sequence[r]});
    ++tokens.segments.back().tokens;
    tokens.slot.push_back(position[r]);
    tokens.seen.push_back(position[r]);
  }
  for (const Segment& s : tokens.segments) {
    const auto first = tokens.seen.begin() + s.first;
    const int64_t last = *std::max_element(first, first + s.tokens);
    for (int64_t n = 0; n <= last / kStepSlots; ++n)
      require_within("tables", tables[s.row * N + n], P);
  }
  return tokens;
}

ffi::Error paged(ffi::ThreadPool pool, ffi::AnyBuffer qkv, ffi::AnyBuffer turn,
                 ffi::AnyBuffer positions, ffi::AnyBuffer sequences, ffi::AnyBuffer tables,
                 ffi::AnyBuffer rows, ffi::AnyBuffer keys, ffi::AnyBuffer values,
                 ffi::Result<ffi::AnyBuffer> mixed, ffi::Result<ffi::AnyBuffer> new_keys,
                 ffi::Result<ffi::AnyBuffer> new_values) {
  return guarded(kPaged, [&] {
    require_float(keys, "keys");
    const Tokens tokens =
        check({qkv, turn, positions, sequences, tables, rows, *mixed}, keys, values);
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

ffi::Error paged_int8(ffi::ThreadPool pool, ffi::AnyBuffer qkv, ffi::AnyBuffer turn,
                      ffi::AnyBuffer positions, ffi::AnyBuffer sequences, ffi::AnyBuffer tables,
                      ffi::AnyBuffer rows, ffi::AnyBuffer keys, ffi::AnyBuffer values,
                      ffi::AnyBuffer scales, ffi::Result<ffi::AnyBuffer> mixed,
                      ffi::Result<ffi::AnyBuffer> new_keys, ffi::Result<ffi::AnyBuffer> new_values,
                      ffi::Result<ffi::AnyBuffer> new_scales) {
  return guarded(kPagedInt8, [&] {
    require_type(keys, ffi::DataType::S8, "keys");
    const Tokens tokens =
        check({qkv, turn, positions, sequences, tables, rows, *mixed}, keys, values);
    require_type(scales, ffi::DataType::BF16, "scales");
    require_shape("scales", scales.dimensions(),
                  {keys.dimensions()[0], tokens.heads.G, 2, kStepSlots});
    carry_over(keys, *new_keys, "new keys");
    carry_over(values, *new_values, "new values");
    carry_over(scales, *new_scales, "new scales");
    const AttentionKernel& kernel = active_attention();
    count_call(kernel);
    run_either<int8_t>(pool, tokens, kernel.attend_int8, qkv,
                       {data<int8_t>(*new_keys), data<int8_t>(*new_values),
                        data<uint16_t>(*new_scales), kStepSlots},
                       *mixed);
  });
}

}  // namespace

#define BITJAX_PAGED_OPERANDS                \
  Ctx<ffi::ThreadPool>()                     \
      .Arg<ffi::AnyBuffer>() /* qkv */       \
      .Arg<ffi::AnyBuffer>() /* turn */      \
      .Arg<ffi::AnyBuffer>() /* positions */ \
      .Arg<ffi::AnyBuffer>() /* sequences */ \
      .Arg<ffi::AnyBuffer>() /* tables */    \
      .Arg<ffi::AnyBuffer>() /* rows */      \
      .Arg<ffi::AnyBuffer>() /* keys */      \
      .Arg<ffi::AnyBuffer>() /* values */

XLA_FFI_DEFINE_HANDLER(paged_handler, paged,
                       ffi::Ffi::Bind()
                           .BITJAX_PAGED_OPERANDS
                           .Ret<ffi::AnyBuffer>()    // mixed
                           .Ret<ffi::AnyBuffer>()    // keys
                           .Ret<ffi::AnyBuffer>());  // values

XLA_FFI_DEFINE_HANDLER(paged_int8_handler, paged_int8,
                       ffi::Ffi::Bind()
                           .BITJAX_PAGED_OPERANDS
                           .Arg<ffi::AnyBuffer>()    // scales
                           .Ret<ffi::AnyBuffer>()    // mixed
                           .Ret<ffi::AnyBuffer>()    // keys
                           .Ret<ffi::AnyBuffer>()    // values
                           .Ret<ffi::AnyBuffer>());  // scales

const Registration kPagedRegistrations[2] = {{kPaged, paged_handler},
                                             {kPagedInt8, paged_int8_handler}};

}  // namespace bitjax
