// Custom calls on rows of activations where XLA's own sums would take another order for another number
// of rows: here a row's result depends on the row alone. Names of dimensions: M rows, K inputs, N outputs.
//
//   bitjax_prepare {gate: s64, eps: f32}
//     x f32|bf16     [M, K], or [M, 2K] with a gate
//     norm f32       [K], or [0]: no norm
//     rows s32       [1], how many of the M rows are wanted; the others are left as they are
//     -> y as x      [M, K] = norm(gate(x)), in float32 between
//   bitjax_float_matmul
//     x f32|bf16     [M, K]
//     table f32|bf16 [N, K]
//     rows s32       [1]
//     -> y f32       [M, N] = x table^T, sums in float32 in the order of kernel.h's dot products
//   bitjax_screen_parts
//     x f32          [M, D]
//     dither f32     [D]
//     rows s32       [1]
//     -> parts f32   [M, 1, E]   expand(x), rounded to int8 by its largest element; E = 32 ceil(D / 31),
//                                see bitjax/packing.py (Screen)

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "dispatch.h"
#include "epilogue.h"
#include "handler_common.h"
#include "handlers.h"
#include "kernel.h"
#include "parallel.h"

namespace bitjax {
namespace {

// Multiply-adds of a chunk of a float product: some 10 us. A table's rows stay in the cache for all rows of x.
constexpr int64_t kChunkWork = int64_t{1} << 18;
constexpr int64_t kSerialValues = int64_t{1} << 14;  // that one thread prepares alone: some us

constexpr int64_t kGroupInputs =
    spec(Layout::kInt4).group_blocks * spec(Layout::kInt4).block_inputs();
constexpr int64_t kScreenGroup = kGroupInputs - 1;
constexpr float kDitherCode = 7;

int64_t rows_of(const ffi::AnyBuffer& x, const ffi::AnyBuffer& rows) {
  if (x.dimensions().size() != 2) throw wrong("x", "[M, K]", text(x.dimensions()));
  require_type(rows, ffi::DataType::S32, "rows");
  if (rows.element_count() != 1) throw wrong("rows", "one number", text(rows.dimensions()));
  return std::clamp<int64_t>(*data<int32_t>(rows), 0, x.dimensions()[0]);
}

bool is_bf16(const ffi::AnyBuffer& buffer, const char* what) {
  const bool bf16 = buffer.element_type() == ffi::DataType::BF16;
  if (!bf16) require_type(buffer, ffi::DataType::F32, what);
  return bf16;
}

void require_result(const ffi::AnyBuffer& y, std::initializer_list<int64_t> wanted) {
  const Dims dims = y.dimensions();
  if (dims.size() != wanted.size() || !std::equal(wanted.begin(), wanted.end(), dims.begin()))
    throw wrong("result", "the shape of the operands' product", text(dims));
}

template <typename Pool, typename Body>
void each_row(Pool& pool, int64_t rows, int64_t values, const Body& body) {
  if (rows * values <= kSerialValues) {
    for (int64_t r = 0; r < rows; ++r) body(r);
  } else {
    parallel_for(pool, rows, body);
  }
}

constexpr char kPrepare[] = "bitjax_prepare";

template <typename X>
void prepare_rows(ffi::ThreadPool pool, const X* x, int64_t rows, int64_t k, int64_t gate,
                  const float* norm, float eps, X* y) {
  const Kernel& kernel = active_kernel();
  const int64_t width = gate == 0 ? k : 2 * k;
  const std::unique_ptr<float[]> room(new float[static_cast<size_t>(rows * 3 * k)]);
  each_row(pool, rows, width, [&](int64_t r) {
    float* wide = room.get() + r * 3 * k;
    float* result = wide + 2 * k;
    for (int64_t i = 0; i < width; ++i) wide[i] = widen(x[r * width + i]);
    const float* row = wide;
    if (gate != 0) {
      (gate == 1 ? kernel.relu2_gate : kernel.silu_gate)(row, k, result);
      row = result;
    }
    if (norm != nullptr) {
      kernel.rms_norm(row, k, norm, eps, result);
      row = result;
    }
    for (int64_t i = 0; i < k; ++i) store_output(row[i], y + r * k + i);
  });
}

ffi::Error prepare(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer norm, ffi::AnyBuffer rows,
                   ffi::Result<ffi::AnyBuffer> y, int64_t gate, float eps) {
  return guarded(kPrepare, [&] {
    const bool bf16 = is_bf16(x, "x");
    const int64_t count = rows_of(x, rows);
    require_type(norm, ffi::DataType::F32, "norm");
    require_type(*y, x.element_type(), "result");
    if (gate < 0 || gate > 2) throw wrong("gate", "0..2", std::to_string(gate));
    const int64_t width = x.dimensions()[1];
    if (gate != 0 && width % 2 != 0) throw wrong("x", "an even width", text(x.dimensions()));
    const int64_t k = gate == 0 ? width : width / 2;
    const auto scales = static_cast<int64_t>(norm.element_count());
    if (scales != 0 && scales != k)
      throw wrong("norm", "[" + std::to_string(k) + "]", text(norm.dimensions()));
    require_result(*y, {x.dimensions()[0], k});
    const float* scale = scales == 0 ? nullptr : data<float>(norm);
    if (bf16) {
      prepare_rows(pool, data<uint16_t>(x), count, k, gate, scale, eps, data<uint16_t>(*y));
    } else {
      prepare_rows(pool, data<float>(x), count, k, gate, scale, eps, data<float>(*y));
    }
  });
}

constexpr char kFloatMatmul[] = "bitjax_float_matmul";

template <typename X>
std::unique_ptr<float[]> widened(const X* x, int64_t count) {
  std::unique_ptr<float[]> wide(new float[static_cast<size_t>(count)]);
  for (int64_t i = 0; i < count; ++i) wide[static_cast<size_t>(i)] = widen(x[i]);
  return wide;
}

ffi::Error float_matmul(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer table,
                        ffi::AnyBuffer rows, ffi::Result<ffi::AnyBuffer> y) {
  return guarded(kFloatMatmul, [&] {
    const bool bf16_x = is_bf16(x, "x");
    const bool bf16_table = is_bf16(table, "table");
    require_type(*y, ffi::DataType::F32, "result");
    const int64_t count = rows_of(x, rows);
    const int64_t k = x.dimensions()[1];
    const Dims dims = table.dimensions();
    if (dims.size() != 2 || dims[1] != k)
      throw wrong("table", "[N, " + std::to_string(k) + "]", text(dims));
    const int64_t n = dims[0];
    require_result(*y, {x.dimensions()[0], n});
    const Kernel& kernel = active_kernel();
    const auto wide = bf16_x ? widened(data<uint16_t>(x), count * k) : nullptr;
    const float* from = bf16_x ? wide.get() : data<float>(x);
    float* to = data<float>(*y);
    const int64_t outputs = std::max<int64_t>(1, kChunkWork / std::max<int64_t>(1, count * k));
    parallel_for(pool, (n + outputs - 1) / outputs, [&](int64_t chunk) {
      for (int64_t o = chunk * outputs; o < std::min(n, (chunk + 1) * outputs); ++o)
        for (int64_t r = 0; r < count; ++r)
          to[r * n + o] = bf16_table
                              ? kernel.dot_bf16(from + r * k, data<uint16_t>(table) + o * k, k)
                              : kernel.dot_f32(from + r * k, data<float>(table) + o * k, k);
    });
  });
}

constexpr char kScreenParts[] = "bitjax_screen_parts";

// Groups of 31 inputs, each followed by minus their product with the dither over 7.
void expand(const float* x, const float* dither, int64_t D, float* z) {
  for (int64_t first = 0; first < D; first += kScreenGroup, z += kGroupInputs) {
    const int64_t count = std::min(kScreenGroup, D - first);
    float dithered = 0;
    for (int64_t i = 0; i < count; ++i) {
      z[i] = x[first + i];
      dithered += x[first + i] * dither[first + i];
    }
    for (int64_t i = count; i < kScreenGroup; ++i) z[i] = 0;
    z[kScreenGroup] = -dithered / kDitherCode;
  }
}

ffi::Error screen_parts(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer dither,
                        ffi::AnyBuffer rows, ffi::Result<ffi::AnyBuffer> parts) {
  return guarded(kScreenParts, [&] {
    for (const auto& [buffer, what] :
         {std::pair(x, "x"), std::pair(dither, "dither"), std::pair(*parts, "parts")})
      require_type(buffer, ffi::DataType::F32, what);
    const int64_t count = rows_of(x, rows);
    const int64_t D = x.dimensions()[1];
    if (dither.dimensions().size() != 1 || dither.dimensions()[0] != D)
      throw wrong("dither", "[" + std::to_string(D) + "]", text(dither.dimensions()));
    const int64_t E = (D + kScreenGroup - 1) / kScreenGroup * kGroupInputs;
    require_result(*parts, {x.dimensions()[0], 1, E});
    const Kernel& kernel = active_kernel();
    const int64_t padded = (E + kRowPadding - 1) / kRowPadding * kRowPadding;
    const std::unique_ptr<int8_t[]> q(new int8_t[static_cast<size_t>(count * padded)]);
    each_row(pool, count, E, [&](int64_t r) {
      float* z = data<float>(*parts) + r * E;
      expand(data<float>(x) + r * D, data<float>(dither), D, z);
      float scale;
      kernel.quantize_f32(z, E, padded, &q[r * padded], &scale);
      for (int64_t i = 0; i < E; ++i) z[i] = static_cast<float>(q[r * padded + i]) * scale;
    });
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER(prepare_handler, prepare,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Arg<ffi::AnyBuffer>()  // x
                           .Arg<ffi::AnyBuffer>()  // norm
                           .Arg<ffi::AnyBuffer>()  // rows
                           .Ret<ffi::AnyBuffer>()  // y
                           .Attr<int64_t>("gate")
                           .Attr<float>("eps"));

XLA_FFI_DEFINE_HANDLER(float_matmul_handler, float_matmul,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Arg<ffi::AnyBuffer>()    // x
                           .Arg<ffi::AnyBuffer>()    // table
                           .Arg<ffi::AnyBuffer>()    // rows
                           .Ret<ffi::AnyBuffer>());  // y

XLA_FFI_DEFINE_HANDLER(screen_parts_handler, screen_parts,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Arg<ffi::AnyBuffer>()    // x
                           .Arg<ffi::AnyBuffer>()    // dither
                           .Arg<ffi::AnyBuffer>()    // rows
                           .Ret<ffi::AnyBuffer>());  // parts

const Registration kRowRegistrations[3] = {{kPrepare, prepare_handler},
                                           {kFloatMatmul, float_matmul_handler},
                                           {kScreenParts, screen_parts_handler}};

}  // namespace bitjax
