// The XLA custom calls: they check every operand, cut the work into chunks, and call the active
// kernel. Names of dimensions: M rows of activations, K inputs, N outputs, KB = ceil(K/16),
// NB = ceil(N/16), "..." = leading dimensions.
//
//   bitjax_ternary_matmul
//     x f32|bf16 [..., M, K], codes u8 [..., NB, KB, 64], w_scale f32 [...] -> y as x [..., M, N]
//   bitjax_ternary_matmul_i32
//     q s8 [..., M, K], codes u8 [..., NB, KB, 64] -> y s32 [..., M, N]
//
// Every operand has the same number of leading dimensions, and a 1 among them broadcasts, as in
// NumPy. kernel.h has the arithmetic, packed_format.h the codes.

#include "handlers.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "dispatch.h"
#include "epilogue.h"
#include "kernel.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace bitjax {
namespace {

namespace ffi = xla::ffi;
using Dims = ffi::AnyBuffer::Dimensions;

// Up to this many multiply-adds a call stays on the calling thread. That is some 6 us of a VNNI
// core (1024 x 1024, one row, on Zen 4); a second thread would save 2 us of it and keep a core
// awake.
constexpr int64_t kSerialWork = int64_t{1} << 20;

// Multiply-adds in a chunk, at least: 1-2 us of a VNNI core, a hundred times an atomic claim.
constexpr int64_t kChunkWork = int64_t{1} << 18;

// Activation rows in a chunk, at most: a row block's codes are fetched once for eight tiles of
// rows, which hides the fetch; more would only coarsen the chunks.
constexpr int64_t kChunkRows = 8 * kMaxTileRows;

// Activation values quantised in one go, at least: some 5 us.
constexpr int64_t kQuantiseWork = int64_t{1} << 15;

// ---- checks ------------------------------------------------------------------------------------

std::string text(Dims dims) {
  std::string result = "[";
  for (size_t i = 0; i < dims.size(); ++i) result += (i == 0 ? "" : ", ") + std::to_string(dims[i]);
  return result + "]";
}

// What is wrong with an operand; built only when something is, since a product takes microseconds.
std::invalid_argument wrong(const char* what, const std::string& wanted, const std::string& got) {
  return std::invalid_argument(std::string(what) + ": wanted " + wanted + ", got " + got);
}

// One product of M consecutive rows with one weight tensor.
struct Item {
  int64_t x_row;    // first row among all rows of x
  int64_t codes;    // number of the weight tensor
  int64_t w_scale;  // number of the scale
  int64_t y_row;
};

struct Plan {
  int64_t m = 0, k = 0, n = 0;  // of one item
  int64_t input_blocks = 0, row_blocks = 0;
  int64_t x_rows = 0;  // all rows of x
  std::vector<Item> items;

  int64_t k_padded() const { return input_blocks * kBlockInputs; }
  int64_t codes_bytes() const { return row_blocks * input_blocks * kBlockBytes; }
  int64_t item_work() const { return m * row_blocks * kBlockRows * k_padded(); }
};

int64_t product(Dims dims, size_t count) {
  int64_t result = 1;
  for (size_t i = 0; i < count; ++i) result *= dims[i];
  return result;
}

// Enumerates the first `lead` dimensions of y, which the operands broadcast to. Trailing ones that
// only x has are folded into M, so that all its rows share a pass over the weights.
void add_items(Dims x, Dims codes, Dims scale, bool has_scale, Dims y, size_t lead, Plan& plan) {
  const auto scale_size = [&](size_t d) { return has_scale ? scale[d] : 1; };
  while (lead > 0 && codes[lead - 1] == 1 && scale_size(lead - 1) == 1) plan.m *= x[--lead];

  const int64_t count = product(y, lead);
  plan.items.reserve(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) {
    Item item{0, 0, 0, i * plan.m};
    int64_t rest = i;
    int64_t x_step = plan.m;
    int64_t codes_step = 1;
    int64_t scale_step = 1;
    for (size_t d = lead; d-- > 0;) {
      const int64_t at = rest % y[d];
      rest /= y[d];
      item.x_row += x[d] == 1 ? 0 : at * x_step;
      item.codes += codes[d] == 1 ? 0 : at * codes_step;
      item.w_scale += scale_size(d) == 1 ? 0 : at * scale_step;
      x_step *= x[d];
      codes_step *= codes[d];
      scale_step *= scale_size(d);
    }
    plan.items.push_back(item);
  }
}

Plan make_plan(Dims x, Dims codes, Dims scale, bool has_scale, Dims y) {
  if (x.size() < 2) throw wrong("x", "[..., M, K]", text(x));
  const size_t lead = x.size() - 2;
  const auto with_lead = [&](const char* dims) {
    return dims + (" with " + std::to_string(lead)) + " leading dimensions, as x has";
  };
  if (y.size() != lead + 2) throw wrong("result", with_lead("[..., M, N]"), text(y));
  if (codes.size() != lead + 3) throw wrong("codes", with_lead("[..., NB, KB, 64]"), text(codes));
  if (has_scale && scale.size() != lead) throw wrong("w_scale", with_lead("[...]"), text(scale));

  Plan plan;
  plan.m = x[lead];
  plan.k = x[lead + 1];
  plan.n = y[lead + 1];
  plan.row_blocks = blocks_of(plan.n);
  plan.input_blocks = blocks_of(plan.k);
  plan.x_rows = product(x, lead + 1);
  if (plan.k > kMaxInputs) throw wrong("x", "K <= " + std::to_string(kMaxInputs), text(x));
  if (y[lead] != plan.m) throw wrong("result", "M = " + std::to_string(plan.m), text(y));
  if (codes[lead] != plan.row_blocks || codes[lead + 1] != plan.input_blocks ||
      codes[lead + 2] != kBlockBytes) {
    const std::string wanted =
        "[..., " + std::to_string(plan.row_blocks) + ", " + std::to_string(plan.input_blocks) +
        ", 64] for K = " + std::to_string(plan.k) + " and N = " + std::to_string(plan.n);
    throw wrong("codes", wanted, text(codes));
  }
  for (size_t d = 0; d < lead; ++d) {
    const int64_t sizes[] = {x[d], codes[d], has_scale ? scale[d] : 1};
    bool fits = true;
    bool reached = false;
    for (const int64_t size : sizes) {
      fits &= size == 1 || size == y[d];
      reached |= size == y[d];
    }
    if (!fits || !reached)
      throw wrong("result", "the leading dimensions that x, codes and w_scale broadcast to",
                  text(y) + " for x " + text(x) + " and codes " + text(codes));
  }
  add_items(x, codes, scale, has_scale, y, lead, plan);
  return plan;
}

// ---- work --------------------------------------------------------------------------------------

// All rows of x, quantised and padded.
struct Activations {
  std::unique_ptr<int8_t[]> q;       // [x_rows][k_padded]
  std::unique_ptr<float[]> scale;    // [x_rows]
  std::unique_ptr<int32_t[]> q_sum;  // [x_rows]

  explicit Activations(const Plan& plan)
      : q(new int8_t[static_cast<size_t>(plan.x_rows * plan.k_padded())]),
        scale(new float[static_cast<size_t>(plan.x_rows)]),
        q_sum(new int32_t[static_cast<size_t>(plan.x_rows)]) {}
};

void prepare_row(const Kernel& kernel, const float* x, int64_t k, int64_t k_padded, int8_t* q,
                 float* scale, int32_t* q_sum) {
  kernel.quantize_f32(x, k, k_padded, q, scale, q_sum);
}

void prepare_row(const Kernel& kernel, const uint16_t* bf16, int64_t k, int64_t k_padded, int8_t* q,
                 float* scale, int32_t* q_sum) {
  kernel.quantize_bf16(bf16, k, k_padded, q, scale, q_sum);
}

void prepare_row(const Kernel& /*kernel*/, const int8_t* x, int64_t k, int64_t k_padded, int8_t* q,
                 float* scale, int32_t* q_sum) {
  std::copy_n(x, k, q);
  std::fill(q + k, q + k_padded, int8_t{0});
  int32_t sum = 0;
  for (int64_t i = 0; i < k; ++i) sum += x[i];
  *q_sum = sum;
  *scale = 1.0F;
}

template <typename X, typename Pool>
void prepare(const Kernel& kernel, const Plan& plan, const X* x, bool serial, Pool& pool,
             Activations& a) {
  const int64_t rows_per_chunk =
      serial ? plan.x_rows : std::max<int64_t>(1, kQuantiseWork / std::max<int64_t>(1, plan.k));
  const auto body = [&](int64_t chunk) {
    const int64_t end = std::min(plan.x_rows, (chunk + 1) * rows_per_chunk);
    for (int64_t r = chunk * rows_per_chunk; r < end; ++r)
      prepare_row(kernel, x + r * plan.k, plan.k, plan.k_padded(), &a.q[r * plan.k_padded()],
                  &a.scale[r], &a.q_sum[r]);
  };
  parallel_for(pool, (plan.x_rows + rows_per_chunk - 1) / rows_per_chunk, body);
}

// Rows [row, row_end) of an item with row blocks [block, block_end).
struct Chunk {
  int64_t row, row_end, block, block_end;
};

template <typename Y>
void multiply(const Kernel& kernel, const Plan& plan, const Item& item, const Chunk& chunk,
              const Activations& a, const uint8_t* codes, float w_scale, Y* y) {
  int32_t acc[kMaxTileRows * kMaxTileBlocks * kBlockRows];
  for (int64_t nb = chunk.block; nb < chunk.block_end; nb += kMaxTileBlocks) {
    const int blocks = static_cast<int>(std::min<int64_t>(kMaxTileBlocks, chunk.block_end - nb));
    const int64_t col = nb * kBlockRows;
    const int64_t cols = std::min<int64_t>(blocks * kBlockRows, plan.n - col);
    for (int64_t row = chunk.row; row < chunk.row_end; row += kMaxTileRows) {
      const int m = static_cast<int>(std::min<int64_t>(kMaxTileRows, chunk.row_end - row));
      const int64_t x_row = item.x_row + row;
      kernel.tile_product(codes + nb * plan.input_blocks * kBlockBytes, plan.input_blocks, blocks,
                          &a.q[x_row * plan.k_padded()], plan.k_padded(), &a.q_sum[x_row], m, acc);
      scale_tile(acc, blocks * kBlockRows, m, cols, &a.scale[x_row], w_scale,
                 y + (item.y_row + row) * plan.n + col, plan.n);
    }
  }
}

template <typename X, typename Y>
void run(ffi::ThreadPool pool, const Plan& plan, const X* x, const uint8_t* codes,
         const float* w_scale, Y* y) {
  const Kernel& kernel = active_kernel();
  count_call(kernel);
  const int64_t items = static_cast<int64_t>(plan.items.size());
  if (items == 0 || plan.m == 0 || plan.n == 0) return;

  const bool serial = items * plan.item_work() <= kSerialWork;
  Activations a(plan);
  prepare(kernel, plan, x, serial, pool, a);

  // Consecutive chunks share their row blocks, so that threads meet the same codes in the cache.
  const int64_t chunk_rows = serial ? plan.m : std::min(plan.m, kChunkRows);
  const int64_t block_work = std::max<int64_t>(1, chunk_rows * kBlockRows * plan.k_padded());
  const int64_t chunk_blocks =
      serial ? plan.row_blocks : (kChunkWork + block_work - 1) / block_work;
  const int64_t row_chunks = (plan.m + chunk_rows - 1) / chunk_rows;
  const int64_t block_chunks = (plan.row_blocks + chunk_blocks - 1) / chunk_blocks;
  const int64_t item_chunks = row_chunks * block_chunks;
  const auto body = [&](int64_t chunk) {
    const Item& item = plan.items[static_cast<size_t>(chunk / item_chunks)];
    const int64_t row = chunk % item_chunks % row_chunks * chunk_rows;
    const int64_t block = chunk % item_chunks / row_chunks * chunk_blocks;
    multiply(kernel, plan, item,
             {row, std::min(plan.m, row + chunk_rows), block,
              std::min(plan.row_blocks, block + chunk_blocks)},
             a, codes + item.codes * plan.codes_bytes(),
             w_scale == nullptr ? 1.0F : w_scale[item.w_scale], y);
  };
  if (serial) {
    for (int64_t chunk = 0; chunk < items * item_chunks; ++chunk) body(chunk);
  } else {
    parallel_for(pool, items * item_chunks, body);
  }
}

// ---- entry points ------------------------------------------------------------------------------

std::string text(ffi::DataType type) {
  switch (type) {
    case ffi::DataType::F32: return "f32";
    case ffi::DataType::BF16: return "bf16";
    case ffi::DataType::S8: return "s8";
    case ffi::DataType::U8: return "u8";
    case ffi::DataType::S32: return "s32";
    default: return "type " + std::to_string(static_cast<int>(type));
  }
}

void require_type(const ffi::AnyBuffer& buffer, ffi::DataType wanted, const char* what) {
  if (buffer.element_type() != wanted) throw wrong(what, text(wanted), text(buffer.element_type()));
}

// No exception crosses into XLA.
template <typename Function>
ffi::Error guarded(const char* name, const Function& function) noexcept {
  const auto failed = [name](ffi::ErrorCode code, const char* message) {
    return ffi::Error(code, std::string(name) + ": " + message);
  };
  try {
    function();
    return ffi::Error::Success();
  } catch (const std::invalid_argument& error) {
    return failed(ffi::ErrorCode::kInvalidArgument, error.what());
  } catch (const std::bad_alloc&) {
    return failed(ffi::ErrorCode::kResourceExhausted, "no memory for the quantised activations");
  } catch (const std::exception& error) {
    return failed(ffi::ErrorCode::kInternal, error.what());
  } catch (...) {
    return failed(ffi::ErrorCode::kInternal, "unknown exception");
  }
}

template <typename T>
T* data(const ffi::AnyBuffer& buffer) {
  return static_cast<T*>(buffer.untyped_data());
}

constexpr char kMatmul[] = "bitjax_ternary_matmul";
constexpr char kMatmulI32[] = "bitjax_ternary_matmul_i32";

ffi::Error ternary_matmul(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer codes,
                          ffi::AnyBuffer w_scale, ffi::Result<ffi::AnyBuffer> y) {
  return guarded(kMatmul, [&] {
    const bool bf16 = x.element_type() == ffi::DataType::BF16;
    if (!bf16 && x.element_type() != ffi::DataType::F32)
      throw wrong("x", "f32 or bf16", text(x.element_type()));
    require_type(codes, ffi::DataType::U8, "codes");
    require_type(w_scale, ffi::DataType::F32, "w_scale");
    require_type(*y, x.element_type(), "result");
    const Plan plan =
        make_plan(x.dimensions(), codes.dimensions(), w_scale.dimensions(), true, y->dimensions());
    if (bf16) {
      run(pool, plan, data<uint16_t>(x), data<uint8_t>(codes), data<float>(w_scale),
          data<uint16_t>(*y));
    } else {
      run(pool, plan, data<float>(x), data<uint8_t>(codes), data<float>(w_scale), data<float>(*y));
    }
  });
}

ffi::Error ternary_matmul_i32(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer codes,
                              ffi::Result<ffi::AnyBuffer> y) {
  return guarded(kMatmulI32, [&] {
    require_type(q, ffi::DataType::S8, "x");
    require_type(codes, ffi::DataType::U8, "codes");
    require_type(*y, ffi::DataType::S32, "result");
    const Plan plan = make_plan(q.dimensions(), codes.dimensions(), Dims(), false, y->dimensions());
    run(pool, plan, data<int8_t>(q), data<uint8_t>(codes), nullptr, data<int32_t>(*y));
  });
}

XLA_FFI_DEFINE_HANDLER(ternary_matmul_handler, ternary_matmul,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Arg<ffi::AnyBuffer>()    // x
                           .Arg<ffi::AnyBuffer>()    // codes
                           .Arg<ffi::AnyBuffer>()    // w_scale
                           .Ret<ffi::AnyBuffer>());  // y

XLA_FFI_DEFINE_HANDLER(ternary_matmul_i32_handler, ternary_matmul_i32,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Arg<ffi::AnyBuffer>()    // x
                           .Arg<ffi::AnyBuffer>()    // codes
                           .Ret<ffi::AnyBuffer>());  // y

}  // namespace

const Registration kRegistrations[kRegistrationCount] = {
    {kMatmul, ternary_matmul_handler},
    {kMatmulI32, ternary_matmul_i32_handler},
};

}  // namespace bitjax
