// Attention of a training step against plain loops in double, on buffers of exactly the size that the
// contract in training_attention.h gives, with and without guard pages, for every kernel that runs
// here. The bounds are tests/ops/test_training_attention.py's affair: here a generous one tells a
// wrong result from rounding.

#include "training_attention.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "buffer.h"
#include "dispatch.h"

namespace bitjax {
namespace {

int passed = 0, failed = 0;

struct Shape {
  int64_t tokens;
  int h;
  int documents;      // 0: no segments
  float size = 1.0F;  // of queries, keys and values
};

std::mt19937& generator() {
  static std::mt19937 g(1);
  return g;
}

std::vector<float> normals(int64_t count, float size = 1.0F) {
  std::normal_distribution<float> normal(0.0F, size);
  std::vector<float> values(static_cast<size_t>(count));
  for (float& v : values) v = normal(generator());
  return values;
}

// A token's row holds q, k, v and then nothing: the last one ends the buffer.
struct Case {
  Shape shape;
  int64_t stride;
  Buffer<float> qkv, turn, d_out;
  Buffer<int32_t> segments;

  explicit Case(const Shape& s)
      : shape(s),
        stride(3 * s.h),
        qkv(normals(s.tokens * stride, s.size), 0),
        turn(normals(s.tokens * s.h), 0),
        d_out(normals(s.tokens * s.h), 0),
        segments(s.documents == 0 ? 0 : s.tokens, 0) {
    for (int64_t t = 0; s.documents != 0 && t < s.tokens; ++t)
      segments[t] = static_cast<int32_t>(t * s.documents / s.tokens);
  }

  TrainingHead head() const {
    return {qkv.get(),  qkv.get() + shape.h, qkv.get() + 2 * shape.h,
            stride,     turn.get(),          shape.documents == 0 ? nullptr : segments.get(),
            shape.tokens, shape.h};
  }

  bool sees(int64_t q, int64_t s) const {
    return s <= q && (shape.documents == 0 || segments[q] == segments[s]);
  }

  std::vector<double> turned(int64_t t, int64_t at, double scale) const {
    const int half = shape.h / 2;
    const float* const x = qkv.get() + t * stride + at;
    const float* const c = turn.get() + t * shape.h;
    std::vector<double> y(static_cast<size_t>(shape.h));
    for (int i = 0; i < half; ++i) {
      const double a = x[i], b = x[half + i], cosine = c[i], sine = c[half + i];
      y[static_cast<size_t>(i)] = scale * (a * cosine - b * sine);
      y[static_cast<size_t>(half + i)] = scale * (b * cosine + a * sine);
    }
    return y;
  }

  // Adds y, turned back, to x.
  void turn_back(int64_t t, const std::vector<double>& y, double* x) const {
    const int half = shape.h / 2;
    const float* const c = turn.get() + t * shape.h;
    for (int i = 0; i < half; ++i) {
      const double a = y[static_cast<size_t>(i)], b = y[static_cast<size_t>(half + i)];
      x[i] += a * c[i] + b * c[half + i];
      x[half + i] += b * c[i] - a * c[half + i];
    }
  }
};

double dot(const std::vector<double>& a, const std::vector<double>& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

struct Wanted {
  std::vector<double> out, gradient;  // [tokens][h], [tokens][3 h]
};

Wanted plain(const Case& c) {
  const int64_t T = c.shape.tokens;
  const size_t h = static_cast<size_t>(c.shape.h);
  const double scale = 1 / std::sqrt(static_cast<double>(h));
  std::vector<std::vector<double>> q, k, v, d, dk(T, std::vector<double>(h)), dv = dk;
  for (int64_t t = 0; t < T; ++t) {
    q.push_back(c.turned(t, 0, scale));
    k.push_back(c.turned(t, c.shape.h, 1));
    const float* const value = c.qkv.get() + t * c.stride + 2 * c.shape.h;
    v.emplace_back(value, value + h);
    d.emplace_back(c.d_out.get() + t * c.shape.h, c.d_out.get() + (t + 1) * c.shape.h);
  }
  Wanted wanted{std::vector<double>(static_cast<size_t>(T) * h),
                std::vector<double>(static_cast<size_t>(T) * 3 * h)};
  for (int64_t t = 0; t < T; ++t) {
    std::vector<double> p(static_cast<size_t>(T)), out(h), dq(h);
    double top = -INFINITY, total = 0;
    for (int64_t s = 0; s <= t; ++s)
      if (c.sees(t, s)) top = std::max(top, dot(q[t], k[s]));
    for (int64_t s = 0; s <= t; ++s)
      if (c.sees(t, s)) total += p[s] = std::exp(dot(q[t], k[s]) - top);
    for (int64_t s = 0; s <= t; ++s)
      for (size_t i = 0; i < h; ++i) out[i] += (p[s] /= i == 0 ? total : 1) * v[s][i];
    const double delta = dot(d[t], out);
    for (int64_t s = 0; s <= t; ++s) {
      const double e = p[s] * (dot(d[t], v[s]) - delta);
      for (size_t i = 0; i < h; ++i) {
        dv[s][i] += p[s] * d[t][i];
        dk[s][i] += e * q[t][i];
        dq[i] += scale * e * k[s][i];
      }
    }
    std::copy(out.begin(), out.end(), wanted.out.begin() + t * c.shape.h);
    c.turn_back(t, dq, wanted.gradient.data() + t * c.stride);
  }
  for (int64_t t = 0; t < T; ++t) {
    double* const row = wanted.gradient.data() + t * c.stride;
    c.turn_back(t, dk[t], row + h);
    for (size_t i = 0; i < h; ++i) row[2 * h + i] = dv[t][i];
  }
  return wanted;
}

void check_near(const char* what, const std::string& kernel, const Shape& s, const float* found,
                const std::vector<double>& wanted) {
  double size = 1, worst = 0;
  for (const double w : wanted) size = std::max(size, std::abs(w));
  for (size_t i = 0; i < wanted.size(); ++i) {
    const double off = std::abs(static_cast<double>(found[i]) - wanted[i]);
    worst = std::isnan(off) ? INFINITY : std::max(worst, off);
  }
  if (worst <= 1e-4 * size) {
    ++passed;
    return;
  }
  ++failed;
  std::printf("FAILED: %s of %s (%lld tokens of %d, %d documents): %g of %g\n", what, kernel.c_str(),
              static_cast<long long>(s.tokens), s.h, s.documents, worst, size);
}

void check_shape(const std::string& name, const Shape& s) {
  const TrainingAttentionKernel kernel = training_attention_of(name);
  const Case c(s);
  const Wanted wanted = plain(c);
  const Buffer<float> out(s.tokens * s.h, NAN, 0), gradient(s.tokens * c.stride, NAN, 0);
  const Buffer<float> maximum(s.tokens, NAN, 0), total(s.tokens, NAN, 0);
  const Buffer<float> scratch(training_attention_scratch(s.h), NAN, 0);
  float* const dk = gradient.get() + s.h;
  float* const dv = dk + s.h;
  for (int64_t t = 0; t < s.tokens; t += kAttentionBlock)
    kernel.forward(c.head(), t, out.get() + t * s.h, s.h, maximum.get() + t, total.get() + t,
                   scratch.get());
  for (int64_t t = 0; t < s.tokens; t += kAttentionBlock)
    kernel.backward(c.head(), t, out.get() + t * s.h, c.d_out.get() + t * s.h, s.h,
                    maximum.get() + t, total.get() + t, gradient.get() + t * c.stride, dk, dv,
                    c.stride, true, scratch.get());
  kernel.finish(dk, c.stride, 1, 0, s.tokens, s.h, c.turn.get(), dk, c.stride);
  check_near("result", name, s, out.get(), wanted.out);
  check_near("gradient", name, s, gradient.get(), wanted.gradient);
}

// Parts are summed, and turned back if there is a turn.
void check_finish(const std::string& name, int64_t count, bool turns) {
  const Shape s{5, 48, 0};
  const Case c(s);
  const std::vector<float> values = normals(count * s.tokens * s.h);
  const Buffer<float> parts(values, 0), y(s.tokens * s.h, NAN, 0);
  training_attention_of(name).finish(parts.get(), s.h, count, s.tokens * s.h, s.tokens, s.h,
                                     turns ? c.turn.get() : nullptr, y.get(), s.h);
  std::vector<double> wanted(y.size());
  for (int64_t t = 0; t < s.tokens; ++t) {
    std::vector<double> sum(static_cast<size_t>(s.h));
    for (int64_t p = 0; p < count; ++p)
      for (int i = 0; i < s.h; ++i) sum[i] += parts[(p * s.tokens + t) * s.h + i];
    if (turns) {
      c.turn_back(t, sum, wanted.data() + t * s.h);
    } else {
      std::copy(sum.begin(), sum.end(), wanted.begin() + t * s.h);
    }
  }
  check_near("finish", name, s, y.get(), wanted);
}

}  // namespace
}  // namespace bitjax

int main() {
  std::string tried;
  for (const std::string& name : bitjax::available_kernels()) {
    tried += " " + name;
    for (const bool guarded : {false, true}) {
      bitjax::guard_pages = guarded;
      for (const bitjax::Shape& shape :
           {bitjax::Shape{1, 16, 0}, {2, 32, 0}, {5, 48, 0}, {17, 64, 3}, {63, 16, 0}, {64, 80, 2},
            {65, 16, 65}, {70, 128, 0}, {130, 16, 0}, {150, 32, 2}, {200, 16, 9}, {7, 512, 0},
            {130, 16, 0, 10.0F}})
        bitjax::check_shape(name, shape);
      for (const int64_t count : {1, 3})
        for (const bool turns : {false, true}) bitjax::check_finish(name, count, turns);
    }
  }
  std::printf("training attention (%s): %d passed, %d failed\n", tried.c_str() + 1, bitjax::passed,
              bitjax::failed);
  return bitjax::failed == 0 ? 0 : 1;
}
