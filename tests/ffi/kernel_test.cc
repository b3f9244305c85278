// Every kernel that is built in and that this machine can run, against naive oracles; the format,
// the epilogue and the chunked loop as well. Needs neither XLA nor Python:
//
//   cmake -S ffi -B build -DBITJAX_EXTENSION=OFF -DBITJAX_KERNEL_TESTS=ON -DBITJAX_SANITIZE=ON
//   cmake --build build && build/kernel_test [the kernel that this machine must choose]
//
// Every product is computed twice: in heap buffers at odd offsets, and in front of guard pages.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "buffer.h"
#include "dispatch.h"
#include "epilogue.h"
#include "form_times.h"
#include "kernel.h"
#include "packed_format.h"
#include "parallel.h"

namespace bitjax {
Kernel avxvnni_evex_kernel();  // only in builds for test

namespace {

int passed = 0;
int failed = 0;
std::map<std::string, int> passed_by;  // kernel

bool check(bool ok, const std::string& what) {
  (ok ? passed : failed) += 1;
  if (!ok && failed <= 20) std::printf("FAILED %s\n", what.c_str());
  return ok;
}

void check(const Kernel& kernel, bool ok, const std::string& what) {
  passed_by[kernel.name] += check(ok, std::string(kernel.name) + " " + what) ? 1 : 0;
}

std::mt19937_64 rng(20240227);

int64_t uniform(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(rng);
}

size_t odd() { return static_cast<size_t>(2 * uniform(0, 3) + 1); }

std::vector<float> normals(int64_t size) {
  std::normal_distribution<float> normal;
  std::vector<float> x(static_cast<size_t>(size));
  for (float& v : x) v = normal(rng);
  return x;
}

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

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
};

template <typename T>
Quantised quantise_oracle(const std::vector<T>& x, int64_t k_padded) {
  Quantised result;
  result.q.assign(static_cast<size_t>(k_padded), 0);
  float amax = 1e-5F;
  for (const T v : x) {
    if (!std::isfinite(widened(v))) {
      result.scale = kNan;
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
  for (const size_t offset : {size_t{0}, size_t{1}, size_t{3}}) {
    // Now and then more padding than the row needs.
    const int64_t k_padded = (k + 63) / 64 * 64 + (offset == 3 ? 64 : 0);
    const Quantised wanted = quantise_oracle(values, k_padded);
    const Buffer<T> x(values, offset);
    const Buffer<int8_t> q(k_padded, 99, offset);
    float scale = -1;
    quantise(x.get(), k, k_padded, q.get(), &scale);
    bool ok = same(scale, wanted.scale);
    for (int64_t i = 0; i < k_padded; ++i) ok &= q[i] == wanted.q[static_cast<size_t>(i)];
    check(kernel, ok, std::string("quantise ") + what + " k=" + std::to_string(k));
  }
}

void check_quantise_both(const Kernel& kernel, const std::vector<float>& values, const char* what) {
  check_quantise<float>(kernel, kernel.quantize_f32, values, what);
  std::vector<uint16_t> narrow;
  for (const float v : values) narrow.push_back(round_to_bf16(v));
  check_quantise<uint16_t>(kernel, kernel.quantize_bf16, narrow, what);
}

void test_quantise(const Kernel& kernel) {
  std::vector<int64_t> sizes = {127, 128, 129, 255, 256, 257, 1000, 4099};
  for (int64_t k = 0; k <= 70; ++k) sizes.push_back(k);
  for (const int64_t k : sizes) {
    const std::vector<float> x = normals(k);
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
    for (const float bad : {kNan, -kNan, kInf, -kInf}) {
      std::vector<float> spoilt = x;
      spoilt[at] = bad;
      check_quantise_both(kernel, spoilt, "not finite");
      spoilt.back() = bad;
      check_quantise_both(kernel, spoilt, "not finite at the end");
    }
  }
}

// ---- gates and norms ---------------------------------------------------------------------------

constexpr double kUnit = 1.0 / (1 << 24);  // relative error of a float32 operation, at most

// Runs a gate or a norm of k values on exact buffers.
std::vector<float> gated(GateRow gate, const std::vector<float>& x) {
  const Buffer<float> in(x, odd());
  const Buffer<float> out(static_cast<int64_t>(x.size() / 2), -7.0F, odd());
  gate(in.get(), static_cast<int64_t>(out.size()), out.get());
  return {out.get(), out.get() + out.size()};
}

std::vector<float> normed(NormRow norm, const std::vector<float>& x,
                          const std::vector<float>& scale, float eps, bool in_place) {
  const Buffer<float> in(x, odd());
  const Buffer<float> scales(scale, odd());
  const Buffer<float> other(static_cast<int64_t>(x.size()), -7.0F, odd());
  float* out = in_place ? in.get() : other.get();
  norm(in.get(), static_cast<int64_t>(x.size()), scales.get(), eps, out);
  return {out, out + x.size()};
}

bool same(const std::vector<float>& a, const std::vector<float>& b) {
  bool ok = a.size() == b.size();
  for (size_t i = 0; ok && i < a.size(); ++i) ok = same(a[i], b[i]);
  return ok;
}

// `relative` is in units of kUnit. Results below 2^-126 may lose digits.
bool close(const std::vector<float>& got, const std::vector<double>& wanted, double relative) {
  bool ok = got.size() == wanted.size();
  for (size_t i = 0; ok && i < got.size(); ++i)
    ok = std::fabs(got[i] - wanted[i]) <= relative * kUnit * std::fabs(wanted[i]) + 0x1p-126;
  return ok;
}

double silu(double x) { return x / (1 + std::exp(-x)); }

void test_gates(const Kernel& kernel, const std::vector<float>& x) {
  const size_t k = x.size() / 2;
  std::vector<double> relu2_wanted;
  std::vector<double> silu_wanted;
  for (size_t i = 0; i < k; ++i) {
    const double relu = x[i] > 0 ? x[i] : 0;
    relu2_wanted.push_back(relu * relu * x[k + i]);
    silu_wanted.push_back(silu(x[i]) * x[k + i]);
  }
  const auto relu2 = gated(kernel.relu2_gate, x);
  const auto sigmoid = gated(kernel.silu_gate, x);
  const std::string size = " k=" + std::to_string(k);
  check(kernel, close(relu2, relu2_wanted, 2), "relu2_gate: two roundings," + size);
  // e^-x has two units in the last place, 4 kUnit; 1 +, / and * round once each.
  check(kernel, close(sigmoid, silu_wanted, 7), "silu_gate," + size);
  const Kernel scalar = scalar_kernel();
  check(kernel, same(relu2, gated(scalar.relu2_gate, x)), "relu2_gate: the same bits," + size);
  check(kernel, same(sigmoid, gated(scalar.silu_gate, x)), "silu_gate: the same bits," + size);
}

void test_norm(const Kernel& kernel, const std::vector<float>& x, float eps) {
  const double k = static_cast<double>(x.size());
  const std::vector<float> scale = normals(static_cast<int64_t>(x.size()));
  double squares = 0;
  for (const float v : x) squares += static_cast<double>(v) * v;
  std::vector<double> wanted;
  for (size_t i = 0; i < x.size(); ++i)
    wanted.push_back(x[i] / std::sqrt(squares / k + eps) * scale[i]);
  const auto got = normed(kernel.rms_norm, x, scale, eps, false);
  // A square is rounded once and passes through k/16 + 1 additions in its lane and 4 of the fold;
  // /k and + eps round once each; the root halves these and adds one; 1/, * and * add three.
  const double units = (1 + k / 16 + 1 + 4 + 2) / 2 + 1 + 3;
  const std::string size = " k=" + std::to_string(x.size());
  check(kernel, close(got, wanted, units), "rms_norm," + size);
  check(kernel, same(got, normed(kernel.rms_norm, x, scale, eps, true)),
        "rms_norm in place," + size);
  check(kernel, same(got, normed(scalar_kernel().rms_norm, x, scale, eps, false)),
        "rms_norm: the same bits," + size);
}

void test_exponential(const Kernel& kernel) {
  // With up = 1 and x far below 0 silu is x e^x, so its error is that of e^-x: 2 units in the last
  // place on all of [-87, 88].
  constexpr int kPoints = 100003;
  std::vector<float> x(2 * kPoints, 1.0F);
  std::vector<double> wanted;
  for (int i = 0; i < kPoints; ++i) {
    x[static_cast<size_t>(i)] = -88.0F + 175.0F * static_cast<float>(i) / (kPoints - 1);
    wanted.push_back(silu(x[static_cast<size_t>(i)]));
  }
  check(kernel, close(gated(kernel.silu_gate, x), wanted, 7), "silu_gate: all of the exponential");

  // Beyond, e^-x stays where it is: above 87 silu is x itself, below -88 next to nothing.
  const std::vector<float> far = {-100, -1e3F, -1e30F, 100, 1e3F, 3e38F, 0.0F, -0.0F};
  std::vector<float> row = far;
  row.resize(2 * far.size(), 1.0F);
  const auto got = gated(kernel.silu_gate, row);
  for (size_t i = 0; i < far.size(); ++i) {
    const bool ok = far[i] >= 0 ? got[i] == far[i]
                                : got[i] <= 0 && got[i] >= far[i] * 1.01 * std::exp(-88.0);
    check(kernel, ok, "silu_gate of " + std::to_string(far[i]));
  }
}

// What is not finite must reach the quantiser, which then makes the row NaN.
bool quantises_to_nan(const Kernel& kernel, const std::vector<float>& y) {
  std::vector<int8_t> q(padded_inputs(Layout::kInt8, static_cast<int64_t>(y.size())), 99);
  float scale = -1;
  kernel.quantize_f32(y.data(), static_cast<int64_t>(y.size()), static_cast<int64_t>(q.size()),
                      q.data(), &scale);
  return std::isnan(scale) && std::count(q.begin(), q.end(), 0) == static_cast<int64_t>(q.size());
}

void test_not_finite(const Kernel& kernel, int64_t k) {
  const std::vector<float> x = normals(2 * k);
  const size_t at = static_cast<size_t>(uniform(0, k - 1));
  for (const float bad : {kNan, -kNan, kInf, -kInf}) {
    const std::string what = " of " + std::to_string(bad) + " k=" + std::to_string(k);
    for (const bool in_up : {false, true}) {
      std::vector<float> spoilt = x;
      spoilt[at] = 1;
      spoilt[at + static_cast<size_t>(in_up ? k : 0)] = bad;
      check(kernel, quantises_to_nan(kernel, gated(kernel.silu_gate, spoilt)), "silu_gate" + what);
      const auto relu2 = gated(kernel.relu2_gate, spoilt);
      if (!in_up && bad == -kInf) {
        check(kernel, relu2[at] == 0, "relu2_gate of -inf is 0");
      } else {
        check(kernel, quantises_to_nan(kernel, relu2), "relu2_gate" + what);
      }
    }
    const std::vector<float> row(x.begin(), x.begin() + k);
    const std::vector<float> ones(row.size(), 1.0F);
    std::vector<float> spoilt = row;
    spoilt[at] = bad;
    check(kernel, quantises_to_nan(kernel, normed(kernel.rms_norm, spoilt, ones, 1e-5F, false)),
          "rms_norm" + what);
    spoilt = ones;
    spoilt[at] = bad;
    check(kernel, quantises_to_nan(kernel, normed(kernel.rms_norm, row, spoilt, 1e-5F, false)),
          "rms_norm's scale" + what);
  }
}

void test_rows(const Kernel& kernel) {
  std::vector<int64_t> sizes = {127, 128, 129, 255, 256, 257, 1000, 4099};
  for (int64_t k = 1; k <= 70; ++k) sizes.push_back(k);
  for (const int64_t k : sizes) {
    std::vector<float> x = normals(2 * k);
    test_gates(kernel, x);
    // To both ends of the sigmoid; see test_exponential() for what is beyond.
    for (float& v : x) v = std::min(87.0F, std::max(-87.0F, 20 * v));
    test_gates(kernel, x);
    for (const float eps : {0.0F, 1e-5F, 1.0F})
      for (const float size : {1.0F, 1e-10F, 1e10F}) {
        std::vector<float> row = normals(k);
        for (float& v : row) v *= size;
        test_norm(kernel, row, eps);
      }
    test_norm(kernel, std::vector<float>(static_cast<size_t>(k)), 1e-5F);
    test_not_finite(kernel, k);
  }
  test_exponential(kernel);
}

// ---- sums over a row -----------------------------------------------------------------------------

void test_sums(const Kernel& kernel) {
  const Kernel scalar = scalar_kernel();
  for (const int64_t n : {1, 15, 16, 17, 63, 64, 65, 80, 1000}) {
    const std::string size = " n=" + std::to_string(n);
    const std::vector<float> values = normals(n);
    const std::vector<float> weights = normals(n);
    std::vector<uint16_t> halves;
    for (const float w : weights) halves.push_back(round_to_bf16(w));
    const Buffer<float> x(values, odd());
    const Buffer<float> w(weights, odd());
    const Buffer<uint16_t> h(halves, odd());
    double dot = 0;
    double half_dot = 0;
    double sizes = 0;
    double powers = 0;
    const float most = *std::max_element(values.begin(), values.end());
    for (size_t i = 0; i < values.size(); ++i) {
      dot += static_cast<double>(values[i]) * weights[i];
      half_dot += static_cast<double>(values[i]) * widen(halves[i]);
      sizes += std::fabs(static_cast<double>(values[i]) * weights[i]);
      powers += std::exp((static_cast<double>(values[i]) - most) * 0.7);
    }
    const double bound = static_cast<double>(n + 8) * 0x1p-24 * 1.01 * sizes;
    const float got = kernel.dot_f32(x.get(), w.get(), n);
    check(kernel, std::fabs(got - dot) <= bound, "dot_f32," + size);
    check(kernel, got == scalar.dot_f32(x.get(), w.get(), n), "dot_f32: the same bits," + size);
    const float half = kernel.dot_bf16(x.get(), h.get(), n);
    check(kernel, std::fabs(half - half_dot) <= bound, "dot_bf16," + size);
    check(kernel, half == scalar.dot_bf16(x.get(), h.get(), n), "dot_bf16: the same bits," + size);
    check(kernel, kernel.largest(x.get(), n) == most, "largest," + size);
    const float sum = kernel.sum_exponentials(x.get(), n, most, 0.7F);
    check(kernel, std::fabs(sum - powers) <= 1e-6 * powers, "sum_exponentials," + size);
    check(kernel, sum == scalar.sum_exponentials(x.get(), n, most, 0.7F),
          "sum_exponentials: the same bits," + size);
    for (const float bad : {NAN, INFINITY, -INFINITY}) {
      std::vector<float> spoilt = values;
      spoilt[static_cast<size_t>(uniform(0, static_cast<int>(n) - 1))] = bad;
      const Buffer<float> y(spoilt, odd());
      check(kernel, std::isnan(kernel.largest(y.get(), n)), "largest: no numbers," + size);
    }
  }
  // Far below the largest nothing is left, and nothing turns into a NaN.
  const std::vector<float> far = {0, -3e38F, -200, -87.5F};
  check(kernel, kernel.sum_exponentials(far.data(), 4, 0, 1) == 1, "sum_exponentials: far below");
  check(kernel, kernel.sum_exponentials(far.data(), 4, 0, 1e30F) == 1, "sum_exponentials: steep");
}

// ---- ceilings ----------------------------------------------------------------------------------

void test_ceilings(const Kernel& kernel) {
  for (const int64_t n : {0, 1, 63, 64, 255, 256, 257, 1000}) {
    std::vector<uint8_t> bytes(static_cast<size_t>(n));
    for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(uniform(0, 255));
    const Buffer<uint8_t> buffer(bytes, odd());
    const uint64_t folded = kernel.read_all(buffer.get(), n);
    bool ok = folded == scalar_kernel().read_all(buffer.get(), n);
    for (int64_t i = 0; i < n; ++i) {
      buffer[i] ^= 0x40;
      ok &= kernel.read_all(buffer.get(), n) != folded;
      buffer[i] ^= 0x40;
    }
    check(kernel, ok, "read_all: every byte counts, n=" + std::to_string(n));
  }
  const int64_t one = kernel.dot_rounds(1);
  check(kernel, one > 0 && kernel.dot_rounds(1000) == 1000 * one, "dot_rounds");
}

// ---- matrices ----------------------------------------------------------------------------------

// The format's text once more, by layout.
constexpr int kBase[kLayoutCount] = {4, 3, 16, 256};  // a byte holds digits in this base
constexpr int kInputs[kLayoutCount] = {16, 20, 8, 4};  // of a block
constexpr int kOffset[kLayoutCount] = {1, 1, 8, 128};
constexpr int kLow[kLayoutCount] = {-1, -1, -8, -127};
constexpr int kHigh[kLayoutCount] = {1, 1, 7, 127};
constexpr int kGroupBlocks = 4;  // of int4
constexpr int kMostMultiplier = 15;

// Where a weight's code is: its byte and what the digit's one counts there.
struct Place {
  int64_t byte;
  int unit;
};

Place place(int layout, int64_t row, int64_t input, int64_t input_blocks) {
  const int64_t block = row / 16 * input_blocks + input / kInputs[layout];
  int unit = 1;
  for (int64_t s = input % kInputs[layout] / 4; s > 0; --s) unit *= kBase[layout];
  return {block * 64 + row % 16 * 4 + input % 4, unit};
}

// Bytes: of any value, or the highest that is valid; the rest are weights.
enum class Fill { kRandom, kHigh, kLow, kAnyByte, kHighestByte };

// Weights, multipliers applied, and their packed form.
struct Matrix {
  Layout layout;
  int64_t input_blocks, inputs;
  int row_blocks;
  std::vector<int> w;  // [row_blocks * 16][inputs]
  Buffer<uint8_t> codes, multipliers;

  int64_t rows() const { return row_blocks * 16; }
  bool multiplied() const { return layout == Layout::kInt4; }
  // The last `blocks` row blocks, so that they end where the buffers end.
  PackedRows packed(int blocks) const {
    const int64_t first = row_blocks - blocks;
    return {codes.get() + first * input_blocks * 64,
            multiplied() ? multipliers.get() + first * input_blocks / kGroupBlocks * 16 : nullptr,
            input_blocks, blocks};
  }
};

Matrix make_matrix(Layout layout, int64_t input_blocks, int row_blocks, Fill fill) {
  const int l = static_cast<int>(layout);
  const int64_t inputs = input_blocks * kInputs[l];
  const int64_t rows = row_blocks * 16;
  const bool int4 = layout == Layout::kInt4;
  const int64_t groups = int4 ? input_blocks / kGroupBlocks : 0;
  std::vector<uint8_t> multipliers(static_cast<size_t>(row_blocks * groups * 16));
  for (uint8_t& m : multipliers)
    m = static_cast<uint8_t>(fill == Fill::kRandom || fill == Fill::kAnyByte
                                 ? uniform(1, kMostMultiplier)
                                 : kMostMultiplier);
  std::vector<uint8_t> codes(static_cast<size_t>(row_blocks * input_blocks * 64));
  // Invalid codes of ternary2 and int8 are weights too, 2 and -128; those of ternary1.6 are not.
  const bool bytes = fill == Fill::kAnyByte || fill == Fill::kHighestByte;
  const int highest = layout == Layout::kTernary16 ? 242 : 255;
  if (bytes)
    for (uint8_t& byte : codes)
      byte = static_cast<uint8_t>(fill == Fill::kAnyByte ? uniform(0, highest) : highest);
  std::vector<int> w(static_cast<size_t>(rows * inputs));
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t k = 0; k < inputs; ++k) {
      const Place at = place(l, row, k, input_blocks);
      uint8_t& byte = codes[static_cast<size_t>(at.byte)];
      int weight = fill == Fill::kHigh  ? kHigh[l]
                   : fill == Fill::kLow ? kLow[l]
                                        : static_cast<int>(uniform(kLow[l], kHigh[l]));
      if (bytes) {
        weight = byte / at.unit % kBase[l] - kOffset[l];
      } else {
        byte = static_cast<uint8_t>(byte + (weight + kOffset[l]) * at.unit);
      }
      const int64_t group = (row / 16 * groups + k / 32) * 16 + row % 16;
      const int m = int4 ? multipliers[static_cast<size_t>(group)] : 1;
      w[static_cast<size_t>(row * inputs + k)] = weight * m;
    }
  return {layout,
          input_blocks,
          inputs,
          row_blocks,
          std::move(w),
          Buffer<uint8_t>(codes, odd()),
          Buffer<uint8_t>(multipliers, odd())};
}

// Activations for any number of rows up to kMostRows: m rows are the last m, which end where the
// buffers end.
constexpr int kMostRows = kMaxFewRows;

struct Activations {
  int64_t stride, group_stride;
  Buffer<int8_t> q;
  Buffer<int32_t> group_sums;
  std::vector<int64_t> sum;
  std::vector<int64_t> product;  // [kMostRows][rows of the matrix]

  const int8_t* last_rows(int m) const { return q.get() + (kMostRows - m) * stride; }
  FewActivations few(int m, bool grouped) const {
    return {last_rows(m), stride,
            grouped ? group_sums.get() + (kMostRows - m) * group_stride : nullptr, group_stride, m};
  }
};

// Of activations: random; rows of 127 and rows of -128; or both in a row, two by two, so that the int16
// sums of a lane's first and second pair are as far apart as can be.
enum class Pattern { kRandom, kExtreme, kPairs };

int8_t activation(Pattern pattern, int64_t row, int64_t input) {
  if (pattern == Pattern::kRandom) return static_cast<int8_t>(uniform(-128, 127));
  const bool positive = (row + (pattern == Pattern::kPairs ? input / 2 : 0)) % 2 == 0;
  return positive ? 127 : -128;
}

Activations make_activations(const Matrix& matrix, Pattern pattern) {
  const int64_t k = matrix.inputs;
  const int64_t groups = (k + 31) / 32;
  const int64_t stride = k + uniform(0, 3);
  const int64_t group_stride = groups + uniform(0, 3);
  Activations a{stride,
                group_stride,
                {(kMostRows - 1) * stride + k, 77, odd()},
                {(kMostRows - 1) * group_stride + groups, 0, odd()},
                std::vector<int64_t>(kMostRows),
                {}};
  for (int i = 0; i < kMostRows; ++i) {
    int8_t* q = &a.q[i * stride];
    for (int64_t j = 0; j < k; ++j) {
      q[j] = activation(pattern, i, j);
      a.sum[static_cast<size_t>(i)] += q[j];
      a.group_sums[i * group_stride + j / 32] += q[j];
    }
    for (int64_t row = 0; row < matrix.rows(); ++row) {
      const int* w = matrix.w.data() + row * k;
      int64_t sum = 0;
      for (int64_t j = 0; j < k; ++j) sum += int64_t{q[j]} * w[j];
      a.product.push_back(sum);
    }
  }
  return a;
}

std::string label(const char* what, const Matrix& matrix, int m) {
  return std::string(what) + " " + spec(matrix.layout).name + " m=" + std::to_string(m) +
         " k=" + std::to_string(matrix.inputs) + " row blocks=" + std::to_string(matrix.row_blocks);
}

// ---- few_rows ----------------------------------------------------------------------------------

void check_few_rows(const Kernel& kernel, const Matrix& matrix, const Activations& a,
                    const char* what) {
  const int64_t offset = matrix.multiplied() ? 0 : kOffset[static_cast<int>(matrix.layout)];
  for (int m = 1; m <= kernel.few_rows_limit; ++m) {
    const int64_t n = matrix.rows();
    const int64_t stride = n + uniform(0, 3);
    const Buffer<int32_t> out((m - 1) * stride + n, -7, odd());
    kernel.few_rows[static_cast<int>(matrix.layout)](
        matrix.packed(matrix.row_blocks), a.few(m, matrix.multiplied()), out.get(), stride);
    bool ok = true;
    for (int64_t at = 0; at < static_cast<int64_t>(out.size()); ++at) {
      const int64_t row = at % stride;
      const size_t i = static_cast<size_t>(kMostRows - m + at / stride);
      ok &= out[at] == (row < n ? a.product[i * static_cast<size_t>(n) + static_cast<size_t>(row)] +
                                      offset * a.sum[i]
                                : -7);
    }
    check(kernel, ok, label("few_rows", matrix, m) + ", " + what);
  }
}

// ---- panels ------------------------------------------------------------------------------------

constexpr uint8_t kUntouched = 2;  // a panel's bytes before it is unpacked

// Input blocks [first, last) of the last row blocks, each byte compared.
Buffer<uint8_t> unpacked(const Kernel& kernel, const Matrix& matrix, int blocks, int64_t first,
                         int64_t last, const char* what) {
  const int l = static_cast<int>(matrix.layout);
  const int64_t columns = kernel.panel_blocks * 16;
  const int64_t groups = (last - first) * kInputs[l] / 4;
  Buffer<uint8_t> panel(groups * columns * 4, kUntouched, odd());
  kernel.unpack_panel[l](matrix.packed(blocks), first, last, panel.get());
  const int offset = matrix.multiplied() ? 128 : kOffset[l];
  bool ok = true;
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t row = 0; row < columns; ++row)
      for (int64_t j = 0; j < 4; ++j) {
        int wanted = kUntouched;
        if (row < blocks * 16) {
          const int64_t matrix_row = matrix.rows() - blocks * 16 + row;
          const int64_t k = first * kInputs[l] + 4 * g + j;
          wanted = matrix.w[static_cast<size_t>(matrix_row * matrix.inputs + k)] + offset;
        }
        ok &= panel[(g * columns + row) * 4 + j] == wanted;
      }
  check(kernel, ok, label("unpack_panel", matrix, 0) + ", " + what);
  return panel;
}

// The product in two spans of input blocks, the second on top of the first and both on top of what
// the accumulators held.
void check_panels(const Kernel& kernel, const Matrix& matrix, const Activations& a,
                  const char* what) {
  const int l = static_cast<int>(matrix.layout);
  const int blocks = std::min(matrix.row_blocks, kernel.panel_blocks);
  const int64_t columns = kernel.panel_blocks * 16;
  const int64_t cut = uniform(0, matrix.input_blocks);
  const Buffer<uint8_t> head = unpacked(kernel, matrix, blocks, 0, cut, what);
  const Buffer<uint8_t> tail = unpacked(kernel, matrix, blocks, cut, matrix.input_blocks, what);
  const bool ternary = kOffset[l] == 1;
  const PanelProduct multiply = ternary ? kernel.ternary_panel : kernel.byte_panel;
  const int64_t offset = matrix.multiplied() ? 128 : kOffset[l];
  for (int m = 1; m <= kernel.tile_rows; ++m) {
    const int64_t start = uniform(-1000, 1000);
    const Buffer<int32_t> acc(m * columns, static_cast<int32_t>(start), odd());
    const int64_t head_groups = cut * kInputs[l] / 4;
    multiply(head.get(), head_groups, a.last_rows(m), a.stride, m, acc.get());
    multiply(tail.get(), matrix.inputs / 4 - head_groups, a.last_rows(m) + 4 * head_groups,
             a.stride, m, acc.get());
    bool ok = true;
    for (int64_t at = 0; at < m * columns; ++at) {
      const size_t i = static_cast<size_t>(kMostRows - m + at / columns);
      const int64_t row = matrix.rows() - blocks * 16 + at % columns;
      const int64_t sum =
          at % columns < blocks * 16
              ? a.product[i * static_cast<size_t>(matrix.rows()) + static_cast<size_t>(row)] +
                    offset * a.sum[i]
              : kUntouched * a.sum[i];
      ok &= acc[at] == start + sum;
    }
    check(kernel, ok, label("panel", matrix, m) + ", " + what);
  }
}

// Panels of any bytes that the contract allows, on both sides of the spans that int16 sums take.
void test_bare_panels(const Kernel& kernel) {
  const int64_t columns = kernel.panel_blocks * 16;
  for (const int most : {3, 255})
    for (const bool extreme : {false, true})
      for (const int64_t groups : {0, 1, 2, 3, 7, 8, 9, 41, 42, 43, 83, 84, 85, 130})
        for (int m = 1; m <= kernel.tile_rows; ++m) {
          const Buffer<uint8_t> panel(groups * columns * 4, static_cast<uint8_t>(most), odd());
          const int64_t stride = groups * 4 + uniform(0, 3);
          const Buffer<int8_t> q((m - 1) * stride + groups * 4, -128, odd());
          const Buffer<int32_t> acc(m * columns, 0, odd());
          std::vector<int64_t> wanted(acc.size());
          if (!extreme) {
            for (size_t i = 0; i < panel.size(); ++i)
              panel.get()[i] = static_cast<uint8_t>(uniform(0, most));
            for (size_t i = 0; i < q.size(); ++i)
              q.get()[i] = static_cast<int8_t>(uniform(-128, 127));
          }
          for (int64_t i = 0; i < m; ++i)
            for (int64_t n = 0; n < columns; ++n) {
              int64_t& sum = wanted[static_cast<size_t>(i * columns + n)];
              sum = acc[i * columns + n] = static_cast<int32_t>(uniform(-1000000, 1000000));
              for (int64_t k = 0; k < groups * 4; ++k)
                sum += q[i * stride + k] * panel[(k / 4 * columns + n) * 4 + k % 4];
            }
          (most == 3 ? kernel.ternary_panel : kernel.byte_panel)(panel.get(), groups, q.get(),
                                                                 stride, m, acc.get());
          check(kernel, std::equal(wanted.begin(), wanted.end(), acc.get()),
                "panel of bytes up to " + std::to_string(most) +
                    " groups=" + std::to_string(groups) + " m=" + std::to_string(m));
        }
}

// ---- columns -----------------------------------------------------------------------------------

// Tiles of random codes against sums written out, the listed inputs in any order, some twice.
void check_columns(const Kernel& kernel, Layout layout, int64_t k, int64_t count, bool extreme) {
  const int l = static_cast<int>(layout);
  const int planes = kInputs[l] / 4;
  std::vector<int> code(static_cast<size_t>(64 * planes * k));
  std::vector<uint8_t> bytes(static_cast<size_t>(64 * k));
  for (int s = 0, unit = 1; s < planes; ++s, unit *= kBase[l])
    for (int64_t i = 0; i < 64 * k; ++i) {
      const int c = extreme ? kHigh[l] + kOffset[l] : static_cast<int>(uniform(0, kBase[l] - 1));
      code[static_cast<size_t>(s * 64 * k + i)] = c;
      bytes[static_cast<size_t>(i)] = static_cast<uint8_t>(bytes[static_cast<size_t>(i)] + c * unit);
    }
  const Buffer<uint8_t> tile(bytes, odd());
  const Buffer<int32_t> input(count, 0, odd());
  const Buffer<int8_t> value(count, -128, odd());
  for (int64_t i = 0; i < count; ++i) {
    input.get()[i] = static_cast<int32_t>(uniform(0, k - 1));
    if (!extreme) value.get()[i] = static_cast<int8_t>(uniform(-128, 127));
  }
  const Buffer<int32_t> out(64 * planes, 99, odd());
  kernel.column_product[l](tile.get(), k, {input.get(), value.get(), count}, out.get());
  bool ok = true;
  for (int n = 0; n < 64 * planes; ++n) {
    int64_t sum = 0;
    for (int64_t i = 0; i < count; ++i)
      sum += value[i] * code[static_cast<size_t>(n / 64 * 64 * k + input[i] * 64 + n % 64)];
    ok &= out[n] == sum;
  }
  check(kernel, ok, std::string("columns ") + spec(layout).name + " k=" + std::to_string(k) +
                        " count=" + std::to_string(count));
}

void test_columns(const Kernel& kernel) {
  if (kernel.find_nonzero == nullptr) return;
  for (const Layout layout : {Layout::kTernary2, Layout::kTernary16})
    for (const bool extreme : {false, true})
      for (const int64_t k : {1, 3, 64, 700})
        for (const int64_t count : {0, 4, 8, 60, 64, 68, 132, 1000})
          check_columns(kernel, layout, k, count, extreme);
  for (const int share : {0, 5, 50, 100})
    for (const int64_t k : {0, 64, 128, 1984}) {
      const Buffer<int8_t> q(k, 0, odd());
      for (int64_t i = 0; i < k; ++i)
        if (uniform(1, 100) <= share) q.get()[i] = static_cast<int8_t>(uniform(-128, 127));
      const Buffer<int32_t> input(k, -1, odd());
      const Buffer<int8_t> value(k, 55, odd());
      const int64_t count = kernel.find_nonzero(q.get(), k, input.get(), value.get());
      bool ok = true;
      int64_t found = 0;
      for (int64_t i = 0; i < k; ++i)
        if (q[i] != 0) {
          ok &= found < count && input[found] == i && value[found] == q[i];
          ++found;
        }
      ok &= found == count;
      for (int64_t i = found; i % 4 != 0; ++i) ok &= input[i] == 0 && value[i] == 0;
      check(kernel, ok, "find_nonzero k=" + std::to_string(k) + " share=" + std::to_string(share));
    }
}

// ---- products ----------------------------------------------------------------------------------

void check_product(const std::vector<Kernel>& kernels, Layout layout, int64_t input_blocks,
                   int row_blocks, Fill fill, Pattern pattern, const char* what) {
  const Matrix matrix = make_matrix(layout, input_blocks, row_blocks, fill);
  const Activations a = make_activations(matrix, pattern);
  for (const Kernel& kernel : kernels) {
    check_few_rows(kernel, matrix, a, what);
    check_panels(kernel, matrix, a, what);
  }
}

// Bytes that stand for no weights give any sums within the bound that int32 was chosen by.
void check_invalid_bytes(const std::vector<Kernel>& kernels, Layout layout, int low) {
  constexpr int64_t kBound[kLayoutCount] = {6144, 4148, 261120, 32640};  // an input, see kernel.h
  const Matrix matrix = make_matrix(layout, 44, 1, Fill::kRandom);
  for (size_t i = 0; i < matrix.codes.size(); ++i)
    matrix.codes.get()[i] = static_cast<uint8_t>(uniform(low, 255));
  for (size_t i = 0; i < matrix.multipliers.size(); ++i)
    matrix.multipliers.get()[i] = static_cast<uint8_t>(uniform(0, 255));
  const Activations a = make_activations(matrix, Pattern::kExtreme);
  const int l = static_cast<int>(layout);
  for (const Kernel& kernel : kernels) {
    const int m = kernel.few_rows_limit;
    const Buffer<int32_t> out(m * 16, 0, odd());
    kernel.few_rows[l](matrix.packed(1), a.few(m, matrix.multiplied()), out.get(), 16);
    const int64_t columns = kernel.panel_blocks * 16;
    const Buffer<uint8_t> panel(matrix.inputs * columns, kUntouched, odd());
    kernel.unpack_panel[l](matrix.packed(1), 0, matrix.input_blocks, panel.get());
    const Buffer<int32_t> acc(kernel.tile_rows * columns, 0, odd());
    (kOffset[l] == 1 ? kernel.ternary_panel : kernel.byte_panel)(
        panel.get(), matrix.inputs / 4, a.last_rows(kernel.tile_rows), a.stride, kernel.tile_rows,
        acc.get());
    bool ok = true;
    for (size_t i = 0; i < out.size(); ++i)
      ok &= std::abs(int64_t{out.get()[i]}) <= kBound[l] * matrix.inputs;
    for (size_t i = 0; i < acc.size(); ++i)
      ok &= std::abs(int64_t{acc.get()[i]}) <= kBound[l] * matrix.inputs;
    check(kernel, ok, label("invalid bytes", matrix, 0));
  }
}

void test_products(const std::vector<Kernel>& kernels, Layout layout) {
  const int unit = layout == Layout::kInt4 ? kGroupBlocks : 1;
  // A few blocks, and both sides of multiples of the 5, 8, 10 and 14 blocks that AVX2 sums in int16,
  // and of the 64 that a row's sums are kept in registers for.
  for (const int64_t count :
       {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 13, 14, 15,
        16, 17, 19, 20, 21, 27, 28, 29, 40, 43, 63, 64, 65}) {
    const int row_blocks = static_cast<int>(uniform(1, kMaxPanelBlocks));
    const int64_t blocks = count * unit;
    constexpr Pattern kExtreme = Pattern::kExtreme;
    check_product(kernels, layout, blocks, row_blocks, Fill::kRandom, Pattern::kRandom, "random");
    check_product(kernels, layout, blocks, 1, Fill::kAnyByte, Pattern::kRandom, "any byte");
    check_product(kernels, layout, blocks, 1, Fill::kAnyByte, kExtreme, "any byte, extreme");
    check_product(kernels, layout, blocks, 1, Fill::kRandom, kExtreme, "extreme activations");
    check_product(kernels, layout, blocks, 1, Fill::kHighestByte, kExtreme, "extreme, highest");
    check_product(kernels, layout, blocks, 1, Fill::kHigh, kExtreme, "extreme, high");
    check_product(kernels, layout, blocks, 1, Fill::kLow, kExtreme, "extreme, low");
    for (const Fill fill : {Fill::kHighestByte, Fill::kHigh, Fill::kLow})
      check_product(kernels, layout, blocks, 1, fill, Pattern::kPairs, "pairs");
  }
  for (int row_blocks = 0; row_blocks <= 2 * kMaxPanelBlocks + 1; ++row_blocks)
    check_product(kernels, layout, 4, row_blocks, Fill::kRandom, Pattern::kRandom, "row blocks");
  check_invalid_bytes(kernels, layout, 0);
  check_invalid_bytes(kernels, layout, 243);
  if (guard_pages) return;
  // The largest K, at the extremes: the int32 bound, invalid codes included.
  const int64_t most = input_blocks_of(layout, max_inputs(layout));
  check_product(kernels, layout, most, 1, Fill::kHigh, Pattern::kExtreme, "largest K, high");
  check_product(kernels, layout, most, 1, Fill::kLow, Pattern::kExtreme, "largest K, low");
  check_product(kernels, layout, most, 1, Fill::kHighestByte, Pattern::kExtreme,
                "largest K, highest byte");
}

// ---- format, epilogue, loop, dispatch -----------------------------------------------------------

// The golden bytes of tests/test_packing.py, by hand, rows 0, 1, 2 and 15 of a block.
struct Golden {
  Layout layout;
  int (*weight)(int64_t row, int64_t input);
  uint8_t first_rows[3][4];
  uint8_t last_row[4];
};

const Golden kGolden[kLayoutCount] = {
    // codes (row + input) mod 3; row 0, j = 0: 0, 1, 2, 0 -> 0 + 1*4 + 2*16 + 0*64
    {Layout::kTernary2,
     [](int64_t r, int64_t k) { return static_cast<int>((r + k) % 3) - 1; },
     {{36, 73, 146, 36}, {73, 146, 36, 73}, {146, 36, 73, 146}},
     {36, 73, 146, 36}},
    // the same codes; row 0, j = 0: 0, 1, 2, 0, 1 -> 0 + 1*3 + 2*9 + 0*27 + 1*81
    {Layout::kTernary16,
     [](int64_t r, int64_t k) { return static_cast<int>((r + k) % 3) - 1; },
     {{102, 196, 65, 102}, {196, 65, 102, 196}, {65, 102, 196, 65}},
     {102, 196, 65, 102}},
    // codes (3 row + 5 input) mod 16; row 0, j = 0: 0, 4 -> 0 + 4*16
    {Layout::kInt4,
     [](int64_t r, int64_t k) { return static_cast<int>((3 * r + 5 * k) % 16) - 8; },
     {{64, 149, 234, 63}, {115, 200, 29, 98}, {166, 251, 64, 149}},
     {29, 98, 183, 12}},
    // codes 1 + (16 row + 5 input) mod 255
    {Layout::kInt8,
     [](int64_t r, int64_t k) { return static_cast<int>((16 * r + 5 * k) % 255) - 127; },
     {{1, 6, 11, 16}, {17, 22, 27, 32}, {33, 38, 43, 48}},
     {241, 246, 251, 1}},
};

void test_golden_bytes() {
  check(kFormatVersion == 2, "format: version");
  for (const Golden& golden : kGolden) {
    const int l = static_cast<int>(golden.layout);
    std::vector<uint8_t> block(64);
    for (int64_t row = 0; row < 16; ++row)
      for (int64_t k = 0; k < kInputs[l]; ++k) {
        const Place at = place(l, row, k, 1);
        uint8_t& byte = block[static_cast<size_t>(at.byte)];
        byte = static_cast<uint8_t>(byte + (golden.weight(row, k) + kOffset[l]) * at.unit);
      }
    const std::string name = std::string("format: golden bytes of ") + spec(golden.layout).name;
    check(std::memcmp(block.data(), golden.first_rows, 12) == 0, name);
    check(std::memcmp(block.data() + 60, golden.last_row, 4) == 0, name + ", row 15");
    bool ok = true;
    for (int64_t row = 0; row < 16; ++row)
      for (int64_t k = 0; k < kInputs[l]; ++k)
        ok &= decode_weight(golden.layout, block.data(), row, k, 1) == golden.weight(row, k);
    check(ok, name + ", decoded");
  }
}

void test_format() {
  for (int l = 0; l < kLayoutCount; ++l) {
    const Layout layout = static_cast<Layout>(l);
    const int64_t unit = kInputs[l] * (layout == Layout::kInt4 ? kGroupBlocks : 1);
    check(spec(layout).block_inputs() == kInputs[l] && spec(layout).offset == kOffset[l],
          std::string("format: ") + spec(layout).name);
    bool blocks = true;
    bool padding = true;
    for (int64_t k = 0; k <= 300; ++k) {
      blocks &= input_blocks_of(layout, k) == (k + unit - 1) / unit * (unit / kInputs[l]);
      const int64_t padded = padded_inputs(layout, k);
      padding &= padded % kRowPadding == 0 && padded >= input_blocks_of(layout, k) * kInputs[l] &&
                 padded < k + unit + kRowPadding;
    }
    check(blocks, "format: input_blocks_of");
    check(padding, "format: padded_inputs");
    if (layout == Layout::kInt4) continue;
    const Matrix matrix = make_matrix(layout, 3, 2, Fill::kRandom);
    bool decoded = true;
    for (int64_t row = 0; row < 32; ++row)
      for (int64_t k = 0; k < matrix.inputs; ++k)
        decoded &= decode_weight(layout, matrix.codes.get(), row, k, 3) ==
                   matrix.w[static_cast<size_t>(row * matrix.inputs + k)];
    check(decoded, "format: decode_weight finds its block");
  }
  check(row_blocks_of(0) == 0 && row_blocks_of(1) == 1 && row_blocks_of(16) == 1 &&
            row_blocks_of(17) == 2,
        "format: row_blocks_of");
}

void test_bf16() {
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
}

float narrowed(float x, const float* /*like*/) { return x; }
float narrowed(float x, const uint16_t* /*like*/) { return from_bf16(round_to_bf16(x)); }
void store(float x, float* y) { *y = x; }
void store(float x, uint16_t* y) { *y = round_to_bf16(x); }

// 5 values out of exact buffers into one of 7; nothing else is written.
template <typename X>
void check_epilogue(float x_scale, bool per_row, bool residual, const char* what) {
  constexpr int64_t kCount = 5;
  constexpr int32_t kCorrection = 1001;
  const Buffer<int32_t> acc({-20, 0, 123456, (1 << 24) + 1 + kCorrection, -2000000000}, odd());
  const std::vector<float> scales = {0.7F, -1.5F, 1e-3F, 3.3F, 0.11F};
  const Buffer<float> w_scale(per_row ? scales : std::vector<float>{0.37F}, odd());
  std::vector<X> added(static_cast<size_t>(residual ? kCount : 0));
  for (X& v : added) store(static_cast<float>(uniform(-1000, 1000)) / 7, &v);
  const Buffer<X> res(added, odd());
  X untouched;
  store(-1, &untouched);
  const Buffer<X> y(kCount + 2, untouched, odd());
  scale_row(acc.get(), kCount, kCorrection, x_scale, w_scale.get(), per_row,
            residual ? res.get() : static_cast<const X*>(nullptr), y.get());
  for (int64_t n = 0; n < kCount + 2; ++n) {
    float wanted = -1;
    if (n < kCount) {
      const float factor = x_scale * w_scale[per_row ? n : 0];
      wanted = static_cast<float>(acc[n] - kCorrection) * factor;
      if (residual) wanted = wanted + widened(res[n]);
      wanted = narrowed(wanted, y.get());
    }
    check(same(widened(y[n]), wanted), std::string("scale_row ") + what);
  }
}

void test_epilogue() {
  for (const float x_scale : {0.1F, 3.0F, kNan})
    for (const bool per_row : {false, true})
      for (const bool residual : {false, true}) {
        check_epilogue<float>(x_scale, per_row, residual, "f32");
        check_epilogue<uint16_t>(x_scale, per_row, residual, "bf16");
      }
  const Buffer<int32_t> acc({5, -7, 2000000000}, 1);
  const Buffer<int32_t> y(4, -1, 1);
  scale_row(acc.get(), 3, -9, 0.5F, nullptr, false, static_cast<const int8_t*>(nullptr), y.get());
  check(y[0] == 14 && y[1] == 2 && y[2] == 2000000009 && y[3] == -1, "scale_row int32");
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
  size_t scheduled() const { return scheduled_; }
  // Waits for threads that have not ended, or not even begun.
  void rest() const {
    while (ended_ != running_.size()) std::this_thread::yield();
  }
  template <typename F>
  void Schedule(F task) {
    if (scheduled_++ == 1 && when_ == When::kThrows) throw std::bad_alloc();
    if (when_ == When::kInline) task();
    if (when_ == When::kLater) later_.emplace_back(task);
    if (when_ == When::kThread || when_ == When::kThrows)
      running_.emplace_back([this, task] {
        task();
        ++ended_;
      });
  }

 private:
  When when_;
  int64_t threads_;
  size_t scheduled_ = 0;
  std::vector<std::function<void()>> later_;
  std::atomic<size_t> ended_{0};
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

// Loops that follow each other are served by helpers that stand by; the pool is asked only for those
// that are missing.
void test_standby() {
  const auto run = [](TestPool& pool, int64_t chunks) {
    std::vector<std::atomic<int>> seen(static_cast<size_t>(chunks));
    parallel_for(pool, chunks, [&](int64_t chunk) { ++seen[static_cast<size_t>(chunk)]; });
    for (const auto& count : seen)
      if (count != 1) return false;
    return true;
  };
  TestPool pool(TestPool::When::kThread, 3);
  bool once = true;
  for (int i = 0; i < 1000; ++i) once &= run(pool, 1 + i % 40);
  check(once, "standby: every chunk once, loop after loop");
  pool.rest();
  const size_t before = pool.scheduled();
  once = run(pool, 40);
  check(once && pool.scheduled() == before + 2, "standby: the pool is asked again after a pause");

  bool asked = true;
  for (int attempt = 0; attempt < 100 && asked; ++attempt) {  // this thread may be held up
    pool.rest();
    run(pool, 40);
    for (int i = 0; i < 1000000 && standby().helpers() != 2; ++i) spin_pause();
    const size_t now = pool.scheduled();
    run(pool, 40);
    asked = pool.scheduled() != now;
  }
  check(!asked, "standby: and not while both helpers stand by");

  bool all[3] = {true, true, true};
  std::vector<std::thread> callers;
  for (bool& ok : all)
    callers.emplace_back([&ok, &run] {
      TestPool own(TestPool::When::kThread, 2);
      for (int i = 0; i < 300; ++i) ok &= run(own, 1 + i % 7);
    });
  for (std::thread& caller : callers) caller.join();
  check(all[0] && all[1] && all[2], "standby: several callers at once");

  thread_limit = 1;
  std::atomic<int> elsewhere{0};
  const std::thread::id caller = std::this_thread::get_id();
  parallel_for(pool, 100, [&](int64_t) { elsewhere += std::this_thread::get_id() != caller; });
  thread_limit = std::numeric_limits<int64_t>::max();
  check(elsewhere == 0, "thread_limit of 1: the caller alone");
}

// Which form a product takes, by times that are given here.
void test_form_times() {
  // Of n calls at this count, how many go by columns, where these are the nanoseconds of either.
  const auto columns_of = [](FormTimes& times, int n, int64_t nonzero, float rows, float input) {
    int columns = 0;
    for (int i = 0; i < n; ++i) {
      const bool by_columns = times.by_columns(nonzero);
      times.took(by_columns, nonzero, by_columns ? input * static_cast<float>(nonzero) : rows);
      columns += by_columns ? 1 : 0;
    }
    return columns;
  };
  constexpr int kTry = FormTimes::kTryEvery;
  FormTimes times;
  check(columns_of(times, 1, 100, 1000, 5) == 0, "form times: rows first");
  check(columns_of(times, 1, 100, 1000, 5) == 1, "form times: then columns");
  check(columns_of(times, 10 * kTry, 100, 1000, 5) == 10 * (kTry - 1), "form times: the faster form");
  check(columns_of(times, 10 * kTry, 300, 1000, 5) == 10, "form times: rows for more inputs");
  columns_of(times, 30 * kTry, 100, 1000, 20);
  check(columns_of(times, kTry, 100, 1000, 20) == 1, "form times: columns became slower");
  columns_of(times, 30 * kTry, 100, 1000, 5);
  check(columns_of(times, kTry, 100, 1000, 5) == kTry - 1, "form times: and faster again");
  times.took(false, 100, 1e9F);  // held up
  times.took(true, 100, 1e9F);
  check(columns_of(times, kTry, 100, 1000, 5) == kTry - 1, "form times: a delay changes little");

  FormTimesByShape shapes;
  check(&shapes[1] == &shapes[1] && &shapes[1] != &shapes[2], "form times: each shape has its own");
  for (uint64_t key = 3; key < 100; ++key) shapes[key].took(false, 1, 1);
  check(&shapes[98] == &shapes[99] && &shapes[1] != &shapes[99], "form times: the last ones share");
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

int run(const char* wanted_default) {
  if (wanted_default != nullptr)
    check(active_kernel().name == std::string(wanted_default),
          std::string("the default is ") + wanted_default + ", not " + active_kernel().name);
  test_golden_bytes();
  test_format();
  test_bf16();
  test_epilogue();
  test_loop();
  test_loop_waits();
  test_standby();
  test_form_times();
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
  for (const bool guarded : {false, true}) {
    guard_pages = guarded;
    for (const Kernel& kernel : kernels) {
      check(kernel, kernel.tile_rows <= kMostRows && kernel.panel_blocks <= kMaxPanelBlocks, "tile");
      test_quantise(kernel);
      test_rows(kernel);
      test_sums(kernel);
      test_ceilings(kernel);
      test_bare_panels(kernel);
      test_columns(kernel);
    }
    for (int layout = 0; layout < kLayoutCount; ++layout)
      test_products(kernels, static_cast<Layout>(layout));
  }
  for (const auto& [name, count] : passed_by) std::printf("%s: %d passed\n", name.c_str(), count);
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}

}  // namespace
}  // namespace bitjax

int main(int argc, char** argv) { return bitjax::run(argc > 1 ? argv[1] : nullptr); }
