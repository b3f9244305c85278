// The custom calls of a training step's attention; training_attention.h has the arithmetic. B
// sequences of T tokens, H heads of queries and G of keys and of values, N = H + 2G, h dimensions.
//
//   bitjax_train_attention
//     qkv f32 [B, T, N, h], turn f32 [B, T, h], segments s32 [B, T], or [B, 0]: one a sequence
//     -> out f32 [B, T, H h], rows f32 [B, H, 2, T]: maxima and totals
//   bitjax_train_attention_backward
//     qkv, turn, segments, out, rows as above, d_out f32 [B, T, H h]
//     -> d_qkv f32 [B, T, N, h], parts f32 [parts_size]
//
// Keys and values get gradients from all queries that see them. One chunk of work sums them in order
// for its sequence and head, unless these are few: then its queries are dealt out to several chunks,
// each of which sums into a part of its own. How many depends on the shape alone.

#include "handlers.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <string>

#include "dispatch.h"
#include "handler_common.h"
#include "parallel.h"
#include "training_attention.h"
#include "xla/ffi/api/ffi.h"

namespace bitjax {
namespace {

// Chunks of work wanted backward: several for each of a few threads.
constexpr int64_t kWantedChunks = 32;

void require_floats(const char* what, const ffi::AnyBuffer& buffer,
                    std::initializer_list<int64_t> wanted) {
  require_type(buffer, ffi::DataType::F32, what);
  const Dims dims = buffer.dimensions();
  if (std::equal(dims.begin(), dims.end(), wanted.begin(), wanted.end())) return;
  std::string sizes = "[";
  for (const int64_t size : wanted) sizes += (sizes.size() == 1 ? "" : ", ") + std::to_string(size);
  throw wrong(what, sizes + "]", text(dims));
}

// What both calls are given.
struct Operands {
  int64_t B, T, N, H, G;
  int h;
  const float* qkv;
  const float* turn;
  const int32_t* segments;  // null: one a sequence

  Operands(const ffi::AnyBuffer& qkv_buffer, const ffi::AnyBuffer& turn_buffer,
           const ffi::AnyBuffer& segments_buffer, const ffi::AnyBuffer& out) {
    const Dims dims = qkv_buffer.dimensions();
    if (dims.size() != 4) throw wrong("qkv", "4 dimensions", text(dims));
    B = dims[0], T = dims[1], N = dims[2];
    require_floats("qkv", qkv_buffer, {B, T, N, dims[3]});
    if (dims[3] < kFloats || dims[3] > kMaxHeadDim || dims[3] % kFloats != 0)
      throw wrong("qkv", "heads of a multiple of 16 up to 512 dimensions", text(dims));
    h = static_cast<int>(dims[3]);
    require_floats("turn", turn_buffer, {B, T, h});
    require_type(segments_buffer, ffi::DataType::S32, "segments");
    const Dims of = segments_buffer.dimensions();
    if (of.size() != 2 || of[0] != B || (of[1] != T && of[1] != 0))
      throw wrong("segments", "[" + std::to_string(B) + ", " + std::to_string(T) + " or 0]", text(of));
    if (out.dimensions().size() != 3) throw wrong("out", "3 dimensions", text(out.dimensions()));
    H = out.dimensions()[2] / h;
    G = (N - H) / 2;
    if (H < 1 || G < 1 || H + 2 * G != N || H % G != 0)
      throw wrong("out", "heads that those of keys divide", text(out.dimensions()));
    require_floats("out", out, {B, T, H * h});
    qkv = data<float>(qkv_buffer);
    turn = data<float>(turn_buffer);
    segments = of[1] == 0 ? nullptr : data<int32_t>(segments_buffer);
  }

  int64_t blocks() const { return (T + kAttentionBlock - 1) / kAttentionBlock; }
  int64_t stride() const { return N * h; }
  int64_t group() const { return H / G; }
  int64_t query(int64_t b, int64_t head) const { return b * T * stride() + head * h; }
  int64_t key(int64_t b, int64_t g) const { return query(b, H + g); }
  int64_t value(int64_t b, int64_t g) const { return query(b, H + G + g); }
  int64_t mixed(int64_t b, int64_t t, int64_t head) const { return ((b * T + t) * H + head) * h; }
  int64_t maximum(int64_t b, int64_t head) const { return (b * H + head) * 2 * T; }
  int64_t total(int64_t b, int64_t head) const { return maximum(b, head) + T; }

  TrainingHead head(int64_t b, int64_t index) const {
    const int64_t g = index / group();
    return {qkv + query(b, index),
            qkv + key(b, g),
            qkv + value(b, g),
            stride(),
            turn + b * T * h,
            segments == nullptr ? nullptr : segments + b * T,
            T,
            h};
  }

 private:
  static constexpr int64_t kFloats = 16;
};

// Memory to work in for each thread that may run a chunk at once.
class Places {
 public:
  Places(int64_t count, int64_t floats)
      : count_(count),
        floats_(floats),
        memory_(new float[static_cast<size_t>(count * floats)]),
        taken_(new std::atomic<bool>[static_cast<size_t>(count)]) {
    for (int64_t i = 0; i < count; ++i) taken_[static_cast<size_t>(i)] = false;
  }

  template <typename Body>
  void with(const Body& body) {
    for (int64_t i = 0;; i = (i + 1) % count_) {
      std::atomic<bool>& taken = taken_[static_cast<size_t>(i)];
      if (taken.exchange(true, std::memory_order_acquire)) continue;
      body(memory_.get() + i * floats_);
      taken.store(false, std::memory_order_release);
      return;
    }
  }

 private:
  const int64_t count_, floats_;
  const std::unique_ptr<float[]> memory_;
  const std::unique_ptr<std::atomic<bool>[]> taken_;
};

template <typename Body>
void for_each_chunk(ffi::ThreadPool& pool, int64_t chunks, int h, const Body& body) {
  const int64_t threads = std::min<int64_t>(pool.num_threads(), thread_limit.load());
  Places places(std::max<int64_t>(std::min(threads, chunks), 1), training_attention_scratch(h));
  parallel_for(pool, chunks, [&](int64_t chunk) {
    places.with([&](float* scratch) { body(chunk, scratch); });
  });
}

ffi::Error forward(ffi::ThreadPool pool, ffi::AnyBuffer qkv, ffi::AnyBuffer turn,
                   ffi::AnyBuffer segments, ffi::Result<ffi::AnyBuffer> out,
                   ffi::Result<ffi::AnyBuffer> rows) {
  return guarded("bitjax_train_attention", [&] {
    const Operands x(qkv, turn, segments, *out);
    require_floats("rows", *rows, {x.B, x.H, 2, x.T});
    const TrainingAttentionKernel kernel = active_training_attention();
    float* const mixed = data<float>(*out);
    float* const numbers = data<float>(*rows);
    const int64_t blocks = x.blocks();
    for_each_chunk(pool, x.B * x.H * blocks, x.h, [&](int64_t i, float* scratch) {
      const int64_t first = i % blocks * kAttentionBlock, head = i / blocks % x.H;
      const int64_t b = i / blocks / x.H;
      kernel.forward(x.head(b, head), first, mixed + x.mixed(b, first, head), x.H * x.h,
                     numbers + x.maximum(b, head) + first, numbers + x.total(b, head) + first,
                     scratch);
    });
  });
}

// Where the gradients of the keys and values of a head are summed: in the result, or in parts
// [B][G][count][2][T][h].
struct Parts {
  int64_t count;
  explicit Parts(const Operands& x)
      : count(std::min(x.group() * x.blocks(),
                       (kWantedChunks + x.B * x.G - 1) / std::max<int64_t>(x.B * x.G, 1))) {}
  int64_t size(const Operands& x) const {
    return count > 1 ? x.B * x.G * count * 2 * x.T * x.h : 0;
  }
};

ffi::Error backward(ffi::ThreadPool pool, ffi::AnyBuffer qkv, ffi::AnyBuffer turn,
                    ffi::AnyBuffer segments, ffi::AnyBuffer out, ffi::AnyBuffer rows,
                    ffi::AnyBuffer d_out, ffi::Result<ffi::AnyBuffer> d_qkv,
                    ffi::Result<ffi::AnyBuffer> parts) {
  return guarded("bitjax_train_attention_backward", [&] {
    const Operands x(qkv, turn, segments, out);
    require_floats("rows", rows, {x.B, x.H, 2, x.T});
    require_floats("d_out", d_out, {x.B, x.T, x.H * x.h});
    require_floats("d_qkv", *d_qkv, {x.B, x.T, x.N, x.h});
    const Parts split(x);
    require_floats("parts", *parts, {split.size(x)});
    const TrainingAttentionKernel kernel = active_training_attention();
    const float* const mixed = data<float>(out);
    const float* const numbers = data<float>(rows);
    const float* const gradient = data<float>(d_out);
    float* const result = data<float>(*d_qkv);
    float* const sums = data<float>(*parts);
    const int64_t plane = x.T * x.h, count = split.count;

    for_each_chunk(pool, x.B * x.G * count, x.h, [&](int64_t i, float* scratch) {
      const int64_t part = i % count, g = i / count % x.G, b = i / count / x.G;
      float* dk = result + x.key(b, g);
      float* dv = result + x.value(b, g);
      int64_t stride = x.stride();
      if (count > 1) {
        dk = sums + i * 2 * plane;
        dv = dk + plane;
        stride = x.h;
        std::fill_n(dk, 2 * plane, 0.0F);
      }
      for (int64_t pair = part; pair < x.group() * x.blocks(); pair += count) {
        const int64_t first = pair % x.blocks() * kAttentionBlock;
        const int64_t head = g * x.group() + pair / x.blocks(), at = x.mixed(b, first, head);
        kernel.backward(x.head(b, head), first, mixed + at, gradient + at, x.H * x.h,
                        numbers + x.maximum(b, head) + first, numbers + x.total(b, head) + first,
                        result + x.query(b, head) + first * x.stride(), dk, dv, stride,
                        count == 1 && pair < x.blocks(), scratch);
      }
      if (count == 1)
        kernel.finish(dk, stride, 1, 0, x.T, x.h, x.turn + b * plane, dk, stride);
    });
    if (count == 1) return;
    const int64_t blocks = x.blocks();
    parallel_for(pool, x.B * x.G * blocks, [&](int64_t i) {
      const int64_t first = i % blocks * kAttentionBlock, head = i / blocks;
      const int64_t g = head % x.G, b = head / x.G;
      const int64_t n = std::min<int64_t>(kAttentionBlock, x.T - first), to = first * x.stride();
      const float* const from = sums + head * count * 2 * plane + first * x.h;
      kernel.finish(from, x.h, count, 2 * plane, n, x.h, x.turn + b * plane + first * x.h,
                    result + x.key(b, g) + to, x.stride());
      kernel.finish(from + plane, x.h, count, 2 * plane, n, x.h, nullptr,
                    result + x.value(b, g) + to, x.stride());
    });
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER(train_attention_handler, forward,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Arg<ffi::AnyBuffer>()    // qkv
                           .Arg<ffi::AnyBuffer>()    // turn
                           .Arg<ffi::AnyBuffer>()    // segments
                           .Ret<ffi::AnyBuffer>()    // out
                           .Ret<ffi::AnyBuffer>());  // rows

XLA_FFI_DEFINE_HANDLER(train_attention_backward_handler, backward,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Arg<ffi::AnyBuffer>()    // qkv
                           .Arg<ffi::AnyBuffer>()    // turn
                           .Arg<ffi::AnyBuffer>()    // segments
                           .Arg<ffi::AnyBuffer>()    // out
                           .Arg<ffi::AnyBuffer>()    // rows
                           .Arg<ffi::AnyBuffer>()    // d_out
                           .Ret<ffi::AnyBuffer>()    // d_qkv
                           .Ret<ffi::AnyBuffer>());  // parts

const Registration kTrainingAttentionRegistrations[2] = {
    {"bitjax_train_attention", train_attention_handler},
    {"bitjax_train_attention_backward", train_attention_backward_handler}};

}  // namespace bitjax
