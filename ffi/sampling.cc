#include "sampling.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "candidates.h"

namespace bitjax {
namespace {

constexpr float kForbidden = -3.0e38F;    // finite, so that differences are no NaN
constexpr float kForbiddingBias = -100.0F;
constexpr int64_t kBlock = 1024;          // tokens whose odds are summed before anything is joined
constexpr int64_t kSmallBlock = 16;       // within one
constexpr int64_t kFirstCandidates = 256;
constexpr float kMaxScale = 1e30F;        // of a tiny temperature; 0 times it is a number

uint64_t mix(uint64_t x) {  // the finaliser of SplitMix64 (Steele, Lea, Flood 2014)
  x += 0x9E3779B97F4A7C15U;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9U;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBU;
  return x ^ (x >> 31);
}

struct Odds {
  const Kernel& kernel;
  const float* x;
  int64_t n;
  float most, scale;

  float of(int64_t first, int64_t count) const {
    return kernel.sum_exponentials(x + first, std::min(count, n - first), most, scale);
  }
  double of_token(int64_t i) const { return of(i, 1); }
  std::vector<float> blocks() const {
    std::vector<float> sums;
    for (int64_t first = 0; first < n; first += kBlock) sums.push_back(of(first, kBlock));
    return sums;
  }
};

double total(const std::vector<float>& sums) {
  double all = 0;
  for (const float sum : sums) all += sum;
  return all;
}

// The first i at which the sum of weight(0..i) exceeds share times all; what precedes leaves in `before`.
template <typename Weight>
int64_t pick(int64_t count, double share, double all, const Weight& weight, double* rest) {
  const double target = share * all;
  double before = 0;
  int64_t last = 0;
  for (int64_t i = 0; i < count; ++i) {
    const double w = weight(i);
    if (w > 0) {
      last = i;
      if (before + w > target) {
        if (rest != nullptr) *rest = (target - before) / w;
        return i;
      }
    }
    before += w;
  }
  if (rest != nullptr) *rest = 1;  // rounding: the last that has any
  return last;
}

// A token of all, in the order of tokens: its block, then its part of the block, then itself.
int64_t draw_of_all(const Odds& odds, double u) {
  const std::vector<float> sums = odds.blocks();
  double share = 0;
  const int64_t block = pick(
      static_cast<int64_t>(sums.size()), u, total(sums),
      [&](int64_t i) { return static_cast<double>(sums[static_cast<size_t>(i)]); }, &share);
  int64_t first = block * kBlock;
  int64_t count = std::min(kBlock, odds.n - first);
  const auto parts = [&](int64_t size) {
    const int64_t number = (count + size - 1) / size;
    std::vector<double> weights;
    double all = 0;
    for (int64_t i = 0; i < number; ++i) {
      weights.push_back(odds.of(first + i * size, std::min(size, count - i * size)));
      all += weights.back();
    }
    const int64_t part = pick(
        number, std::min(share, 1.0), all,
        [&](int64_t i) { return weights[static_cast<size_t>(i)]; }, &share);
    first += part * size;
    count = std::min(size, count - part * size);
  };
  parts(kSmallBlock);
  parts(1);
  return first;
}

// The `count` largest, in falling order.
std::vector<Candidate> largest_of(const Kernel& kernel, const float* x, int64_t n, int64_t count) {
  count = std::min(count, n);
  std::vector<Candidate> held(static_cast<size_t>(Largest::room(count)));
  Largest found(held.data(), count);
  constexpr int64_t kGlance = 64;  // tokens that are compared with the threshold together
  for (int64_t first = 0; first < n; first += kGlance) {
    const int64_t end = std::min(n, first + kGlance);
    if (!(kernel.largest(x + first, end - first) > found.threshold())) continue;
    for (int64_t i = first; i < end; ++i)
      if (x[i] > found.threshold()) found.add({x[i], static_cast<int32_t>(i)});
  }
  found.drop();
  held.resize(static_cast<size_t>(found.size()));
  std::sort(held.begin(), held.end(), std::greater<Candidate>());
  return held;
}

// How many of the candidates, which are in falling order, top-p and min-p leave.
int64_t kept_of(const std::vector<double>& odds, double all, const SampleRow& row) {
  double before = 0;
  for (size_t i = 0; i < odds.size(); ++i) {
    const bool kept = (row.top_p >= 1 || before < static_cast<double>(row.top_p) * all) &&
                      odds[i] >= static_cast<double>(row.min_p) * odds[0];
    if (i > 0 && !kept) return static_cast<int64_t>(i);
    before += odds[i];
  }
  return static_cast<int64_t>(odds.size());
}

int64_t draw_filtered(const Odds& odds, const SampleRow& row, double u) {
  const bool limited = row.top_k > 0 && row.top_k < odds.n;
  double all = limited ? 0 : total(odds.blocks());
  for (int64_t count = limited ? row.top_k : kFirstCandidates;; count *= 4) {
    const auto candidates = largest_of(odds.kernel, odds.x, odds.n, count);
    std::vector<double> weights;
    for (const Candidate& c : candidates) weights.push_back(odds.of_token(c.token));
    if (limited) {
      all = 0;
      for (const double w : weights) all += w;
    }
    const int64_t kept = kept_of(weights, all, row);
    if (!limited && kept == count && count < odds.n) continue;  // more may be kept
    double left = 0;
    for (int64_t i = 0; i < kept; ++i) left += weights[static_cast<size_t>(i)];
    const int64_t drawn = pick(
        kept, u, left, [&](int64_t i) { return weights[static_cast<size_t>(i)]; }, nullptr);
    return candidates[static_cast<size_t>(drawn)].token;
  }
}

// A copy of the logits as penalties, biases and mask leave them.
std::unique_ptr<float[]> edited(const SampleRow& row, int64_t n) {
  std::unique_ptr<float[]> x(new float[static_cast<size_t>(n)]);
  std::copy_n(row.logits, n, x.get());
  for (int64_t e = 0; e < row.edit_count; ++e) {
    const int32_t token = row.tokens[e];
    if (token < 0 || token >= n) continue;
    const Edit& edit = row.edits[e];
    float& l = x[static_cast<size_t>(token)];
    if (edit.seen != 0) l = l > 0 ? l / row.repetition : l * row.repetition;
    if (edit.count > 0) l -= row.presence + row.frequency * edit.count;
    l = edit.bias <= kForbiddingBias ? kForbidden : std::max(l + edit.bias, kForbidden);
  }
  if (row.mask != nullptr)
    for (int64_t i = 0; i < n; ++i)
      if ((row.mask[i / 32] >> (i % 32) & 1U) == 0) x[static_cast<size_t>(i)] = kForbidden;
  return x;
}

}  // namespace

double noise(uint64_t seed, uint64_t sample, uint64_t position) {
  const uint64_t bits = mix(mix(mix(seed) ^ sample) ^ position);
  return (static_cast<double>(bits >> 12) + 0.5) * 0x1p-52;
}

Drawn sample_row(const Kernel& kernel, const SampleRow& row, int64_t vocabulary, int64_t count,
                 int32_t* top_tokens, float* top_logprobs, bool wants_logprob) {
  const int64_t n = vocabulary;
  float most = kernel.largest(row.logits, n);
  if (!std::isfinite(most)) return {-2, NAN};
  double log_total = 0;
  if (wants_logprob) {
    const Odds odds{kernel, row.logits, n, most, 1.0F};
    log_total = static_cast<double>(most) + std::log(total(odds.blocks()));
    const auto top = largest_of(kernel, row.logits, n, std::max<int64_t>(count, 1));
    for (int64_t i = 0; i < count; ++i) {
      const bool there = i < static_cast<int64_t>(top.size());
      top_tokens[i] = there ? top[static_cast<size_t>(i)].token : -1;
      top_logprobs[i] =
          there ? static_cast<float>(static_cast<double>(top[static_cast<size_t>(i)].value) - log_total)
                : NAN;
    }
  }
  const bool changes = row.edit_count > 0 || row.mask != nullptr;
  const std::unique_ptr<float[]> copy = changes ? edited(row, n) : nullptr;
  const float* x = changes ? copy.get() : row.logits;
  if (changes) most = kernel.largest(x, n);
  if (!(most > kForbidden)) return {-1, NAN};

  int64_t token;
  if (row.temperature == 0) {
    token = std::find(x, x + n, most) - x;
  } else {
    const Odds odds{kernel, x, n, most, std::min(1.0F / row.temperature, kMaxScale)};
    const double u = noise(row.seed, row.sample, row.position);
    const bool filters = row.top_k > 0 || row.top_p < 1 || row.min_p > 0;
    token = filters ? draw_filtered(odds, row, u) : draw_of_all(odds, u);
  }
  const double logprob = static_cast<double>(row.logits[token]) - log_total;
  return {static_cast<int32_t>(token), wants_logprob ? static_cast<float>(logprob) : NAN};
}

}  // namespace bitjax
