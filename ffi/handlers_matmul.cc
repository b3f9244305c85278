// The custom calls of the packed product: they check every operand, cut the work into chunks, and
// call the active kernel. Names of dimensions: M rows of activations, K inputs, N outputs, KB and NB
// = blocks of inputs and of rows, KG = groups of inputs, "..." = leading dimensions.
//
//   bitjax_packed_matmul {layout: s64, gate: s64, eps: f32}
//     x f32|bf16     [..., M, K], or [..., M, 2K] with a gate
//     codes u8       [..., NB, KB, 64]
//     multipliers u8 [..., NB, KG, 16] for int4, ignored otherwise
//     w_scale f32    [..., 1] or [..., N]
//     norm f32       [..., K], or [..., 0]: no norm
//     residual as x  [..., M, N], or [..., M, 0]: none
//     columns u8     [..., T, K, 64], the same weights by columns, or [0, 0, 0]: none
//     rows s32       [1], how many of the M rows are wanted (the others of y are left as they are), or
//                    [..., 0]: all; with it there are no leading dimensions
//     -> y as x      [..., M, N] = quantise(norm(gate(x))) W^T, scaled, plus residual
//   bitjax_packed_matmul_i32 {layout: s64}
//     the same operands, x as q s8 [..., M, K] -> y s32 [..., M, N]
//
// Every operand has the same number of leading dimensions, and a 1 among them broadcasts, as in
// NumPy. kernel.h has the arithmetic, packed_format.h the codes.

#include "handlers.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "dispatch.h"
#include "epilogue.h"
#include "form_times.h"
#include "handler_common.h"
#include "kernel.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace bitjax {
namespace {

// Up to this many multiply-adds a call stays on the calling thread. That is some 6 us of a VNNI
// core (1024 x 1024, one row, on Zen 4); a second thread would save 2 us of it and keep a core
// awake.
constexpr int64_t kSerialWork = int64_t{1} << 20;

// Multiply-adds in a chunk, at least: 1-2 us of a VNNI core, a hundred times an atomic claim.
constexpr int64_t kChunkWork = int64_t{1} << 18;

// Activation rows in a chunk, at most: their values stay in the second-level cache, and their sums in
// a panel product are 32 KiB with the widest panel.
constexpr int64_t kChunkRows = 128;

// Row blocks in a chunk, at least, for few_rows() takes up to so many in a pass; and those for which it is
// called at once, whose sums are at most 4 KiB.
constexpr int64_t kPassBlocks = 2;
constexpr int64_t kStreamBlocks = 8;

// From so many row blocks on, counted for each chunk of rows, chunks are made of kStreamBlocks: there are
// enough of them for any number of threads, and activations are fetched less often.
constexpr int64_t kManyBlocks = 64 * kStreamBlocks;

// Inputs of an unpacked panel: 32 KiB with the widest, which then stays in the first-level cache
// (48 KiB on Zen 5 and Intel's, 32 KiB on Zen 4) or close to it while all rows pass.
constexpr int64_t kPanelInputs = 512;

// Activations whose sum is kept, for int4.
constexpr int64_t kGroupInputs =
    spec(Layout::kInt4).group_blocks * spec(Layout::kInt4).block_inputs();
static_assert(kRowPadding % kGroupInputs == 0, "rows are padded to whole groups");

// Activation values quantised in one go, at least: some 5 us.
constexpr int64_t kQuantiseWork = int64_t{1} << 15;

// ---- checks ------------------------------------------------------------------------------------

// An operand's leading dimensions and the number of its values after them; no values: it is absent.
struct Operand {
  Dims lead;
  int64_t values = 0;
};

// One product of M consecutive rows. Offsets count each operand's trailing values.
struct Item {
  int64_t x, codes, multipliers, w_scale, norm, residual, y;
};

struct Plan {
  Layout layout = Layout::kTernary2;
  Gate gate = Gate::kNone;
  float eps = 0;
  int64_t m = 0, k = 0, n = 0;  // of one item
  int64_t input_blocks = 0, row_blocks = 0;
  int64_t x_rows = 0;  // all rows of x
  bool scale_per_row = false, has_norm = false, has_residual = false, has_columns = false;
  std::vector<Item> items;

  int64_t k_padded() const { return padded_inputs(layout, k); }
  int64_t x_width() const { return gate == Gate::kNone ? k : 2 * k; }
  int64_t block_work() const {  // multiply-adds of one activation row with a row block
    return kBlockRows * input_blocks * spec(layout).block_inputs();
  }
  int64_t group_stride() const { return (k_padded() + kGroupInputs - 1) / kGroupInputs; }
};

int64_t product(Dims dims, size_t count) {
  int64_t result = 1;
  for (size_t i = 0; i < count; ++i) result *= dims[i];
  return result;
}

// Enumerates the first `lead` dimensions of y, which the operands broadcast to. Trailing ones that
// only rows of activations have are folded into M, so that all rows share a pass over the weights.
void add_items(const Operand (&operands)[6], Dims y, size_t lead, Plan& plan) {
  const auto size = [&](size_t o, size_t d) {
    return operands[o].values == 0 ? int64_t{1} : operands[o].lead[d];
  };
  const auto only_rows = [&](size_t d) {
    return size(1, d) == 1 && size(2, d) == 1 && size(3, d) == 1 && size(4, d) == 1 &&
           (!plan.has_residual || size(5, d) == y[d]) && size(0, d) == y[d];
  };
  int64_t rows = plan.m;
  while (lead > 0 && only_rows(lead - 1)) rows *= y[--lead];

  const int64_t count = product(y, lead);
  const int64_t step[6] = {rows, 1, 1, 1, 1, rows};
  plan.items.reserve(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) {
    int64_t at[6] = {};
    int64_t stride[6];
    std::copy_n(step, 6, stride);
    int64_t rest = i;
    for (size_t d = lead; d-- > 0;) {
      const int64_t index = rest % y[d];
      rest /= y[d];
      for (size_t o = 0; o < 6; ++o) {
        if (size(o, d) != 1) at[o] += index * stride[o];
        stride[o] *= size(o, d);
      }
    }
    plan.items.push_back({at[0], at[1], at[2], at[3], at[4], at[5], i * rows});
  }
  plan.m = rows;
}

struct Operands {
  Dims x, codes, multipliers, w_scale, norm, residual, columns;
};

// Leaves as many rows as the operand says, if it says so.
void take_rows(const ffi::AnyBuffer& rows, Plan& plan, size_t lead) {
  if (rows.element_count() == 0) return;
  require_type(rows, ffi::DataType::S32, "rows");
  if (rows.element_count() != 1 || lead != 0)
    throw wrong("rows", "one number, and x without leading dimensions", text(rows.dimensions()));
  plan.m = std::clamp<int64_t>(*data<int32_t>(rows), 0, plan.m);
}

void require_last(const char* what, Dims dims, std::initializer_list<int64_t> last, size_t lead) {
  bool ok = dims.size() == lead + last.size();
  size_t d = lead;
  std::string wanted = "[" + std::string(lead > 0 ? "..., " : "");
  for (const int64_t size : last) {
    ok = ok && dims[d] == size;
    wanted += (d == lead ? "" : ", ") + std::to_string(size);
    ++d;
  }
  if (!ok)
    throw wrong(what, wanted + "] with " + std::to_string(lead) + " leading dimensions, as x has",
                text(dims));
}

Plan make_plan(Layout layout, Gate gate, float eps, const Operands& in, Dims y) {
  if (in.x.size() < 2) throw wrong("x", "[..., M, K]", text(in.x));
  const size_t lead = in.x.size() - 2;
  if (y.size() != lead + 2 || y[lead] != in.x[lead])
    throw wrong("result", "[..., M, N] with the M and the number of dimensions of x", text(y));
  Plan plan;
  plan.layout = layout;
  plan.gate = gate;
  plan.eps = eps;
  plan.m = in.x[lead];
  plan.k = in.x[lead + 1];
  plan.n = y[lead + 1];
  if (gate != Gate::kNone) {
    if (plan.k % 2 != 0) throw wrong("x", "an even last dimension, gate and up", text(in.x));
    plan.k /= 2;
  }
  plan.row_blocks = row_blocks_of(plan.n);
  plan.input_blocks = input_blocks_of(layout, plan.k);
  plan.x_rows = product(in.x, lead + 1);
  const int64_t largest = max_inputs(layout);
  if (plan.k > largest) throw wrong("x", "K <= " + std::to_string(largest), text(in.x));
  require_last("codes", in.codes, {plan.row_blocks, plan.input_blocks, kBlockBytes}, lead);
  const int group_blocks = spec(layout).group_blocks;
  if (group_blocks != 0) {
    require_last("multipliers", in.multipliers,
                 {plan.row_blocks, plan.input_blocks / group_blocks, kBlockRows}, lead);
  }
  plan.scale_per_row = in.w_scale.size() == lead + 1 && in.w_scale[lead] != 1;
  require_last("w_scale", in.w_scale, {plan.scale_per_row ? plan.n : 1}, lead);
  plan.has_norm = in.norm.size() == lead + 1 && in.norm[lead] != 0;
  require_last("norm", in.norm, {plan.has_norm ? plan.k : 0}, lead);
  plan.has_residual = in.residual.size() == lead + 2 && in.residual[lead + 1] != 0;
  require_last("residual", in.residual, {plan.m, plan.has_residual ? plan.n : 0}, lead);

  if (product(in.columns, in.columns.size()) != 0) {
    if (!has_columns(layout)) throw wrong("columns", "none for this layout", text(in.columns));
    require_last("columns", in.columns, {column_tiles_of(layout, plan.n), plan.k, kColumnBytes}, lead);
    plan.has_columns = true;
  }

  const Operand operands[6] = {{in.x, 1},
                               {in.codes, 1},
                               {in.multipliers, group_blocks},
                               {in.w_scale, 1},
                               {in.norm, plan.has_norm},
                               {in.residual, plan.has_residual}};
  for (size_t d = 0; d < lead; ++d) {
    bool fits = true;
    bool reached = false;
    for (const Operand& operand : operands) {
      const int64_t size = operand.values == 0 ? 1 : operand.lead[d];
      fits &= size == 1 || size == y[d];
      reached |= size == y[d];
    }
    if (!fits || !reached)
      throw wrong("result", "the leading dimensions that the operands broadcast to",
                  text(y) + " for x " + text(in.x) + " and codes " + text(in.codes));
  }
  add_items(operands, y, lead, plan);
  return plan;
}

// ---- work --------------------------------------------------------------------------------------

// The operands' values; absent ones are null.
template <typename X, typename Y>
struct Data {
  const X* x = nullptr;
  const uint8_t* codes = nullptr;
  const uint8_t* multipliers = nullptr;
  const float* w_scale = nullptr;
  const float* norm = nullptr;
  const X* residual = nullptr;
  const uint8_t* columns = nullptr;
  Y* y = nullptr;
};

// All rows of x, quantised and padded, and the sums of their groups of 32 values. A row's sum is
// that of its groups.
struct Activations {
  std::unique_ptr<int8_t[]> q;             // [rows][k_padded]
  std::unique_ptr<float[]> scale;          // [rows]
  std::unique_ptr<int32_t[]> group_sums;   // [rows][group_stride]
  std::unique_ptr<int32_t[]> sum;          // [rows]
  std::atomic<bool> failed{false};         // memory ran out on some thread

  Activations(const Plan& plan, int64_t rows)
      : q(new int8_t[static_cast<size_t>(rows * plan.k_padded())]),
        scale(new float[static_cast<size_t>(rows)]),
        group_sums(new int32_t[static_cast<size_t>(rows * plan.group_stride())]),
        sum(new int32_t[static_cast<size_t>(rows)]) {}
};

void quantise(const Kernel& kernel, const float* x, int64_t k, int64_t k_padded, int8_t* q,
              float* scale) {
  kernel.quantize_f32(x, k, k_padded, q, scale);
}

void quantise(const Kernel& kernel, const uint16_t* bf16, int64_t k, int64_t k_padded, int8_t* q,
              float* scale) {
  kernel.quantize_bf16(bf16, k, k_padded, q, scale);
}

void quantise(const Kernel& /*kernel*/, const int8_t* x, int64_t k, int64_t k_padded, int8_t* q,
              float* scale) {
  std::copy_n(x, k, q);
  std::fill(q + k, q + k_padded, int8_t{0});
  *scale = 1.0F;
}

// Gate, norm and quantisation of one row; `room` holds 3 k floats.
template <typename X>
void prepare_row(const Kernel& kernel, const Plan& plan, const X* x, const float* norm, float* room,
                 int8_t* q, float* scale) {
  const int64_t k = plan.k;
  if constexpr (!std::is_same_v<X, int8_t>) {
    if (plan.gate != Gate::kNone || norm != nullptr) {
      const float* row = room;
      if constexpr (std::is_same_v<X, float>) {
        row = x;
      } else {
        for (int64_t i = 0; i < plan.x_width(); ++i) room[i] = widen(x[i]);
      }
      float* result = room + 2 * k;
      if (plan.gate != Gate::kNone) {
        (plan.gate == Gate::kRelu2 ? kernel.relu2_gate : kernel.silu_gate)(row, k, result);
        row = result;
      }
      if (norm != nullptr) {
        kernel.rms_norm(row, k, norm, plan.eps, result);
        row = result;
      }
      return kernel.quantize_f32(row, k, plan.k_padded(), q, scale);
    }
  }
  quantise(kernel, x, k, plan.k_padded(), q, scale);
}

template <typename X, typename Y, typename Pool>
void prepare(const Kernel& kernel, const Plan& plan, const Data<X, Y>& data, bool serial,
             Pool& pool, Activations& a) {
  // Rows are counted item after item: items that share x but not their norm quantise it anew.
  const int64_t rows = static_cast<int64_t>(plan.items.size()) * plan.m;
  const int64_t rows_per_chunk =
      serial ? rows : std::max<int64_t>(1, kQuantiseWork / std::max<int64_t>(1, plan.k));
  const bool needs_room = plan.gate != Gate::kNone || plan.has_norm;
  const auto body = [&](int64_t chunk) {
    const std::unique_ptr<float[]> room(
        needs_room ? new (std::nothrow) float[static_cast<size_t>(3 * plan.k)] : nullptr);
    const int64_t end = std::min(rows, (chunk + 1) * rows_per_chunk);
    for (int64_t r = chunk * rows_per_chunk; r < end; ++r) {
      const Item& item = plan.items[static_cast<size_t>(r / plan.m)];
      int8_t* q = &a.q[r * plan.k_padded()];
      if (needs_room && room == nullptr) {  // no exception may leave a pool's thread
        std::fill(q, q + plan.k_padded(), int8_t{0});
        a.scale[r] = std::numeric_limits<float>::quiet_NaN();
        a.failed = true;
      } else {
        prepare_row(kernel, plan, data.x + (item.x + r % plan.m) * plan.x_width(),
                    plan.has_norm ? data.norm + item.norm * plan.k : nullptr, room.get(), q,
                    &a.scale[r]);
      }
      a.sum[r] = 0;
      for (int64_t g = 0; g < plan.group_stride(); ++g) {
        int32_t sum = 0;
        for (int64_t i = 0; i < kGroupInputs; ++i) sum += q[g * kGroupInputs + i];
        a.group_sums[r * plan.group_stride() + g] = sum;
        a.sum[r] += sum;
      }
    }
  };
  parallel_for(pool, (rows + rows_per_chunk - 1) / rows_per_chunk, body);
}

// Rows [row, row_end) of an item with row blocks [block, block_end).
struct Chunk {
  int64_t row, row_end, block, block_end;
};

template <typename X, typename Y>
struct Product {
  const Kernel& kernel;
  const Plan& plan;
  const Data<X, Y>& data;
  const Activations& a;

  PackedRows weights(const Item& item, int64_t block, int64_t blocks) const {
    const int group_blocks = spec(plan.layout).group_blocks;
    const int64_t first = item.codes * plan.row_blocks + block;
    const int64_t groups = group_blocks == 0 ? 0 : plan.input_blocks / group_blocks;
    const int64_t first_multiplied = item.multipliers * plan.row_blocks + block;
    return {data.codes + first * plan.input_blocks * kBlockBytes,
            data.multipliers == nullptr ? nullptr
                                        : data.multipliers + first_multiplied * groups * kBlockRows,
            plan.input_blocks, static_cast<int>(blocks)};
  }

  // Scales acc [m][acc_stride] of rows from `row` and `count` outputs from `col` into y.
  void finish(int64_t item_index, int64_t row, int64_t m, int64_t col, int64_t count,
              int32_t offset, const int32_t* acc, int64_t acc_stride) const {
    const Item& item = plan.items[static_cast<size_t>(item_index)];
    const int64_t cols = std::min<int64_t>(count, plan.n - col);
    const float one = 1.0F;
    const float* scale = data.w_scale == nullptr ? &one
                         : plan.scale_per_row    ? data.w_scale + item.w_scale * plan.n + col
                                                 : data.w_scale + item.w_scale;
    for (int64_t i = 0; i < m; ++i) {
      const int64_t r = item_index * plan.m + row + i;
      const X* residual =
          plan.has_residual ? data.residual + (item.residual + row + i) * plan.n + col : nullptr;
      scale_row(acc + i * acc_stride, cols, offset * a.sum[r], a.scale[r], scale,
                plan.scale_per_row, residual, data.y + (item.y + row + i) * plan.n + col);
    }
  }

  // Row blocks stay in the second-level cache while all rows of the chunk pass, some at a time.
  void streamed_rows(int64_t item, const Chunk& chunk) const {
    int32_t acc[kMaxFewRows * kStreamBlocks * kBlockRows];
    const int64_t tiles = (chunk.row_end - chunk.row + kernel.few_rows_limit - 1) /
                          kernel.few_rows_limit;
    const auto tile_row = [&](int64_t t) {
      return chunk.row + (chunk.row_end - chunk.row) * t / tiles;
    };
    for (int64_t nb = chunk.block; nb < chunk.block_end; nb += kStreamBlocks) {
      const int64_t blocks = std::min(kStreamBlocks, chunk.block_end - nb);
      const PackedRows rows = weights(plan.items[static_cast<size_t>(item)], nb, blocks);
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t first = item * plan.m + tile_row(t);
        const int64_t m = tile_row(t + 1) - tile_row(t);
        const FewActivations few{&a.q[first * plan.k_padded()], plan.k_padded(),
                                 &a.group_sums[first * plan.group_stride()], plan.group_stride(),
                                 static_cast<int>(m)};
        kernel.few_rows[static_cast<int>(plan.layout)](rows, few, acc, blocks * kBlockRows);
        finish(item, tile_row(t), m, nb * kBlockRows, blocks * kBlockRows,
               few_rows_offset(plan.layout), acc, blocks * kBlockRows);
      }
    }
  }

  // At most kChunkRows rows and panel_blocks row blocks.
  void panelled_rows(int64_t item, const Chunk& chunk) const {
    alignas(64) uint8_t panel[kPanelInputs * kMaxPanelBlocks * kBlockRows];
    alignas(64) int32_t acc[kChunkRows * kMaxPanelBlocks * kBlockRows];
    const int64_t columns = kernel.panel_blocks * kBlockRows;
    const int64_t m = chunk.row_end - chunk.row;
    const int64_t blocks = chunk.block_end - chunk.block;
    const PackedRows rows = weights(plan.items[static_cast<size_t>(item)], chunk.block, blocks);
    const int8_t* q = &a.q[(item * plan.m + chunk.row) * plan.k_padded()];
    const int inputs = spec(plan.layout).block_inputs();
    const int64_t span = kPanelInputs / inputs;
    const PanelProduct multiply = spec(plan.layout).offset == 1 ? kernel.ternary_panel
                                                               : kernel.byte_panel;
    // Tiles of equal height, for a short last tile would leave the multipliers waiting.
    const int64_t tiles = (m + kernel.tile_rows - 1) / kernel.tile_rows;
    std::memset(acc, 0, static_cast<size_t>(m * columns) * sizeof(int32_t));
    if (blocks < kernel.panel_blocks) std::memset(panel, 0, sizeof panel);
    for (int64_t kb = 0; kb < plan.input_blocks; kb += span) {
      const int64_t end = std::min(plan.input_blocks, kb + span);
      kernel.unpack_panel[static_cast<int>(plan.layout)](rows, kb, end, panel);
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t row = m * t / tiles;
        multiply(panel, (end - kb) * inputs / kLaneBytes, q + row * plan.k_padded() + kb * inputs,
                 plan.k_padded(), static_cast<int>(m * (t + 1) / tiles - row), acc + row * columns);
      }
    }
    finish(item, chunk.row, m, chunk.block * kBlockRows, blocks * kBlockRows,
           panel_offset(plan.layout), acc, columns);
  }

  // The only row of activations with a tile of columns.
  void sparse_row(const SparseRow& x, int64_t tile) const {
    int32_t acc[kMaxTileRows];
    const int64_t rows = int64_t{kColumnBytes} * spec(plan.layout).planes;
    kernel.column_product[static_cast<int>(plan.layout)](
        data.columns + tile * plan.k * kColumnBytes, plan.k, x, acc);
    finish(0, 0, 1, tile * rows, rows, few_rows_offset(plan.layout), acc, rows);
  }
};

// Of a ternary matrix; no two share one.
uint64_t shape_key(const Plan& plan) {
  static_assert(max_inputs(Layout::kTernary2) < 1 << 20 && max_inputs(Layout::kTernary16) < 1 << 20,
                "inputs fit 20 bits");
  return static_cast<uint64_t>(plan.n) << 22 | static_cast<uint64_t>(plan.k) << 2 |
         static_cast<uint64_t>(plan.layout);
}

FormTimesByShape form_times;

// The only row of activations with a matrix that is there by columns as well. `each` runs tiles,
// `by_rows` the whole product.
template <typename X, typename Y, typename Each, typename ByRows>
void run_row(const Product<X, Y>& product, const Each& each, const ByRows& by_rows) {
  const Plan& plan = product.plan;
  const auto room = static_cast<size_t>(plan.k_padded());
  const std::unique_ptr<int32_t[]> input(new int32_t[room]);
  const std::unique_ptr<int8_t[]> value(new int8_t[room]);
  const int64_t count = product.kernel.find_nonzero(product.a.q.get(), plan.k_padded(), input.get(),
                                                    value.get());
  const auto by_columns = [&] {
    const SparseRow x{input.get(), value.get(), (count + 3) / 4 * 4};
    each(column_tiles_of(plan.layout, plan.n), [&](int64_t tile) { product.sparse_row(x, tile); });
  };
  const double share = static_cast<double>(count) / static_cast<double>(plan.k);
  if (share <= kSurelyColumns) return by_columns();
  if (share > kSurelyRows) return by_rows();
  FormTimes& times = form_times[shape_key(plan)];
  const bool columns = times.by_columns(count);
  const auto started = std::chrono::steady_clock::now();
  columns ? by_columns() : by_rows();
  const std::chrono::duration<float, std::nano> time = std::chrono::steady_clock::now() - started;
  times.took(columns, count, time.count());
}

template <typename X, typename Y>
void run(ffi::ThreadPool pool, const Plan& plan, const Data<X, Y>& data) {
  const Kernel& kernel = active_kernel();
  count_call(kernel);
  const int64_t items = static_cast<int64_t>(plan.items.size());
  if (items == 0 || plan.m == 0 || plan.n == 0) return;

  const int64_t rows = items * plan.m;
  const int64_t work = rows * plan.row_blocks * plan.block_work();
  const bool serial = work <= kSerialWork;
  Activations a(plan, rows);
  prepare(kernel, plan, data, serial, pool, a);
  if (a.failed) throw std::bad_alloc();

  // Consecutive chunks share their row blocks, so that threads meet the same codes in the cache.
  const bool streams = plan.m <= kernel.streamed_rows;
  const int64_t chunk_rows = std::min(plan.m, kChunkRows);
  const int64_t row_chunks = (plan.m + chunk_rows - 1) / chunk_rows;
  const int64_t chunk_work = std::max<int64_t>(1, chunk_rows * plan.block_work());
  const int64_t chunk_blocks =
      !streams                                       ? kernel.panel_blocks
      : serial                                       ? plan.row_blocks
      : row_chunks * plan.row_blocks >= kManyBlocks  ? kStreamBlocks
                                                     : std::max(kPassBlocks, kChunkWork / chunk_work);
  const int64_t block_chunks = (plan.row_blocks + chunk_blocks - 1) / chunk_blocks;
  const int64_t item_chunks = row_chunks * block_chunks;
  const Product<X, Y> product{kernel, plan, data, a};
  const auto each = [&](int64_t count, const auto& body) {
    if (serial) {
      for (int64_t number = 0; number < count; ++number) body(number);
    } else {
      parallel_for(pool, count, body);
    }
  };
  const auto by_rows = [&] {
    each(items * item_chunks, [&](int64_t number) {
      const int64_t row = number % item_chunks % row_chunks * chunk_rows;
      const int64_t block = number % item_chunks / row_chunks * chunk_blocks;
      const Chunk chunk{row, std::min(plan.m, row + chunk_rows), block,
                        std::min(plan.row_blocks, block + chunk_blocks)};
      if (streams) {
        product.streamed_rows(number / item_chunks, chunk);
      } else {
        product.panelled_rows(number / item_chunks, chunk);
      }
    });
  };
  if (plan.has_columns && rows == 1 && kernel.find_nonzero != nullptr) {
    run_row(product, each, by_rows);
  } else {
    by_rows();
  }
}

// ---- entry points ------------------------------------------------------------------------------

constexpr char kMatmul[] = "bitjax_packed_matmul";
constexpr char kMatmulI32[] = "bitjax_packed_matmul_i32";

Layout layout_of(int64_t number) {
  if (number < 0 || number >= kLayoutCount)
    throw wrong("layout", "0.." + std::to_string(kLayoutCount - 1), std::to_string(number));
  return static_cast<Layout>(number);
}

Gate gate_of(int64_t number) {
  if (number < 0 || number > 2) throw wrong("gate", "0..2", std::to_string(number));
  return static_cast<Gate>(number);
}

template <typename T>
void run_float(ffi::ThreadPool pool, const Plan& plan, ffi::AnyBuffer x, ffi::AnyBuffer codes,
               ffi::AnyBuffer multipliers, ffi::AnyBuffer w_scale, ffi::AnyBuffer norm,
               ffi::AnyBuffer residual, ffi::AnyBuffer columns, ffi::AnyBuffer y) {
  run(pool, plan,
      Data<T, T>{data<T>(x), data<uint8_t>(codes), data<uint8_t>(multipliers), data<float>(w_scale),
                 data<float>(norm), data<T>(residual), data<uint8_t>(columns), data<T>(y)});
}

ffi::Error packed_matmul(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer codes,
                         ffi::AnyBuffer multipliers, ffi::AnyBuffer w_scale, ffi::AnyBuffer norm,
                         ffi::AnyBuffer residual, ffi::AnyBuffer columns, ffi::AnyBuffer rows,
                         ffi::Result<ffi::AnyBuffer> y, int64_t layout, int64_t gate, float eps) {
  return guarded(kMatmul, [&] {
    const bool bf16 = x.element_type() == ffi::DataType::BF16;
    if (!bf16 && x.element_type() != ffi::DataType::F32)
      throw wrong("x", "f32 or bf16", text(x.element_type()));
    require_type(codes, ffi::DataType::U8, "codes");
    require_type(multipliers, ffi::DataType::U8, "multipliers");
    require_type(w_scale, ffi::DataType::F32, "w_scale");
    require_type(norm, ffi::DataType::F32, "norm");
    require_type(residual, x.element_type(), "residual");
    require_type(columns, ffi::DataType::U8, "columns");
    require_type(*y, x.element_type(), "result");
    Plan plan = make_plan(layout_of(layout), gate_of(gate), eps,
                          {x.dimensions(), codes.dimensions(), multipliers.dimensions(),
                           w_scale.dimensions(), norm.dimensions(), residual.dimensions(),
                           columns.dimensions()},
                          y->dimensions());
    take_rows(rows, plan, x.dimensions().size() - 2);
    (bf16 ? run_float<uint16_t> : run_float<float>)(pool, plan, x, codes, multipliers, w_scale,
                                                    norm, residual, columns, *y);
  });
}

ffi::Error packed_matmul_i32(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer codes,
                             ffi::AnyBuffer multipliers, ffi::AnyBuffer w_scale,
                             ffi::AnyBuffer norm, ffi::AnyBuffer residual, ffi::AnyBuffer columns,
                             ffi::AnyBuffer rows, ffi::Result<ffi::AnyBuffer> y, int64_t layout) {
  return guarded(kMatmulI32, [&] {
    require_type(q, ffi::DataType::S8, "x");
    require_type(codes, ffi::DataType::U8, "codes");
    require_type(multipliers, ffi::DataType::U8, "multipliers");
    require_type(columns, ffi::DataType::U8, "columns");
    require_type(*y, ffi::DataType::S32, "result");
    Plan plan = make_plan(layout_of(layout), Gate::kNone, 0,
                          {q.dimensions(), codes.dimensions(), multipliers.dimensions(),
                           w_scale.dimensions(), norm.dimensions(), residual.dimensions(),
                           columns.dimensions()},
                          y->dimensions());
    take_rows(rows, plan, q.dimensions().size() - 2);
    run(pool, plan,
        Data<int8_t, int32_t>{data<int8_t>(q), data<uint8_t>(codes), data<uint8_t>(multipliers),
                              nullptr, nullptr, nullptr, data<uint8_t>(columns),
                              data<int32_t>(*y)});
  });
}

#define BITJAX_OPERANDS                                                          \
  Ctx<ffi::ThreadPool>()                                                         \
      .Arg<ffi::AnyBuffer>()  /* x */                                            \
      .Arg<ffi::AnyBuffer>()  /* codes */                                        \
      .Arg<ffi::AnyBuffer>()  /* multipliers */                                  \
      .Arg<ffi::AnyBuffer>()  /* w_scale */                                      \
      .Arg<ffi::AnyBuffer>()  /* norm */                                         \
      .Arg<ffi::AnyBuffer>()  /* residual */                                     \
      .Arg<ffi::AnyBuffer>()  /* columns */                                      \
      .Arg<ffi::AnyBuffer>()  /* rows */                                         \
      .Ret<ffi::AnyBuffer>()  /* y */                                            \
      .Attr<int64_t>("layout")

XLA_FFI_DEFINE_HANDLER(packed_matmul_handler, packed_matmul,
                       ffi::Ffi::Bind()
                           .BITJAX_OPERANDS.Attr<int64_t>("gate")
                           .Attr<float>("eps"));

XLA_FFI_DEFINE_HANDLER(packed_matmul_i32_handler, packed_matmul_i32,
                       ffi::Ffi::Bind().BITJAX_OPERANDS);

}  // namespace

const Registration kMatmulRegistrations[2] = {
    {kMatmul, packed_matmul_handler},
    {kMatmulI32, packed_matmul_i32_handler},
};

}  // namespace bitjax
