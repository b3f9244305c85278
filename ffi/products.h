// The products of kernel.h, written once for every instruction set that has vectors.
//
// An instruction-set file defines a struct `Isa` in its anonymous namespace and instantiates these
// templates with it; they then have internal linkage, and no code crosses from one set to another.
//
//   Isa::Bytes               a vector of kLanes * 4 bytes: codes of kLanes rows, 4 inputs each
//   Isa::Sums                a vector of kLanes int32
//   Isa::kLanes              rows in a vector, a divisor of 16
//   Isa::kPanelBlocks        row blocks of a panel
//   Isa::kTileRows           activation rows of a panel product: with the panel's vectors, as many
//                            accumulators as the registers hold
//   Isa::stream_vectors(m)   vectors of a block that few_rows() takes in one pass
//   Isa::kFewRows            activation rows of few_rows(), at most
//   Isa::kStreamedRows       activation rows up to which few_rows() beats panels
//   Isa::mask_in_place(m)    whether codes scaled by a power of their base may be multiplied: they
//                            save shifts, want 32-bit products, and an accumulator for every plane
//   Isa::pairs(layout)       whether a single row is multiplied with paired planes (see below)
//   Isa::stream_blocks(m)    row blocks that few_rows() takes in one pass
//   Isa::multiply_first(m)   whether int4 codes are multiplied before their products are summed
//   Isa::Dot<max_code>       multiplies: Narrow, kSpan (calls that Narrow can take before widen()),
//                            dot(Narrow, Bytes codes, int32 group of 4 activations),
//                            widen(Sums, Narrow)
//                            for int4 also group_start(offset, sum): Narrow that add up to -offset *
//                            sum of 32 activations; add_multiplied(Sums[], Narrow[], multipliers)
//   Isa::kHasTritTable       whether there is trit_fields(b): 2-bit fields of the base-3 digits of
//                            0..80; otherwise there are lookup(table of 16, b), by the low four bits of
//                            b < 128, and divided<n>(b), of multiples of an odd n
//   and, on vectors, load, store, splat, land, sub, umin, shr<n> (16-bit units), mul_bytes (products
//   below 256, by the same byte in both halves of a 16-bit unit); splat32, add, sub32, mul32, sar<n>, load_sums, store_sums, load_lane_bytes (one byte a
//   row, widened to Sums), repeat_lane_bytes (one byte a row, in all four bytes of its lane).
#ifndef BITJAX_FFI_PRODUCTS_H_
#define BITJAX_FFI_PRODUCTS_H_

#include <cstdint>

#include "kernel.h"
#include "layouts.h"
#include "rows.h"

#define BITJAX_INLINE __attribute__((always_inline))  // of a lambda

namespace bitjax {

inline int32_t four_activations(const int8_t* q) {
  int32_t group;
  __builtin_memcpy(&group, q, sizeof group);
  return group;
}

// A group of int4 where Narrow is Sums.
template <class Isa>
struct WideGroups {
  using Sums = typename Isa::Sums;

  static Sums group_start(int32_t offset, int32_t sum) { return Isa::splat32(-offset * sum); }

  template <int M>
  static void add_multiplied(Sums (&acc)[M], const Sums (&group)[M], const uint8_t* multipliers) {
    const Sums m = Isa::load_lane_bytes(multipliers);
    for (int i = 0; i < M; ++i) acc[i] = Isa::add(acc[i], Isa::mul32(group[i], m));
  }
};

// A vector of weights, unpacked block by block to bytes w * multiplier + panel_offset.
template <class Isa, template <class> class L>
class Unpacked {
 public:
  using Bytes = typename Isa::Bytes;
  static constexpr int kPlanes = L<Isa>::kPlanes;

  Unpacked() = default;

  // Lanes of vector v of a row block, from input block `first` on.
  Unpacked(const PackedRows& w, int64_t row, int v, int64_t first)
      : first_(first),
        codes_(w.codes + row * w.input_blocks * kBlockBytes + v * Isa::kLanes * kLaneBytes) {
    if constexpr (kGroup != 0)
      multipliers_ = w.multipliers + row * (w.input_blocks / kGroup) * kBlockRows + v * Isa::kLanes;
  }

  // Asks for the block that lies `ahead` bytes beyond kb; past the end that does nothing.
  void prefetch(int64_t kb, int64_t ahead) const {
    __builtin_prefetch(codes_ + kb * kBlockBytes + ahead);
  }

  // The planes of block kb; blocks come in order.
  void planes(int64_t kb, Bytes (&plane)[kPlanes]) {
    L<Isa>::clean(Isa::load(codes_ + kb * kBlockBytes), plane);
    if constexpr (kGroup != 0) {
      if (kb % kGroup == 0 || kb == first_) {
        multiplier_ = Isa::repeat_lane_bytes(multipliers_ + kb / kGroup * kBlockRows);
        constexpr uint8_t kOffset = spec(L<Isa>::kLayout).offset;
        bias_ = Isa::sub(Isa::splat(panel_offset(L<Isa>::kLayout)),
                         Isa::mul_bytes(multiplier_, Isa::splat(kOffset)));
      }
      // (c - 8) * m + 128, where c * m <= 225
      for (int s = 0; s < kPlanes; ++s)
        plane[s] = Isa::add_bytes(Isa::mul_bytes(plane[s], multiplier_), bias_);
    }
  }

 private:
  static constexpr int kGroup = spec(L<Isa>::kLayout).group_blocks;

  int64_t first_ = 0;
  const uint8_t* codes_ = nullptr;
  const uint8_t* multipliers_ = nullptr;
  Bytes multiplier_{}, bias_{};
};

// ---- few rows --------------------------------------------------------------------------------------
//
// Each block of codes is met by all M rows. Up to about two rows memory is the limit, and one
// consecutive stream of blocks is fastest. From then on arithmetic is: passes take B row blocks at once,
// so that a broadcast of activations serves all of them, and H vectors of each.

// How far ahead codes are asked for: two pages, for the hardware's own prefetcher stops at the end of
// one. Row blocks follow each other, so this is what comes next; past the end it does nothing.
constexpr int kPrefetchBytes = 8192;

// Codes scaled in their places; every plane has its accumulator. The H * M * planes accumulators
// are as many independent chains, which hide the dot product's latency.
template <class Isa, template <class> class L, int M, int H>
void masked_rows(const PackedRows& w, const FewActivations& x, int32_t* out, int64_t out_stride) {
  using Lay = L<Isa>;
  using Bytes = typename Isa::Bytes;
  using Sums = typename Isa::Sums;
  using Dot = typename Isa::template Dot<Lay::kMaxCode>;
  constexpr int P = Lay::kPlanes;
  for (int64_t row = 0; row < w.row_blocks; ++row) {
    const uint8_t* codes = w.codes + row * w.input_blocks * kBlockBytes;
    for (int v = 0; v < kBlockRows / Isa::kLanes; v += H) {
      Sums acc[H][M][P];
      for (int h = 0; h < H; ++h)
        for (int i = 0; i < M; ++i)
          for (int s = 0; s < P; ++s) acc[h][i][s] = Isa::splat32(0);
      for (int64_t kb = 0; kb < w.input_blocks; ++kb) {
        prefetch_once(codes + kb * kBlockBytes + kPrefetchBytes);
        Bytes plane[H][P];
        for (int h = 0; h < H; ++h)
          Lay::scaled(Isa::load(codes + kb * kBlockBytes + (v + h) * Isa::kLanes * kLaneBytes),
                      plane[h]);
        const int8_t* a = x.q + kb * P * kLaneBytes;
        for (int s = 0; s < P; ++s)
          for (int i = 0; i < M; ++i) {
            const int32_t group = four_activations(a + i * x.q_stride + s * kLaneBytes);
            for (int h = 0; h < H; ++h) acc[h][i][s] = Dot::dot(acc[h][i][s], plane[h][s], group);
          }
      }
      for (int h = 0; h < H; ++h)
        for (int i = 0; i < M; ++i)
          Isa::store_sums(out + i * out_stride + row * kBlockRows + (v + h) * Isa::kLanes,
                          Lay::unscale(acc[h][i]));
    }
  }
}

// Codes unpacked, one accumulator a row, in spans that its width can take.
template <class Isa, template <class> class L, int M, int H, int B>
void unpacked_pass(const PackedRows& w, int64_t row, const FewActivations& x, int32_t* out,
                   int64_t out_stride) {
  using Lay = L<Isa>;
  using Bytes = typename Isa::Bytes;
  using Sums = typename Isa::Sums;
  using Dot = typename Isa::template Dot<Lay::kMaxCode>;
  constexpr int P = Lay::kPlanes;
  constexpr int V = B * H;
  // Where a pass takes several row blocks, what comes next to each stream is in the next pass.
  const int64_t ahead = B == 1 ? kPrefetchBytes : B * w.input_blocks * kBlockBytes;
  for (int v = 0; v < kBlockRows / Isa::kLanes; v += H) {
    Unpacked<Isa, L> weights[V];
    for (int n = 0; n < V; ++n) weights[n] = {w, row + n / H, v + n % H, 0};
    Sums acc[V][M];
    for (int n = 0; n < V; ++n)
      for (int i = 0; i < M; ++i) acc[n][i] = Isa::splat32(0);
    for (int64_t kb = 0; kb < w.input_blocks;) {
      const int64_t span = Dot::kSpan / P;
      const int64_t end = kb + span < w.input_blocks ? kb + span : w.input_blocks;
      typename Dot::Narrow narrow[V][M];
      for (int n = 0; n < V; ++n)
        for (int i = 0; i < M; ++i) narrow[n][i] = Dot::none();
      for (; kb < end; ++kb) {
        Bytes plane[V][P];
        for (int n = 0; n < V; ++n) {
          weights[n].prefetch(kb, ahead);
          weights[n].planes(kb, plane[n]);
        }
        const int8_t* a = x.q + kb * P * kLaneBytes;
        for (int s = 0; s < P; ++s)
          for (int i = 0; i < M; ++i) {
            const int32_t group = four_activations(a + i * x.q_stride + s * kLaneBytes);
            for (int n = 0; n < V; ++n) narrow[n][i] = Dot::dot(narrow[n][i], plane[n][s], group);
          }
      }
      for (int n = 0; n < V; ++n)
        for (int i = 0; i < M; ++i) acc[n][i] = Dot::widen(acc[n][i], narrow[n][i]);
    }
    for (int n = 0; n < V; ++n)
      for (int i = 0; i < M; ++i)
        Isa::store_sums(
            out + i * out_stride + (row + n / H) * kBlockRows + (v + n % H) * Isa::kLanes,
            acc[n][i]);
  }
}

// One row: even and odd planes have accumulators of their own, for their codes' factors differ, and spans
// are of constant length: short loops of a length known too late cost half the speed.
template <class Isa, template <class> class L>
void paired_row(const PackedRows& w, const FewActivations& x, int32_t* out) {
  using Lay = L<Isa>;
  using Bytes = typename Isa::Bytes;
  using Sums = typename Isa::Sums;
  using Dot = typename Isa::template Dot<Lay::kPairCode>;
  constexpr int P = Lay::kPlanes;
  constexpr int H = kBlockRows / Isa::kLanes;
  constexpr int kMostBlocks = 64;
  constexpr int64_t kFit = Dot::kSpan / ((P + 1) / 2);
  constexpr int kStep = kFit < kMostBlocks ? kFit : kMostBlocks;
  for (int64_t row = 0; row < w.row_blocks; ++row) {
    const uint8_t* codes = w.codes + row * w.input_blocks * kBlockBytes;
    Sums acc[H][2];
    for (int h = 0; h < H; ++h)
      for (int odd = 0; odd < 2; ++odd) acc[h][odd] = Isa::splat32(0);
    const auto span = [&](int64_t first, int blocks) BITJAX_INLINE {
      typename Dot::Narrow narrow[H][2];
      for (int h = 0; h < H; ++h)
        for (int odd = 0; odd < 2; ++odd) narrow[h][odd] = Dot::none();
      for (int64_t kb = first; kb < first + blocks; ++kb) {
        prefetch_once(codes + kb * kBlockBytes + kPrefetchBytes);
        const int8_t* a = x.q + kb * P * kLaneBytes;
        for (int h = 0; h < H; ++h) {
          Lay::paired(Isa::load(codes + kb * kBlockBytes + h * Isa::kLanes * kLaneBytes),
                      [&](int s, Bytes plane) BITJAX_INLINE {
                        narrow[h][s % 2] = Dot::dot(narrow[h][s % 2], plane,
                                                    four_activations(a + s * kLaneBytes));
                      });
        }
      }
      for (int h = 0; h < H; ++h)
        for (int odd = 0; odd < 2; ++odd) acc[h][odd] = Dot::widen(acc[h][odd], narrow[h][odd]);
    };
    int64_t kb = 0;
    for (; kb + kStep <= w.input_blocks; kb += kStep) span(kb, kStep);
    span(kb, static_cast<int>(w.input_blocks - kb));
    for (int h = 0; h < H; ++h)
      Isa::store_sums(out + row * kBlockRows + h * Isa::kLanes,
                      Isa::add(acc[h][0], Lay::unscale_odd(acc[h][1])));
  }
}

template <class Isa, template <class> class L, int M, int H>
void unpacked_rows(const PackedRows& w, const FewActivations& x, int32_t* out, int64_t out_stride) {
  constexpr int B = Isa::stream_blocks(M);
  int64_t row = 0;
  for (; row + B <= w.row_blocks; row += B)
    unpacked_pass<Isa, L, M, H, B>(w, row, x, out, out_stride);
  for (; row < w.row_blocks; ++row)
    unpacked_pass<Isa, L, M, H, 1>(w, row, x, out, out_stride);
}

// int4: the sums of each group of blocks start at what frees them of the codes' offset, and are
// multiplied at the end.
template <class Isa, int M, int H>
void grouped_rows(const PackedRows& w, const FewActivations& x, int32_t* out, int64_t out_stride) {
  using Lay = Int4<Isa>;
  using Bytes = typename Isa::Bytes;
  using Sums = typename Isa::Sums;
  using Dot = typename Isa::template Dot<Lay::kMaxCode>;
  constexpr LayoutSpec kSpec = spec(Layout::kInt4);
  constexpr int P = Lay::kPlanes;
  static_assert(Dot::kSpan >= P * kSpec.group_blocks, "a group fits the narrow sums");
  const int64_t groups = w.input_blocks / kSpec.group_blocks;
  for (int64_t row = 0; row < w.row_blocks; ++row) {
    const uint8_t* codes = w.codes + row * w.input_blocks * kBlockBytes;
    const uint8_t* multipliers = w.multipliers + row * groups * kBlockRows;
    for (int v = 0; v < kBlockRows / Isa::kLanes; v += H) {
      Sums acc[H][M];
      for (int h = 0; h < H; ++h)
        for (int i = 0; i < M; ++i) acc[h][i] = Isa::splat32(0);
      for (int64_t g = 0; g < groups; ++g) {
        typename Dot::Narrow narrow[H][M];
        for (int i = 0; i < M; ++i) {
          const typename Dot::Narrow start =
              Dot::group_start(kSpec.offset, x.group_sums[i * x.group_stride + g]);
          for (int h = 0; h < H; ++h) narrow[h][i] = start;
        }
        for (int b = 0; b < kSpec.group_blocks; ++b) {
          const int64_t kb = g * kSpec.group_blocks + b;
          // Of several rows the next pass meets the same codes.
          __builtin_prefetch(codes + kb * kBlockBytes + kPrefetchBytes, 0, M == 1 ? 0 : 3);
          const int8_t* a = x.q + kb * P * kLaneBytes;
          for (int h = 0; h < H; ++h) {
            Bytes plane[P];
            Lay::clean(Isa::load(codes + kb * kBlockBytes + (v + h) * Isa::kLanes * kLaneBytes),
                       plane);
            for (int s = 0; s < P; ++s)
              for (int i = 0; i < M; ++i)
                narrow[h][i] = Dot::dot(narrow[h][i], plane[s],
                                        four_activations(a + i * x.q_stride + s * kLaneBytes));
          }
        }
        for (int h = 0; h < H; ++h)
          Dot::add_multiplied(acc[h], narrow[h],
                              multipliers + g * kBlockRows + (v + h) * Isa::kLanes);
      }
      for (int h = 0; h < H; ++h)
        for (int i = 0; i < M; ++i)
          Isa::store_sums(out + i * out_stride + row * kBlockRows + (v + h) * Isa::kLanes,
                          acc[h][i]);
    }
  }
}

// int4 multiplied as it is unpacked; what its bytes are too large by comes off at the end.
template <class Isa, int M, int H>
void multiplied_rows(const PackedRows& w, const FewActivations& x, int32_t* out,
                     int64_t out_stride) {
  unpacked_rows<Isa, Int4, M, H>(w, x, out, out_stride);
  const int64_t groups = w.input_blocks / spec(Layout::kInt4).group_blocks;
  for (int i = 0; i < M; ++i) {
    int32_t sum = 0;
    for (int64_t g = 0; g < groups; ++g) sum += x.group_sums[i * x.group_stride + g];
    for (int64_t n = 0; n < w.row_blocks * kBlockRows; ++n)
      out[i * out_stride + n] -= panel_offset(Layout::kInt4) * sum;
  }
}

template <class Isa, template <class> class L, int M>
void few_rows_of(const PackedRows& w, const FewActivations& x, int32_t* out, int64_t out_stride) {
  constexpr int H = Isa::stream_vectors(M);
  if constexpr (spec(L<Isa>::kLayout).group_blocks != 0 && Isa::multiply_first(M)) {
    multiplied_rows<Isa, M, H>(w, x, out, out_stride);
  } else if constexpr (spec(L<Isa>::kLayout).group_blocks != 0) {
    grouped_rows<Isa, M, M == 1 ? H : 1>(w, x, out, out_stride);
  } else if constexpr (M == 1 && Isa::pairs(L<Isa>::kLayout)) {
    paired_row<Isa, L>(w, x, out);
  } else if constexpr (Isa::mask_in_place(M)) {
    masked_rows<Isa, L, M, H>(w, x, out, out_stride);
  } else {
    unpacked_rows<Isa, L, M, H>(w, x, out, out_stride);
  }
}

template <class Isa, template <class> class L, int M = Isa::kFewRows>
void few_rows(const PackedRows& w, const FewActivations& x, int32_t* out, int64_t out_stride) {
  if constexpr (M > 1) {
    if (x.m < M) return few_rows<Isa, L, M - 1>(w, x, out, out_stride);
  }
  few_rows_of<Isa, L, M>(w, x, out, out_stride);
}

// ---- panels ----------------------------------------------------------------------------------------

template <class Isa, template <class> class L>
void unpack_panel(const PackedRows& w, int64_t first, int64_t last, uint8_t* panel) {
  constexpr int P = L<Isa>::kPlanes;
  constexpr int64_t kStep = Isa::kPanelBlocks * kBlockBytes;
  for (int row = 0; row < w.row_blocks; ++row)
    for (int v = 0; v < kBlockRows / Isa::kLanes; ++v) {
      Unpacked<Isa, L> weights(w, row, v, first);
      uint8_t* to = panel + row * kBlockBytes + v * Isa::kLanes * kLaneBytes;
      for (int64_t kb = first; kb < last; ++kb) {
        // What the next panel of these rows is made of arrives while this one is multiplied.
        weights.prefetch(kb, (last - first) * kBlockBytes);
        typename Isa::Bytes plane[P];
        weights.planes(kb, plane);
        for (int s = 0; s < P; ++s, to += kStep) Isa::store(to, plane[s]);
      }
    }
}

// M activation rows meet V vectors of a panel; all sums stay in registers for a span.
template <class Isa, int max_code, int M, int V>
void panel_columns(const uint8_t* panel, int64_t groups, const int8_t* q, int64_t q_stride,
                   int32_t* acc) {
  using Bytes = typename Isa::Bytes;
  using Dot = typename Isa::template Dot<max_code>;
  constexpr int64_t kStep = Isa::kPanelBlocks * kBlockBytes;
  constexpr int64_t kAccStride = Isa::kPanelBlocks * kBlockRows;
  for (int64_t g = 0; g < groups;) {
    const int64_t end = g + Dot::kSpan < groups ? g + Dot::kSpan : groups;
    typename Dot::Narrow narrow[M][V];
    for (int i = 0; i < M; ++i)
      for (int v = 0; v < V; ++v) narrow[i][v] = Dot::none();
    for (; g < end; ++g) {
      Bytes w[V];
      for (int v = 0; v < V; ++v)
        w[v] = Isa::load(panel + g * kStep + v * Isa::kLanes * kLaneBytes);
      for (int i = 0; i < M; ++i) {
        const int32_t group = four_activations(q + i * q_stride + g * kLaneBytes);
        for (int v = 0; v < V; ++v) narrow[i][v] = Dot::dot(narrow[i][v], w[v], group);
      }
    }
    for (int i = 0; i < M; ++i)
      for (int v = 0; v < V; ++v) {
        int32_t* at = acc + i * kAccStride + v * Isa::kLanes;
        Isa::store_sums(at, Dot::widen(Isa::load_sums(at), narrow[i][v]));
      }
  }
}

template <class Isa, int max_code, int M>
void panel_rows(const uint8_t* panel, int64_t groups, const int8_t* q, int64_t q_stride,
                int32_t* acc) {
  constexpr int V = Isa::kTileVectors;
  static_assert(Isa::kPanelBlocks * kBlockRows % (V * Isa::kLanes) == 0, "whole tiles");
  for (int n = 0; n < Isa::kPanelBlocks * kBlockRows; n += V * Isa::kLanes)
    panel_columns<Isa, max_code, M, V>(panel + n * kLaneBytes, groups, q, q_stride, acc + n);
}

template <class Isa, int max_code>
void panel_product(const uint8_t* panel, int64_t groups, const int8_t* q, int64_t q_stride, int m,
                   int32_t* acc) {
  switch (m) {
    case 1: return panel_rows<Isa, max_code, 1>(panel, groups, q, q_stride, acc);
    case 2: return panel_rows<Isa, max_code, 2>(panel, groups, q, q_stride, acc);
    case 3: return panel_rows<Isa, max_code, 3>(panel, groups, q, q_stride, acc);
    default:
      if constexpr (Isa::kTileRows > 3) {
        switch (m) {
          case 4: return panel_rows<Isa, max_code, 4>(panel, groups, q, q_stride, acc);
          case 5: return panel_rows<Isa, max_code, 5>(panel, groups, q, q_stride, acc);
          default: return panel_rows<Isa, max_code, 6>(panel, groups, q, q_stride, acc);
        }
      }
  }
}

// ---- ceilings --------------------------------------------------------------------------------------

template <class Isa>
int64_t dot_rounds(int64_t rounds) {
  using Dot = typename Isa::template Dot<3>;
  constexpr int kChains = 12;  // hide a latency of 5 cycles at 2 dot products each
  const typename Isa::Bytes codes = Isa::splat(1);
  typename Dot::Narrow sum[kChains];
  for (int i = 0; i < kChains; ++i) sum[i] = Dot::none();
  for (int64_t r = 0; r < rounds; ++r)
    for (int i = 0; i < kChains; ++i) sum[i] = Dot::dot(sum[i], codes, 0x01010101);
  int32_t out[Isa::kLanes];
  volatile int32_t keep = 0;
  for (int i = 0; i < kChains; ++i) {
    Isa::store_sums(out, Dot::widen(Isa::splat32(0), sum[i]));
    keep = keep + out[0];
  }
  return rounds * kChains * Isa::kLanes * kLaneBytes;
}

// Without products of columns: make_kernel's caller adds them where they pay.
template <class Isa>
Kernel make_kernel(const char* name, QuantizeRow<float> quantize_f32,
                   QuantizeRow<uint16_t> quantize_bf16) {
  static_assert(Isa::kTileRows == 3 || Isa::kTileRows == 6, "panel_product has these cases");
  static_assert(Isa::kPanelBlocks <= kMaxPanelBlocks && Isa::kFewRows <= kMaxFewRows,
                "panels and sums fit the callers' buffers");
  return {name,
          quantize_f32,
          quantize_bf16,
          relu2_gate,
          silu_gate,
          rms_norm,
          dot<float>,
          dot<uint16_t>,
          largest,
          sum_exponentials,
          {few_rows<Isa, Ternary2>, few_rows<Isa, Ternary16>, few_rows<Isa, Int4>,
           few_rows<Isa, Int8>},
          Isa::kFewRows,
          Isa::kStreamedRows,
          {unpack_panel<Isa, Ternary2>, unpack_panel<Isa, Ternary16>, unpack_panel<Isa, Int4>,
           unpack_panel<Isa, Int8>},
          panel_product<Isa, 3>,
          panel_product<Isa, 255>,
          nullptr,
          {},
          dot_rounds<Isa>,
          read_all,
          Isa::kPanelBlocks,
          Isa::kTileRows};
}

}  // namespace bitjax

#endif  // BITJAX_FFI_PRODUCTS_H_
