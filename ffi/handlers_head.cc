// The custom call of a screened head: approximate logits of every token come in, and those that may
// be among the largest are computed exactly from a bfloat16 table, which is read for them alone.
// Names of dimensions: M rows of activations, D inputs, V tokens.
//
//   bitjax_screened_logits
//     x f32            [M, D]
//     parts f32        [M, P, E]   their sum is expand(x), nearly: the screen's operands
//     approximate f32  [M, P, V]   parts times the screen; P is 1 or 2
//     table bf16       [V, D]
//     dither f32       [D]
//     scale f32        [V]         of the screen's rows; 15 times it is a row's largest step
//     spreads f32      [V]         fourth root of the sum of a row's steps to the fourth
//     norms f32        [V]         of a table's row or the screen's, whichever is longer
//     ranks s32        [M]         how many of the largest logits shall be exact, in 1..V; a row of
//                                  rank -1 is not wanted: its logits are left as they are
//     -> logits f32 [M, V], computed s32 [M]: how many of them are exact
//
// E = 32 ceil(D / 31): groups of 31 inputs of x, and after each minus their product with the dither
// over 7. bitjax/packing.py (Screen) says why, bitjax/ops/reference.py derives the bound: with x_g
// the groups of x and p the sum of the parts, but for a chance of 2^-60
//
//   |approximate[v] - table[v] . x| <= c min(15 scale_v |x|, spread_v (sum_g |x_g|^4)^(1/4))
//                                      + norm_v (|expand(x) - p| + rounding)
//
// A threshold is the rank-th largest exact logit of the likeliest 2 * rank tokens: at most that
// of all. Every token whose approximation plus bound reaches it is computed; the others keep their
// approximation, which is below it. Sums over x are in double, a logit is what dot_bf16 gives: so
// results depend neither on threads nor on kernels.

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <functional>
#include <limits>
#include <memory>
#include <vector>

#include "candidates.h"
#include "dispatch.h"
#include "handler_common.h"
#include "handlers.h"
#include "packed_format.h"
#include "parallel.h"

namespace bitjax {
namespace {

constexpr int64_t kGroupInputs =
    spec(Layout::kInt4).group_blocks * spec(Layout::kInt4).block_inputs();
constexpr int64_t kScreenGroup = kGroupInputs - 1;
constexpr double kDitherCode = 7;
constexpr double kMaxMultiplier = 15;

// sqrt(60 ln 2 / 6): exp(-6 c^2) = 2^-60.
constexpr double kDeviations = 2.6327689;

// More than the float32 roundings of a bound, and of the stored scales, norms and spreads.
constexpr double kRoundUp = 1 + 0x1p-20;

// Tokens of a chunk: 16 KiB of approximations from each part, some 2 us.
constexpr int64_t kChunkTokens = 4096;

// Candidates of a chunk: some 2 us of dot products, more when they come from memory.
constexpr int64_t kChunkCandidates = 8;

// Tokens that are compared with a threshold before anybody asks for the outcome: whole vectors.
constexpr int64_t kBlockTokens = 64;

// Rows of the table are asked for this many rows before they are needed: the hardware knows nothing
// of where the next row begins.
constexpr int64_t kRowsAhead = 2;
constexpr int64_t kLineValues = 32;  // of bfloat16, in a cache line

constexpr int32_t kUnwanted = -1;

struct Shape {
  int64_t M, D, V, P;
  int64_t groups() const { return (D + kScreenGroup - 1) / kScreenGroup; }
  int64_t chunks() const { return (V + kChunkTokens - 1) / kChunkTokens; }
};

Shape shape_of(Dims x, Dims parts, Dims approximate, Dims table, Dims dither, Dims scale,
               Dims spreads, Dims norms, Dims ranks, Dims logits, Dims computed) {
  if (x.size() != 2 || x[1] == 0) throw wrong("x", "[M, D]", text(x));
  if (table.size() != 2 || table[0] == 0) throw wrong("table", "[V, D]", text(table));
  if (parts.size() != 3 || parts[1] < 1 || parts[1] > 2)
    throw wrong("parts", "[M, 1 or 2, E]", text(parts));
  const Shape s{x[0], x[1], table[0], parts[1]};
  const auto require = [](const char* what, Dims got, std::initializer_list<int64_t> wanted) {
    if (got.size() == wanted.size() && std::equal(wanted.begin(), wanted.end(), got.begin()))
      return;
    std::string all;
    for (const int64_t size : wanted) all += (all.empty() ? "" : ", ") + std::to_string(size);
    throw wrong(what, "[" + all + "]", text(got));
  };
  if (s.V > std::numeric_limits<int32_t>::max()) throw wrong("table", "V < 2^31", text(table));
  require("parts", parts, {s.M, s.P, s.groups() * kGroupInputs});
  require("approximate", approximate, {s.M, s.P, s.V});
  require("table", table, {s.V, s.D});
  require("dither", dither, {s.D});
  require("scale", scale, {s.V});
  require("spreads", spreads, {s.V});
  require("norms", norms, {s.V});
  require("ranks", ranks, {s.M});
  require("logits", logits, {s.M, s.V});
  require("computed", computed, {s.M});
  return s;
}

// A row's bound is min(scale * its scale, spread * its spread) + norm * its norm + constant.
struct Bound {
  float scale, spread, norm, constant;
  bool finite;  // whether all of x is
};

Bound bound_of(const float* x, const float* parts, const float* dither, const Shape& s) {
  const int64_t E = s.groups() * kGroupInputs;
  double squares = 0;
  double fourths = 0;
  double part_squares = 0;
  double rest_squares = 0;
  for (int64_t g = 0; g < s.groups(); ++g) {
    const int64_t count = std::min(kScreenGroup, s.D - g * kScreenGroup);
    const float* part = parts + g * kGroupInputs;
    const auto meet = [&](double z, int64_t i) {
      const double p = static_cast<double>(part[i]) + (s.P == 2 ? part[E + i] : 0);
      part_squares += p * p;
      rest_squares += (z - p) * (z - p);
    };
    double group = 0;
    double dithered = 0;
    for (int64_t i = 0; i < count; ++i) {
      const double value = x[g * kScreenGroup + i];
      meet(value, i);
      group += value * value;
      dithered += value * dither[g * kScreenGroup + i];
    }
    for (int64_t i = count; i < kScreenGroup; ++i) meet(0, i);
    meet(-dithered / kDitherCode, kScreenGroup);
    squares += group;
    fourths += group * group;
  }
  // A logit, and the products with the parts, are rounded D + 8 times at most, and a few times
  // more while they are scaled and added. Products below FLT_MIN may become zero.
  const double rounding = static_cast<double>(s.D + 64) * 0x1p-24;
  const double norm = std::sqrt(rest_squares) +
                      rounding * (std::sqrt(squares) + 2 * std::sqrt(part_squares));
  return {static_cast<float>(kRoundUp * kDeviations * kMaxMultiplier * std::sqrt(squares)),
          static_cast<float>(kRoundUp * kDeviations * std::sqrt(std::sqrt(fourths))),
          static_cast<float>(kRoundUp * norm), static_cast<float>(4 * s.D) * FLT_MIN,
          std::isfinite(squares)};
}

struct Call {
  const Shape& s;
  const Kernel& kernel;
  const float* x;
  const float* parts;
  const float* approximate;
  const uint16_t* table;
  const float* dither;
  const float* scale;
  const float* spreads;
  const float* norms;
  float* logits;

  float exact(int64_t m, int64_t v) const {
    return kernel.dot_bf16(x + m * s.D, table + v * s.D, s.D);
  }

  // Joins the parts' products in tokens [first, last) and finds the largest.
  void join(int64_t m, int64_t first, int64_t last, Largest* largest) const {
    const float* a = approximate + s.P * m * s.V;
    const float* b = s.P == 2 ? a + s.V : nullptr;
    float* sum = logits + m * s.V;
    for (int64_t begin = first; begin < last; begin += kBlockTokens) {
      const int64_t end = std::min(last, begin + kBlockTokens);
      const float threshold = largest->threshold();
      int above = 0;
      for (int64_t v = begin; v < end; ++v) {
        sum[v] = b == nullptr ? a[v] : a[v] + b[v];
        above |= sum[v] > threshold ? 1 : 0;
      }
      if (above == 0) continue;
      for (int64_t v = begin; v < end; ++v)
        if (sum[v] > largest->threshold()) largest->add({sum[v], static_cast<int32_t>(v)});
    }
    largest->drop();
  }

  // Computes every token of [first, last) that may reach the threshold; returns their number.
  int64_t refine(int64_t m, const Bound& bound, float threshold, int64_t first,
                 int64_t last) const {
    float* logit = logits + m * s.V;
    const auto below = [&](int64_t v) {  // false if anything is NaN
      const float step = std::min(bound.scale * scale[v], bound.spread * spreads[v]);
      return logit[v] + (step + bound.norm * norms[v] + bound.constant) < threshold;
    };
    int32_t reaching[kChunkTokens];
    int64_t count = 0;
    for (int64_t begin = first; begin < last; begin += kBlockTokens) {
      const int64_t end = std::min(last, begin + kBlockTokens);
      int any = 0;
      for (int64_t v = begin; v < end; ++v) any |= below(v) ? 0 : 1;
      for (int64_t v = begin; any != 0 && v < end; ++v)
        if (!below(v)) reaching[count++] = static_cast<int32_t>(v);
    }
    for (int64_t i = 0; i < std::min(count, kRowsAhead); ++i) prefetch(reaching[i]);
    for (int64_t i = 0; i < count; ++i) {
      if (i + kRowsAhead < count) prefetch(reaching[i + kRowsAhead]);
      logit[reaching[i]] = exact(m, reaching[i]);
    }
    return count;
  }

  void prefetch(int64_t v) const {
    const uint16_t* row = table + v * s.D;
    for (int64_t i = 0; i < s.D; i += kLineValues) __builtin_prefetch(row + i);
  }
};

void run(ffi::ThreadPool pool, const Call& call, const int32_t* ranks, int32_t* computed) {
  const Shape& s = call.s;
  if (s.M == 0) return;
  const int64_t chunks = s.chunks();
  std::vector<Bound> bounds(static_cast<size_t>(s.M));
  std::vector<int64_t> rank(bounds.size());
  std::vector<float> threshold(bounds.size());
  int64_t most = 0;
  for (int64_t m = 0; m < s.M; ++m) {
    const auto i = static_cast<size_t>(m);
    if (ranks[m] == kUnwanted) continue;
    bounds[i] = bound_of(call.x + m * s.D, call.parts + s.P * m * s.groups() * kGroupInputs,
                         call.dither, s);
    rank[i] = std::clamp<int64_t>(ranks[m], 1, s.V);
    most = std::max(most, rank[i]);
  }

  // The likeliest tokens of each chunk, then of all.
  const int64_t wanted = std::min(s.V, 2 * most);
  const int64_t wanted_of_chunk = std::min(wanted, std::min(s.V, kChunkTokens));
  const int64_t room = Largest::room(wanted_of_chunk);
  const std::unique_ptr<Candidate[]> found(
      new Candidate[static_cast<size_t>(s.M * chunks * room)]);
  std::vector<int64_t> counts(static_cast<size_t>(s.M * chunks));
  parallel_for(pool, s.M * chunks, [&](int64_t number) {
    if (ranks[number / chunks] == kUnwanted) return;
    const int64_t first = number % chunks * kChunkTokens;
    // Of a row no more than it needs itself: another's rank changes nothing.
    const int64_t own = 2 * rank[static_cast<size_t>(number / chunks)];
    Largest largest(&found[number * room], std::min(own, wanted_of_chunk));
    call.join(number / chunks, first, std::min(s.V, first + kChunkTokens), &largest);
    counts[static_cast<size_t>(number)] = largest.size();
  });
  std::vector<std::vector<Candidate>> candidates(bounds.size());
  std::vector<std::pair<int64_t, int64_t>> work;  // row, first candidate
  for (int64_t m = 0; m < s.M; ++m) {
    if (ranks[m] == kUnwanted) continue;
    const auto i = static_cast<size_t>(m);
    std::vector<Candidate>& all = candidates[i];
    for (int64_t number = m * chunks; number < (m + 1) * chunks; ++number)
      all.insert(all.end(), &found[number * room],
                 &found[number * room] + counts[static_cast<size_t>(number)]);
    const auto keep = std::min(all.size(), static_cast<size_t>(2 * rank[i]));
    std::nth_element(all.begin(), all.begin() + static_cast<int64_t>(keep), all.end(),
                     std::greater<Candidate>());
    all.resize(keep);
    for (size_t c = 0; c < keep; c += kChunkCandidates) work.emplace_back(m, c);
  }

  parallel_for(pool, static_cast<int64_t>(work.size()), [&](int64_t number) {
    const auto [m, first] = work[static_cast<size_t>(number)];
    std::vector<Candidate>& all = candidates[static_cast<size_t>(m)];
    const size_t last = std::min(all.size(), static_cast<size_t>(first + kChunkCandidates));
    for (size_t c = static_cast<size_t>(first); c < last; ++c) {
      const float value = call.exact(m, all[c].token);
      // A NaN has no place in an order; a lower threshold only means more work.
      all[c].value = std::isnan(value) ? -std::numeric_limits<float>::infinity() : value;
    }
  });
  for (size_t i = 0; i < bounds.size(); ++i) {
    if (ranks[i] == kUnwanted) continue;
    std::vector<Candidate>& all = candidates[i];
    const auto nth = static_cast<size_t>(rank[i] - 1);
    threshold[i] = -std::numeric_limits<float>::infinity();
    if (nth >= all.size()) continue;
    std::nth_element(all.begin(), all.begin() + static_cast<int64_t>(nth), all.end(),
                     std::greater<Candidate>());
    threshold[i] = all[nth].value;
  }

  parallel_for(pool, s.M * chunks, [&](int64_t number) {
    const int64_t m = number / chunks;
    if (ranks[m] == kUnwanted) return;
    const auto i = static_cast<size_t>(m);
    const int64_t first = number % chunks * kChunkTokens;
    const int64_t last = std::min(s.V, first + kChunkTokens);
    if (bounds[i].finite) {
      counts[static_cast<size_t>(number)] = call.refine(m, bounds[i], threshold[i], first, last);
    } else {
      std::fill(call.logits + m * s.V + first, call.logits + m * s.V + last,
                std::numeric_limits<float>::quiet_NaN());
      counts[static_cast<size_t>(number)] = last - first;
    }
  });
  for (int64_t m = 0; m < s.M; ++m) {
    computed[m] = 0;
    for (int64_t number = m * chunks; number < (m + 1) * chunks; ++number)
      computed[m] += static_cast<int32_t>(counts[static_cast<size_t>(number)]);
  }
}

constexpr char kScreenedLogits[] = "bitjax_screened_logits";

ffi::Error screened_logits(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer parts,
                           ffi::AnyBuffer approximate, ffi::AnyBuffer table, ffi::AnyBuffer dither,
                           ffi::AnyBuffer scale, ffi::AnyBuffer spreads, ffi::AnyBuffer norms,
                           ffi::AnyBuffer ranks, ffi::Result<ffi::AnyBuffer> logits,
                           ffi::Result<ffi::AnyBuffer> computed) {
  return guarded(kScreenedLogits, [&] {
    for (const auto& [buffer, what] :
         {std::pair(x, "x"), std::pair(parts, "parts"), std::pair(approximate, "approximate"),
          std::pair(dither, "dither"), std::pair(scale, "scale"), std::pair(spreads, "spreads"),
          std::pair(norms, "norms"), std::pair(*logits, "logits")})
      require_type(buffer, ffi::DataType::F32, what);
    require_type(table, ffi::DataType::BF16, "table");
    require_type(ranks, ffi::DataType::S32, "ranks");
    require_type(*computed, ffi::DataType::S32, "computed");
    const Shape shape =
        shape_of(x.dimensions(), parts.dimensions(), approximate.dimensions(), table.dimensions(),
                 dither.dimensions(), scale.dimensions(), spreads.dimensions(), norms.dimensions(),
                 ranks.dimensions(), logits->dimensions(), computed->dimensions());
    run(pool,
        Call{shape, active_kernel(), data<float>(x), data<float>(parts), data<float>(approximate),
             data<uint16_t>(table), data<float>(dither), data<float>(scale), data<float>(spreads),
             data<float>(norms), data<float>(*logits)},
        data<int32_t>(ranks), data<int32_t>(*computed));
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER(screened_logits_handler, screened_logits,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Arg<ffi::AnyBuffer>()    // x
                           .Arg<ffi::AnyBuffer>()    // parts
                           .Arg<ffi::AnyBuffer>()    // approximate
                           .Arg<ffi::AnyBuffer>()    // table
                           .Arg<ffi::AnyBuffer>()    // dither
                           .Arg<ffi::AnyBuffer>()    // scale
                           .Arg<ffi::AnyBuffer>()    // spreads
                           .Arg<ffi::AnyBuffer>()    // norms
                           .Arg<ffi::AnyBuffer>()    // ranks
                           .Ret<ffi::AnyBuffer>()    // logits
                           .Ret<ffi::AnyBuffer>());  // computed

const Registration kHeadRegistrations[1] = {{kScreenedLogits, screened_logits_handler}};

}  // namespace bitjax
