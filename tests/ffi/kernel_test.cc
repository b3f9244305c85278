// Every kernel that is built in and that this machine can run, against a naive oracle; the epilogue
// and the chunked loop as well. Needs neither XLA nor Python:
//
//   cmake -S ffi -B build/tests -DBITJAX_EXTENSION=OFF -DBITJAX_KERNEL_TESTS=ON
//   -DBITJAX_SANITIZE=ON cmake --build build/tests && build/tests/kernel_test
//
// Inputs lie in heap buffers of exactly their size, at odd offsets, so that the address sanitizer
// sees every byte read or written outside them.

#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "dispatch.h"
#include "epilogue.h"
#include "kernel.h"
#include "packed_format.h"
#include "parallel.h"

namespace bitjax {
Kernel avxvnni_evex_kernel();  // only in builds for test

namespace {

int passed = 0;
int failed = 0;

void check(bool ok, const std::string& what) {
  (ok ? passed : failed) += 1;
  if (!ok && failed <= 20) std::printf("FAILED %s\n", what.c_str());
}

// A heap copy of values that begins `offset` elements into its allocation and ends with it.
template <typename T>
class Buffer {
 public:
  Buffer(std::vector<T> values, size_t offset) : offset_(offset), size_(values.size()) {
    data_ = std::make_unique<T[]>(offset_ + size_);
    if (size_ > 0) std::memcpy(data_.get() + offset_, values.data(), size_ * sizeof(T));
  }
  T* get() const { return data_.get() + offset_; }
  size_t size() const { return size_; }

 private:
  std::unique_ptr<T[]> data_;
  size_t offset_;
  size_t size_;
};

std::mt19937_64 rng(20240227);

int64_t uniform(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(rng);
}

std::string label(const Kernel& kernel, const char* what, int64_t m, int64_t k, int64_t n) {
  return std::string(kernel.name) + " " + what + " m=" + std::to_string(m) +
         " k=" + std::to_string(k) + " n=" + std::to_string(n);
}

// ---- quantize_row ------------------------------------------------------------------------------

float from_bf16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float x;
  std::memcpy(&x, &wide, sizeof x);
  return x;
}

float widened(float x) { return x; }
float widened(uint16_t bits) { return from_bf16(bits); }

// The contract in the words of kernel.h; the float32 operations are single roundings of double
// ones (exact for a product or a quotient of two float32 values rounded once).
struct Quantised {
  std::vector<int> q;
  float scale = 0;
  int64_t sum = 0;
};

template <typename T>
Quantised quantise_oracle(const std::vector<T>& x, int64_t k_padded) {
  Quantised result;
  result.q.assign(static_cast<size_t>(k_padded), 0);
  float amax = 1e-5F;
  for (const T v : x) {
    if (!std::isfinite(widened(v))) {
      result.scale = std::numeric_limits<float>::quiet_NaN();
      return result;
    }
    amax = std::fmax(amax, std::fabs(widened(v)));
  }
  const float inv = static_cast<float>(127.0 / static_cast<double>(amax));
  for (size_t i = 0; i < x.size(); ++i) {
    const double v = static_cast<float>(static_cast<double>(widened(x[i])) * inv);
    double rounded = std::floor(v + 0.5);
    if (rounded - v == 0.5 && std::fmod(rounded, 2.0) != 0) rounded -= 1;  // ties to even
    result.q[i] = static_cast<int>(std::fmin(127, std::fmax(-128, rounded)));
    result.sum += result.q[i];
  }
  result.scale = amax * static_cast<float>(1.0 / 127.0);
  return result;
}

bool same(float a, float b) {
  return (std::isnan(a) && std::isnan(b)) || std::memcmp(&a, &b, sizeof a) == 0;
}

template <typename T>
void check_quantise(const Kernel& kernel, QuantizeRow<T> quantise, const std::vector<T>& values,
                    const char* what) {
  const int64_t k = static_cast<int64_t>(values.size());
  const int64_t k_padded = blocks_of(k) * kBlockInputs;
  const Quantised wanted = quantise_oracle(values, k_padded);
  for (const size_t offset : {size_t{0}, size_t{1}, size_t{3}}) {
    const Buffer<T> x(values, offset);
    const Buffer<int8_t> q(std::vector<int8_t>(static_cast<size_t>(k_padded), 99), offset);
    float scale = -1;
    int32_t sum = -1;
    quantise(x.get(), k, k_padded, q.get(), &scale, &sum);
    bool ok = same(scale, wanted.scale) && sum == wanted.sum;
    for (size_t i = 0; i < wanted.q.size(); ++i) ok &= q.get()[i] == wanted.q[i];
    check(ok, label(kernel, what, 1, k, 0));
  }
}

void check_quantise_both(const Kernel& kernel, const std::vector<float>& values, const char* what) {
  check_quantise<float>(kernel, kernel.quantize_f32, values, what);
  std::vector<uint16_t> narrow;
  for (const float v : values) narrow.push_back(round_to_bf16(v));
  check_quantise<uint16_t>(kernel, kernel.quantize_bf16, narrow, what);
}

void test_quantise(const Kernel& kernel) {
  std::normal_distribution<float> normal;
  constexpr float inf = std::numeric_limits<float>::infinity();
  constexpr float nan = std::numeric_limits<float>::quiet_NaN();
  std::vector<int64_t> sizes = {127, 128, 129, 255, 256, 257, 1000, 4099};
  for (int64_t k = 0; k <= 70; ++k) sizes.push_back(k);
  for (const int64_t k : sizes) {
    std::vector<float> x(static_cast<size_t>(k));
    for (float& v : x) v = normal(rng);
    check_quantise_both(kernel, x, "random");
    if (k == 0) continue;
    const size_t at = static_cast<size_t>(uniform(0, k - 1));
    // A scale of exactly 1 makes i + 0.5 a tie: 127 is the largest value.
    std::vector<float> ties(x.size());
    for (size_t i = 0; i < ties.size(); ++i)
      ties[i] = static_cast<float>(i % 127) * (i % 2 == 0 ? 1.0F : -1.0F) - 0.5F;
    ties[at] = 127;
    check_quantise_both(kernel, ties, "ties");
    for (const float peak : {3.4028235e38F, 1e30F, 1e-5F, 0.99e-5F, 1e-12F, 1e-40F, 0.0F}) {
      std::vector<float> scaled(x.size());
      for (float& v : scaled) v = peak * static_cast<float>(uniform(-1000, 1000)) / 1000.0F;
      scaled[at] = -peak;
      check_quantise_both(kernel, scaled, "peak");
    }
    for (const float bad : {nan, -nan, inf, -inf}) {
      std::vector<float> spoilt = x;
      spoilt[at] = bad;
      check_quantise_both(kernel, spoilt, "not finite");
      spoilt.back() = bad;
      check_quantise_both(kernel, spoilt, "not finite at the end");
    }
  }
}

// ---- tile_product ------------------------------------------------------------------------------

enum class Fill { kRandom, kExtreme, kZero, kAnyByte };

int8_t activation(Fill fill, int64_t i) {
  if (fill == Fill::kRandom || fill == Fill::kAnyByte)
    return static_cast<int8_t>(uniform(-128, 127));
  if (fill == Fill::kZero) return 0;
  return i % 2 == 0 ? int8_t{-128} : int8_t{127};  // each row one value
}

// row_blocks * 16 outputs, all of them: padding is the caller's business, as in the format.
void check_product(const Kernel& kernel, int m, int64_t input_blocks, int row_blocks, Fill fill,
                   int weight, const char* what) {
  const int64_t k = input_blocks * kBlockInputs;
  const int64_t n = row_blocks * kBlockRows;
  const int64_t stride = k + uniform(0, 3);
  std::vector<uint8_t> packed(static_cast<size_t>(row_blocks * input_blocks * kBlockBytes),
                              kPaddingByte);
  for (int64_t row = 0; row < n; ++row)
    for (int64_t i = 0; i < k; ++i)
      encode_weight(packed.data(), row, i, input_blocks,
                    weight == 2 ? static_cast<int>(uniform(-1, 1)) : weight);
  if (fill == Fill::kAnyByte)
    for (uint8_t& byte : packed) byte = static_cast<uint8_t>(uniform(0, 255));

  std::vector<int8_t> rows(static_cast<size_t>(m == 0 ? 0 : (m - 1) * stride + k), 77);
  std::vector<int32_t> sums(static_cast<size_t>(m));
  for (int i = 0; i < m; ++i)
    for (int64_t j = 0; j < k; ++j) {
      rows[static_cast<size_t>(i * stride + j)] = activation(fill, i);
      sums[static_cast<size_t>(i)] += rows[static_cast<size_t>(i * stride + j)];
    }

  const Buffer<uint8_t> codes(packed, static_cast<size_t>(uniform(0, 7)));
  const Buffer<int8_t> q(rows, static_cast<size_t>(uniform(0, 7)));
  const Buffer<int32_t> q_sum(sums, static_cast<size_t>(uniform(0, 3)));
  const Buffer<int32_t> out(std::vector<int32_t>(static_cast<size_t>(m * n), -7),
                            static_cast<size_t>(uniform(0, 3)));
  kernel.tile_product(codes.get(), input_blocks, row_blocks, q.get(), stride, q_sum.get(), m,
                      out.get());
  bool ok = true;
  for (int i = 0; i < m; ++i)
    for (int64_t row = 0; row < n; ++row) {
      int64_t wanted = 0;
      for (int64_t j = 0; j < k; ++j)
        wanted +=
            int64_t{q.get()[i * stride + j]} * decode_weight(codes.get(), row, j, input_blocks);
      ok &= out.get()[i * n + row] == wanted;
    }
  check(ok, label(kernel, what, m, k, n));
}

void test_product(const Kernel& kernel) {
  for (int m = 0; m <= kMaxTileRows; ++m) {
    // 1..7 blocks, and both sides of multiples of the 10 blocks that AVX2 sums in int16.
    for (const int64_t input_blocks : {0, 1, 2, 3, 5, 7, 9, 10, 11, 15, 16, 19, 20, 21, 40, 43}) {
      const int row_blocks = static_cast<int>(uniform(1, kMaxTileBlocks));
      check_product(kernel, m, input_blocks, row_blocks, Fill::kRandom, 2, "random");
      check_product(kernel, m, input_blocks, 1, Fill::kAnyByte, 2, "any byte");
      for (const int weight : {-1, 0, 1})
        check_product(kernel, m, input_blocks, 1, Fill::kExtreme, weight, "extreme");
    }
    for (int row_blocks = 0; row_blocks <= kMaxTileBlocks; ++row_blocks)
      check_product(kernel, m, 4, row_blocks, Fill::kRandom, 2, "row blocks");
    check_product(kernel, m, 12, 2, Fill::kZero, 2, "zero activations");
  }
  // The largest K, at the extremes: the int32 bound, invalid codes included.
  for (const int m : {1, 2, kMaxTileRows}) {
    const int64_t input_blocks = kMaxInputs / kBlockInputs;
    check_product(kernel, m, input_blocks, 1, Fill::kExtreme, 1, "largest K");
    check_product(kernel, m, input_blocks, 1, Fill::kExtreme, -1, "largest K");
    check_product(kernel, m, input_blocks, 1, Fill::kExtreme, 2, "largest K, random");
  }
}

// ---- format, epilogue, loop, dispatch -----------------------------------------------------------

// The golden bytes of tests/test_packing.py: weight ((row + input) mod 3) - 1.
void test_golden_bytes() {
  const uint8_t golden[3][4] = {{36, 73, 146, 36}, {73, 146, 36, 73}, {146, 36, 73, 146}};
  std::vector<uint8_t> block(kBlockBytes, kPaddingByte);
  for (int r = 0; r < kBlockRows; ++r)
    for (int i = 0; i < kBlockInputs; ++i) encode_weight(block.data(), r, i, 1, (r + i) % 3 - 1);
  bool ok = true;
  for (int byte = 0; byte < kBlockBytes; ++byte)
    ok &= block[byte] == golden[byte / 4 % 3][byte % 4];
  check(ok, "format: golden bytes");
}

void test_format() {
  std::vector<uint8_t> block(kBlockBytes, kPaddingByte);
  encode_weight(block.data(), 3, 4 * 2 + 1, 1, 1);  // row 3, plane 2, j 1: code 2 at bits 4..5
  encode_weight(block.data(), 15, 15, 1, -1);       // row 15, plane 3, j 3: code 0 at bits 6..7
  check(block[3 * 4 + 1] == 0x65, "format: plane 2 of byte 13");
  check(block[63] == 0x15, "format: plane 3 of byte 63");
  check(code_position(16, 0, 5).byte == 5 * 64, "format: the second row block follows the first");
  check(code_position(0, 16, 5).byte == 64, "format: input blocks are consecutive");
  check(blocks_of(0) == 0 && blocks_of(1) == 1 && blocks_of(16) == 1 && blocks_of(17) == 2,
        "format: blocks_of");
}

void test_epilogue() {
  // Every upper half with lower halves around the tie, against rounding by distance.
  for (uint32_t high = 0; high < 0x10000; high += 7)
    for (const uint32_t low : {0U, 1U, 0x7FFFU, 0x8000U, 0x8001U, 0xFFFFU}) {
      const uint32_t bits = (high << 16) | low;
      float x;
      std::memcpy(&x, &bits, sizeof x);
      const uint16_t got = round_to_bf16(x);
      if (std::isnan(x)) {
        check(std::isnan(from_bf16(got)), "bf16: NaN stays NaN");
        continue;
      }
      const bool up = low > 0x8000U || (low == 0x8000U && (high & 1U) != 0);
      check(got == static_cast<uint16_t>(high + (up ? 1 : 0)), "bf16: nearest even");
    }

  // A tile of 3 x 5 out of accumulators 16 apart into rows 7 apart; nothing else is written.
  std::vector<int32_t> acc(48);
  for (size_t i = 0; i < acc.size(); ++i) acc[i] = static_cast<int32_t>(i) - 20;
  const std::vector<float> x_scale = {0.1F, 3.0F, std::nanf("")};
  std::vector<float> y(21, -1);
  scale_tile(acc.data(), 16, 3, 5, x_scale.data(), 0.7F, y.data(), 7);
  for (size_t i = 0; i < 3; ++i)
    for (size_t n = 0; n < 7; ++n) {
      const float factor = x_scale[i] * 0.7F;
      const float wanted = n < 5 ? static_cast<float>(acc[i * 16 + n]) * factor : -1;
      check(same(y[i * 7 + n], wanted), "scale_tile");
    }
}

// A pool whose threads run tasks in their own time, down to never before the call has returned.
class TestPool {
 public:
  enum class When { kThread, kInline, kLater, kThrows };
  TestPool(When when, int64_t threads) : when_(when), threads_(threads) {}
  ~TestPool() {
    for (auto& task : later_) task();
    for (std::thread& thread : running_) thread.join();
  }
  int64_t num_threads() const { return threads_; }
  template <typename F>
  void Schedule(F task) {
    if (when_ == When::kThrows && scheduled_++ == 1) throw std::bad_alloc();
    if (when_ == When::kInline) task();
    if (when_ == When::kLater) later_.emplace_back(task);
    if (when_ == When::kThread || when_ == When::kThrows) running_.emplace_back(task);
  }

 private:
  When when_;
  int64_t threads_;
  int scheduled_ = 0;
  std::vector<std::function<void()>> later_;
  std::vector<std::thread> running_;
};

void test_loop() {
  using When = TestPool::When;
  for (const When when : {When::kThread, When::kInline, When::kLater, When::kThrows})
    for (const int64_t threads : {0, 1, 2, 5})
      for (const int64_t chunks : {0, 1, 2, 3, 64, 1000}) {
        TestPool pool(when, threads);
        {
          auto seen = std::make_unique<std::vector<int>>(static_cast<size_t>(chunks));
          const auto body = [&](int64_t chunk) { ++(*seen)[static_cast<size_t>(chunk)]; };
          parallel_for(pool, chunks, body);
          bool once = true;
          for (const int count : *seen) once &= count == 1;
          check(once, "parallel_for: every chunk once");
        }  // late tasks run after this, when the body and its buffer are gone
      }
}

// Helpers hold their chunks longer than the caller does, past its spinning: it has to wait for
// them.
void test_loop_waits() {
  const std::thread::id caller = std::this_thread::get_id();
  std::vector<std::atomic<int>> seen(12);
  const auto body = [&](int64_t chunk) {
    const bool helper = std::this_thread::get_id() != caller;
    std::this_thread::sleep_for(std::chrono::milliseconds(helper ? 200 : 2));
    ++seen[static_cast<size_t>(chunk)];
  };
  TestPool pool(TestPool::When::kThread, 3);
  parallel_for(pool, static_cast<int64_t>(seen.size()), body);
  bool once = true;
  for (const auto& count : seen) once &= count == 1;
  check(once, "parallel_for: returns when every chunk is done");
}

template <typename Function>
bool refuses(const Function& function) {
  try {
    function();
    return false;
  } catch (const std::invalid_argument&) {
    return true;
  }
}

void test_dispatch() {
  const auto compiled = compiled_kernels();
  const auto available = available_kernels();
  check(compiled.back() == "scalar" && available.back() == "scalar", "scalar is the last resort");
  for (const std::string& name : compiled) {
    bool supported = false;
    for (const std::string& other : available) supported |= other == name;
    if (supported) {
      force_kernel(name);
      check(active_kernel().name == name, "forced kernel is active: " + name);
    } else {
      const std::string before = active_kernel().name;
      check(refuses([&] { force_kernel(name); }), "unsupported kernel is refused: " + name);
      check(active_kernel().name == before, "a refusal changes nothing");
    }
  }
  check(refuses([] { force_kernel("no-such-kernel"); }), "unknown kernel is refused");
  force_kernel("");
  check(active_kernel().name == available.front(), "default is the first available");
  const uint64_t before = kernel_calls().front().second;
  force_kernel(available.front());
  count_call(active_kernel());
  uint64_t after = 0;
  for (const auto& [name, count] : kernel_calls())
    if (name == available.front()) after = count;
  check(after == (compiled.front() == available.front() ? before + 1 : 1), "calls are counted");
  force_kernel("");
}

int run() {
  test_golden_bytes();
  test_format();
  test_epilogue();
  test_loop();
  test_loop_waits();
  test_dispatch();
  std::vector<Kernel> kernels;
  for (const std::string& name : available_kernels()) {
    force_kernel(name);
    kernels.push_back(active_kernel());
  }
#ifdef BITJAX_HAVE_AVXVNNI_EVEX
  for (const std::string& name : available_kernels())
    if (name == "avx512vnni") kernels.push_back(avxvnni_evex_kernel());
#endif
  for (const Kernel& kernel : kernels) {
    const int before = passed;
    test_quantise(kernel);
    test_product(kernel);
    std::printf("%s: %d passed\n", kernel.name, passed - before);
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}

}  // namespace
}  // namespace bitjax

int main() { return bitjax::run(); }
