// The custom call that draws tokens where no logit is changed; sampling.h has the equations.
// Names of dimensions: M rows, V tokens.
//
//   bitjax_sample
//     logits f32     [M, V]
//     floats f32     [M, 3]   temperature, top_p, min_p
//     integers u32   [M, 8]   top_k, seed, sample and position of each row, 64 bits, the low half first
//     rows s32       [1], how many of the M rows are wanted; the others are left as they are
//     -> drawn s32   [M], -2 where logits are not finite

#include <algorithm>

#include "dispatch.h"
#include "handler_common.h"
#include "handlers.h"
#include "parallel.h"
#include "sampling.h"

namespace bitjax {
namespace {

constexpr int64_t kFloats = 3;
constexpr int64_t kIntegers = 8;

// Logits that one thread looks at alone, some 50 us.
constexpr int64_t kSerialValues = int64_t{1} << 18;

constexpr char kSample[] = "bitjax_sample";

void require_shape(const ffi::AnyBuffer& buffer, const char* what, int64_t rows, int64_t width) {
  const Dims dims = buffer.dimensions();
  if (dims.size() != 2 || dims[0] != rows || dims[1] != width)
    throw wrong(what, "[" + std::to_string(rows) + ", " + std::to_string(width) + "]", text(dims));
}

ffi::Error sample(ffi::ThreadPool pool, ffi::AnyBuffer logits, ffi::AnyBuffer floats,
                  ffi::AnyBuffer integers, ffi::AnyBuffer rows, ffi::Result<ffi::AnyBuffer> drawn) {
  return guarded(kSample, [&] {
    require_type(logits, ffi::DataType::F32, "logits");
    require_type(floats, ffi::DataType::F32, "floats");
    require_type(integers, ffi::DataType::U32, "integers");
    require_type(rows, ffi::DataType::S32, "rows");
    require_type(*drawn, ffi::DataType::S32, "drawn");
    const Dims dims = logits.dimensions();
    if (dims.size() != 2 || dims[1] == 0) throw wrong("logits", "[M, V]", text(dims));
    const int64_t M = dims[0];
    const int64_t V = dims[1];
    require_shape(floats, "floats", M, kFloats);
    require_shape(integers, "integers", M, kIntegers);
    if (rows.element_count() != 1) throw wrong("rows", "one number", text(rows.dimensions()));
    if (drawn->dimensions().size() != 1 || drawn->dimensions()[0] != M)
      throw wrong("drawn", "[" + std::to_string(M) + "]", text(drawn->dimensions()));
    const int64_t count = std::clamp<int64_t>(*data<int32_t>(rows), 0, M);
    const Kernel& kernel = active_kernel();
    const auto one = [&](int64_t r) {
      const float* f = data<float>(floats) + r * kFloats;
      const uint32_t* n = data<uint32_t>(integers) + r * kIntegers;
      const auto wide = [n](int i) { return n[2 * i] | static_cast<uint64_t>(n[2 * i + 1]) << 32; };
      SampleRow row{};
      row.logits = data<float>(logits) + r * V;
      row.temperature = f[0];
      row.top_p = f[1];
      row.min_p = f[2];
      row.top_k = static_cast<int64_t>(std::min<uint64_t>(wide(0), static_cast<uint64_t>(V)));
      row.seed = wide(1);
      row.sample = wide(2);
      row.position = wide(3);
      data<int32_t>(*drawn)[r] = sample_row(kernel, row, V, 0, nullptr, nullptr, false).token;
    };
    if (count * V <= kSerialValues) {
      for (int64_t r = 0; r < count; ++r) one(r);
    } else {
      parallel_for(pool, count, one);
    }
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER(sample_handler, sample,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Arg<ffi::AnyBuffer>()    // logits
                           .Arg<ffi::AnyBuffer>()    // floats
                           .Arg<ffi::AnyBuffer>()    // integers
                           .Arg<ffi::AnyBuffer>()    // rows
                           .Ret<ffi::AnyBuffer>());  // drawn

const Registration kSamplingRegistrations[1] = {{kSample, sample_handler}};

}  // namespace bitjax
