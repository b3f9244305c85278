// The custom calls of a training step's products; training.h has the arithmetic. M rows of
// activations, K inputs, N outputs, Kp = K rounded up to kRowPadding.
//
//   bitjax_train_forward
//     x f32 [M, K], codes f32 [N, K], w_scale f32 [N]
//     -> y f32 [M, N], q s8 [M, Kp], x_scale f32 [M], scratch u8 [forward_scratch]
//   bitjax_train_backward
//     dy f32 [M, N], q, x_scale, codes, w_scale as above
//     -> dx f32 [M, K], dw f32 [N, K], scratch u8 [backward_scratch]
//
// Scratch is a result so that XLA gives it a place among its temporary values: memory of our own
// would be asked of the system, page by page, at every call.

#include "handlers.h"

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <string>

#include "dispatch.h"
#include "handler_common.h"
#include "kernel.h"
#include "parallel.h"
#include "training.h"
#include "xla/ffi/api/ffi.h"

namespace bitjax {
namespace {

// Rows of a chunk of work: its sums, 64 columns of float32, are 48 KiB, and there are several
// chunks for each of a few threads in a batch of a few thousand tokens.
constexpr int64_t kChunkRows = 192;
static_assert(kChunkRows % kStripRows == 0, "whole strips");

// Groups of a pass over a panel: 64 KiB, so that it stays in the second-level cache, beside a strip,
// while the rows of a chunk meet it.
constexpr int64_t kPassGroups = 256;

// Rows packed or quantised in one go; even, as rows go in pairs.
constexpr int64_t kPackRows = 32;

struct Sizes {
  int64_t m, k, n;
  int64_t padded() const { return whole(k, kRowPadding) * kRowPadding; }
  int64_t byte_groups() const { return whole(k, 4); }
  static int64_t pairs(int64_t depth) { return whole(depth, 2); }
  static int64_t panel_bytes(int64_t columns, int64_t groups) {
    return whole(columns, kPanelColumns) * kPanelColumns * groups * kGroupBytes;
  }
  static int64_t strip_bytes(int64_t rows, int64_t groups) {
    return whole(rows, kStripRows) * kStripRows * groups * kGroupBytes;
  }
};

void require_dims(const char* what, Dims dims, std::initializer_list<int64_t> wanted) {
  if (!std::equal(dims.begin(), dims.end(), wanted.begin(), wanted.end())) {
    std::string text_of = "[";
    for (const int64_t size : wanted)
      text_of += (text_of.size() == 1 ? "" : ", ") + std::to_string(size);
    throw wrong(what, text_of + "]", text(dims));
  }
}

void require_float(const char* what, const ffi::AnyBuffer& buffer,
                   std::initializer_list<int64_t> wanted) {
  require_type(buffer, ffi::DataType::F32, what);
  require_dims(what, buffer.dimensions(), wanted);
}

const TrainingKernel& kernel_here() {
  const TrainingKernel* kernel = training_kernel();
  if (kernel == nullptr)
    throw std::invalid_argument("this processor has no AVX-512 BF16 and VNNI instructions");
  return *kernel;
}

Sizes sizes_of(const char* what, const ffi::AnyBuffer& rows, const ffi::AnyBuffer& codes,
               bool by_inputs) {
  if (rows.dimensions().size() != 2) throw wrong(what, "2 dimensions", text(rows.dimensions()));
  require_type(codes, ffi::DataType::F32, "codes");
  if (codes.dimensions().size() != 2)
    throw wrong("codes", "2 dimensions", text(codes.dimensions()));
  const Sizes s{rows.dimensions()[0], codes.dimensions()[1], codes.dimensions()[0]};
  if (s.k > max_inputs(Layout::kTernary2))
    throw wrong("codes", "at most " + std::to_string(max_inputs(Layout::kTernary2)) + " inputs",
                std::to_string(s.k));
  require_float(what, rows, {s.m, by_inputs ? s.k : s.n});
  return s;
}

void require_scratch(const ffi::AnyBuffer& scratch, int64_t bytes) {
  require_type(scratch, ffi::DataType::U8, "scratch");
  if (scratch.dimensions().size() != 1 || scratch.dimensions()[0] < bytes)
    throw wrong("scratch", "at least " + std::to_string(bytes) + " bytes",
                text(scratch.dimensions()));
}

// The rows and columns of chunk i of a result [rows, columns].
struct Chunk {
  int64_t row, rows, column, columns;
  Chunk(int64_t i, int64_t all_rows, int64_t all_columns)
      : row(i / whole(all_columns, kPanelColumns) * kChunkRows),
        rows(std::min(kChunkRows, all_rows - row)),
        column(i % whole(all_columns, kPanelColumns) * kPanelColumns),
        columns(std::min(kPanelColumns, all_columns - column)) {}
  static int64_t count(int64_t rows, int64_t columns) {
    return whole(rows, kChunkRows) * whole(columns, kPanelColumns);
  }
};

// ---- forward ------------------------------------------------------------------------------------

// scratch: panels of codes, then sums of q (at a multiple of 64 bytes, as panels are).
int64_t forward_scratch(const Sizes& s) {
  return Sizes::panel_bytes(s.n, s.byte_groups()) + s.m * static_cast<int64_t>(sizeof(int32_t));
}

ffi::Error forward(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer codes,
                   ffi::AnyBuffer w_scale, ffi::Result<ffi::AnyBuffer> y,
                   ffi::Result<ffi::AnyBuffer> q, ffi::Result<ffi::AnyBuffer> x_scale,
                   ffi::Result<ffi::AnyBuffer> scratch) {
  return guarded("bitjax_train_forward", [&] {
    const TrainingKernel& kernel = kernel_here();
    const Sizes s = sizes_of("x", x, codes, true);
    require_float("w_scale", w_scale, {s.n});
    require_float("y", *y, {s.m, s.n});
    require_type(*q, ffi::DataType::S8, "q");
    require_dims("q", q->dimensions(), {s.m, s.padded()});
    require_float("x_scale", *x_scale, {s.m});
    require_scratch(*scratch, forward_scratch(s));

    const auto quantize = active_kernel().quantize_f32;
    const float* const from = data<float>(x);
    const float* const w = data<float>(codes);
    const float* const w_scales = data<float>(w_scale);
    float* const out = data<float>(*y);
    int8_t* const quantized = data<int8_t>(*q);
    float* const x_scales = data<float>(*x_scale);
    uint8_t* const panels = data<uint8_t>(*scratch);
    const int64_t groups = s.byte_groups();
    const int64_t panel = kPanelColumns * groups * kGroupBytes;
    int32_t* const sums =
        reinterpret_cast<int32_t*>(panels + Sizes::panel_bytes(s.n, groups));

    const int64_t blocks = whole(s.n, kPanelColumns);
    parallel_for(pool, blocks + whole(s.m, kPackRows), [&](int64_t i) {
      if (i < blocks) {
        const int64_t first = i * kPanelColumns;
        kernel.pack_codes(w + first * s.k, std::min(kPanelColumns, s.n - first), s.k,
                          panels + i * panel);
        return;
      }
      const int64_t first = (i - blocks) * kPackRows;
      for (int64_t m = first; m < std::min(s.m, first + kPackRows); ++m) {
        int8_t* const row = quantized + m * s.padded();
        quantize(from + m * s.k, s.k, s.padded(), row, x_scales + m);
        sums[m] = kernel.sum(row, s.k);
      }
    });
    parallel_for(pool, Chunk::count(s.m, s.n), [&](int64_t i) {
      const Chunk c(i, s.m, s.n);
      const Groups rows{reinterpret_cast<const uint8_t*>(quantized) + c.row * s.padded(),
                        s.padded(), kGroupBytes};
      kernel.integer_tile(rows, panels + c.column / kPanelColumns * panel, groups, sums + c.row,
                          x_scales + c.row, w_scales + c.column,
                          {out + c.row * s.n + c.column, s.n, c.rows, c.columns});
    });
  });
}

// ---- backward -----------------------------------------------------------------------------------

// scratch: dy * s_w by rows; dy * s_x in strips of outputs; panels of codes and of q.
struct Backward {
  int64_t by_rows, strips, code_panels, q_panels, end;
  explicit Backward(const Sizes& s)
      : by_rows(0),
        strips(whole(s.m * Sizes::pairs(s.n) * kGroupBytes, 64) * 64),
        code_panels(strips + Sizes::strip_bytes(s.n, Sizes::pairs(s.m))),
        q_panels(code_panels + Sizes::panel_bytes(s.k, Sizes::pairs(s.n))),
        end(q_panels + Sizes::panel_bytes(s.k, Sizes::pairs(s.m))) {}
};

// One product of the backward pass: out [rows, columns] over `groups` pairs.
struct Product {
  const uint8_t* first;  // Groups, or in strips of kStripRows
  bool strips;
  const uint8_t* panels;
  float* out;
  int64_t rows, columns, groups;

  Groups groups_at(int64_t row, int64_t group) const {
    if (!strips) {
      const int64_t stride = groups * kGroupBytes;
      return {first + row * stride + group * kGroupBytes, stride, kGroupBytes};
    }
    constexpr int64_t kGroup = kStripRows * kGroupBytes;
    return {first + row / kStripRows * groups * kGroup + group * kGroup, kGroupBytes, kGroup};
  }

  void chunk(const TrainingKernel& kernel, int64_t i) const {
    const Chunk c(i, rows, columns);
    const int64_t step = strips ? kStripRows : kChunkRows;
    const uint8_t* const panel = panels + c.column * groups * kGroupBytes;
    for (int64_t g = 0; g < groups; g += kPassGroups)
      for (int64_t row = c.row; row < c.row + c.rows; row += step)
        kernel.float_tile(groups_at(row, g), panel + g * kPanelColumns * kGroupBytes,
                          std::min(kPassGroups, groups - g), g > 0,
                          {out + row * columns + c.column, columns,
                           std::min(step, c.row + c.rows - row), c.columns});
    if (groups == 0)
      for (int64_t row = c.row; row < c.row + c.rows; ++row)
        std::fill_n(out + row * columns + c.column, c.columns, 0.0F);
  }
};

ffi::Error backward(ffi::ThreadPool pool, ffi::AnyBuffer dy, ffi::AnyBuffer q,
                    ffi::AnyBuffer x_scale, ffi::AnyBuffer codes, ffi::AnyBuffer w_scale,
                    ffi::Result<ffi::AnyBuffer> dx, ffi::Result<ffi::AnyBuffer> dw,
                    ffi::Result<ffi::AnyBuffer> scratch) {
  return guarded("bitjax_train_backward", [&] {
    const TrainingKernel& kernel = kernel_here();
    const Sizes s = sizes_of("dy", dy, codes, false);
    require_type(q, ffi::DataType::S8, "q");
    require_dims("q", q.dimensions(), {s.m, s.padded()});
    require_float("x_scale", x_scale, {s.m});
    require_float("w_scale", w_scale, {s.n});
    require_float("dx", *dx, {s.m, s.k});
    require_float("dw", *dw, {s.n, s.k});
    const Backward at(s);
    require_scratch(*scratch, at.end);

    uint8_t* const base = data<uint8_t>(*scratch);
    const float* const gradient = data<float>(dy);
    const float* const x_scales = data<float>(x_scale);
    const float* const w_scales = data<float>(w_scale);
    const int8_t* const quantized = data<int8_t>(q);
    const float* const w = data<float>(codes);
    const auto at16 = [base](int64_t offset) { return reinterpret_cast<uint16_t*>(base + offset); };
    const int64_t m_pairs = Sizes::pairs(s.m), n_pairs = Sizes::pairs(s.n);
    const int64_t panels = whole(s.k, kPanelColumns), n_blocks = whole(s.n, kPackRows);
    parallel_for(pool, n_blocks + whole(s.m, kPackRows), [&](int64_t i) {
      if (i < n_blocks) {  // codes: depth n, columns k
        const int64_t first = i * kPackRows, count = std::min(kPackRows, s.n - first);
        for (int64_t p = 0; p < panels; ++p) {
          const int64_t column = p * kPanelColumns;
          kernel.pack_floats(w + first * s.k + column, nullptr, count, s.k,
                             std::min(kPanelColumns, s.k - column), kPanelColumns,
                             at16(at.code_panels) + (p * n_pairs + first / 2) * kPanelColumns * 2);
        }
        return;
      }
      const int64_t first = (i - n_blocks) * kPackRows, count = std::min(kPackRows, s.m - first);
      for (int64_t p = 0; p < panels; ++p) {  // q: depth m, columns k
        const int64_t column = p * kPanelColumns;
        kernel.pack_bytes(quantized + first * s.padded() + column, count, s.padded(),
                          std::min(kPanelColumns, s.k - column), kPanelColumns,
                          at16(at.q_panels) + (p * m_pairs + first / 2) * kPanelColumns * 2);
      }
      const float* const rows = gradient + first * s.n;
      for (int64_t strip = 0; strip * kStripRows < s.n; ++strip) {  // dy: depth m, rows n
        const int64_t column = strip * kStripRows;
        kernel.pack_floats(rows + column, x_scales + first, count, s.n,
                           std::min(kStripRows, s.n - column), kStripRows,
                           at16(at.strips) + (strip * m_pairs + first / 2) * kStripRows * 2);
      }
      for (int64_t m = 0; m < count; ++m)
        kernel.round_row(rows + m * s.n, w_scales, s.n,
                         at16(at.by_rows) + (first + m) * n_pairs * 2);
    });

    const Product inputs{base + at.by_rows, false,    base + at.code_panels, data<float>(*dx),
                         s.m,               s.k,      n_pairs};
    const Product weights{base + at.strips, true, base + at.q_panels, data<float>(*dw),
                          s.n,              s.k,  m_pairs};
    const int64_t chunks = Chunk::count(s.m, s.k);
    parallel_for(pool, chunks + Chunk::count(s.n, s.k), [&](int64_t i) {
      if (i < chunks) return inputs.chunk(kernel, i);
      weights.chunk(kernel, i - chunks);
    });
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER(train_forward_handler, forward,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Arg<ffi::AnyBuffer>()    // x
                           .Arg<ffi::AnyBuffer>()    // codes
                           .Arg<ffi::AnyBuffer>()    // w_scale
                           .Ret<ffi::AnyBuffer>()    // y
                           .Ret<ffi::AnyBuffer>()    // q
                           .Ret<ffi::AnyBuffer>()    // x_scale
                           .Ret<ffi::AnyBuffer>());  // scratch

XLA_FFI_DEFINE_HANDLER(train_backward_handler, backward,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Arg<ffi::AnyBuffer>()    // dy
                           .Arg<ffi::AnyBuffer>()    // q
                           .Arg<ffi::AnyBuffer>()    // x_scale
                           .Arg<ffi::AnyBuffer>()    // codes
                           .Arg<ffi::AnyBuffer>()    // w_scale
                           .Ret<ffi::AnyBuffer>()    // dx
                           .Ret<ffi::AnyBuffer>()    // dw
                           .Ret<ffi::AnyBuffer>());  // scratch

const Registration kTrainingRegistrations[2] = {
    {"bitjax_train_forward", train_forward_handler},
    {"bitjax_train_backward", train_backward_handler}};

}  // namespace bitjax
