// The packed layouts as vectors unpack them, once for every instruction set; products.h has the
// contract of `Isa`.
#ifndef BITJAX_FFI_LAYOUTS_H_
#define BITJAX_FFI_LAYOUTS_H_

#include <cstdint>

#include "kernel.h"

namespace bitjax {

// ---- layouts: a vector of packed bytes to planes -------------------------------------------------
//
// clean() gives codes, scaled() codes times a factor that differs by plane and costs less to reach;
// unscale_plane() divides a plane's sums by it, exactly, for they are multiples of it, and unscale()
// adds all planes up. paired() is between the two: it hands out plane after plane, even
// ones clean, odd ones times a factor and at most kPairCode; unscale_odd() divides their sums.

template <class Isa, template <class> class L>
typename Isa::Sums unscale_planes(const typename Isa::Sums (&sum)[L<Isa>::kPlanes]) {
  typename Isa::Sums total = L<Isa>::unscale_plane(sum[0], 0);
  for (int s = 1; s < L<Isa>::kPlanes; ++s)
    total = Isa::add(total, L<Isa>::unscale_plane(sum[s], s));
  return total;
}

template <class Isa>
struct Ternary2 {
  using Bytes = typename Isa::Bytes;
  using Sums = typename Isa::Sums;
  static constexpr Layout kLayout = Layout::kTernary2;
  static constexpr int kPlanes = spec(kLayout).planes;
  static constexpr int kMaxCode = 3;

  static void clean(Bytes b, Bytes (&plane)[kPlanes]) {
    const Bytes mask = Isa::splat(3);
    // Shifts move 16-bit units and drag bits of the neighbouring byte in; the mask removes them.
    plane[0] = Isa::land(b, mask);
    plane[1] = Isa::land(Isa::template shr<2>(b), mask);
    plane[2] = Isa::land(Isa::template shr<4>(b), mask);
    plane[3] = Isa::land(Isa::template shr<6>(b), mask);
  }
  static void scaled(Bytes b, Bytes (&plane)[kPlanes]) {  // by 4^s
    for (int s = 0; s < kPlanes; ++s)
      plane[s] = Isa::land(b, Isa::splat(static_cast<uint8_t>(3 << (2 * s))));
  }
  static constexpr int kPairCode = 12;
  template <typename Use>
  static void paired(Bytes b, const Use& use) {
    const Bytes upper = Isa::template shr<4>(b);
    use(0, Isa::land(b, Isa::splat(3)));
    use(1, Isa::land(b, Isa::splat(12)));
    use(2, Isa::land(upper, Isa::splat(3)));
    use(3, Isa::land(upper, Isa::splat(12)));
  }
  static Sums unscale_odd(Sums sum) { return Isa::template sar<2>(sum); }
  static Sums unscale_plane(Sums sum, int s) {
    return s == 0   ? sum
           : s == 1 ? Isa::template sar<2>(sum)
           : s == 2 ? Isa::template sar<4>(sum)
                    : Isa::template sar<6>(sum);
  }
  static Sums unscale(const Sums (&sum)[kPlanes]) { return unscale_planes<Isa, Ternary2>(sum); }
};

// The inverse of an odd n modulo 2^16, by Newton's iteration: each step doubles its exact bits.
constexpr uint16_t inverse_of(uint32_t n) {
  uint32_t x = n;  // exact in 3 bits
  for (int i = 0; i < 3; ++i) x *= 2 - n * x;
  return static_cast<uint16_t>(x);
}
static_assert(inverse_of(27) * 27 % 65536 == 1, "divides");

// Tables of 16 for ternary1.6, whose digits no byte makes larger than 2.
struct TritTables {
  uint8_t multiple_of_27[16] = {};  // the largest one up to 16 i
  uint8_t digit_0[16] = {};         // of i < 9
  uint8_t digit_1[16] = {};
  uint8_t of_9[16] = {};            // 0, 9, 18 to 0, 1, 2, by their low four bits
  constexpr TritTables() {
    for (int i = 0; i < 16; ++i) multiple_of_27[i] = static_cast<uint8_t>(16 * i / 27 * 27);
    for (int i = 0; i < 9; ++i) {
      digit_0[i] = static_cast<uint8_t>(i % 3);
      digit_1[i] = static_cast<uint8_t>(i / 3);
    }
    of_9[9] = 1;
    of_9[18 % 16] = 2;
  }
};
constexpr TritTables kTrits;

// Where the instruction set has a table of 81 entries, the top digit is taken off by remainder, and the
// other four come as 2-bit fields like those of Ternary2. Otherwise tables of 16 give digit by digit.
template <class Isa>
struct Ternary16 {
  using Bytes = typename Isa::Bytes;
  using Sums = typename Isa::Sums;
  static constexpr Layout kLayout = Layout::kTernary16;
  static constexpr int kPlanes = spec(kLayout).planes;
  static constexpr int kMaxCode = 3;

  // b - m where that is not negative, else b: there b - m wraps around to a larger value.
  static Bytes reduced(Bytes b, uint8_t m) { return Isa::umin(b, Isa::sub(b, Isa::splat(m))); }

  static void clean(Bytes b, Bytes (&plane)[kPlanes]) {
    if constexpr (Isa::kHasTritTable) {
      const Bytes rest = reduced(reduced(b, 81), 81);
      Bytes fields[4];
      Ternary2<Isa>::clean(Isa::trit_fields(rest), fields);
      for (int s = 0; s < 4; ++s) plane[s] = fields[s];
      plane[4] = Isa::land(Isa::sub(b, rest), Isa::splat(3));  // 0, 81, 162 end in the bits 0, 1, 2
    } else {
      digits(b, [&](int s, Bytes digit) { plane[s] = digit; });
    }
  }
  static void scaled(Bytes b, Bytes (&plane)[kPlanes]) {
    if constexpr (Isa::kHasTritTable) {
      const Bytes rest = reduced(reduced(b, 81), 81);
      Bytes fields[4];
      Ternary2<Isa>::scaled(Isa::trit_fields(rest), fields);  // by 4^s
      for (int s = 0; s < 4; ++s) plane[s] = fields[s];
      plane[4] = Isa::sub(b, rest);  // by 81
    } else {
      clean(b, plane);
    }
  }
  static constexpr int kPairCode = 3;
  template <typename Use>
  static void paired(Bytes b, const Use& use) {
    digits(b, use);
  }
  static Sums unscale_odd(Sums sum) { return sum; }
  static Sums unscale_plane(Sums sum, int s) {
    if (!Isa::kHasTritTable) return sum;
    if (s < 4) return Ternary2<Isa>::unscale_plane(sum, s);
    // Multiplying by the inverse of 81 modulo 2^32 divides a multiple of 81.
    return Isa::mul32(sum, Isa::splat32(0x781948B1));
  }
  static Sums unscale(const Sums (&sum)[kPlanes]) { return unscale_planes<Isa, Ternary16>(sum); }

 private:
  // b = 27 (3 d4 + d3) + 9 d2 + (3 d1 + d0): both brackets are below 9 and index the same tables. What
  // the high four bits of b hold of the multiples of 27 leaves 27 + 15 at most.
  template <typename Use>
  static void digits(Bytes b, const Use& use) {
    const Bytes high = Isa::land(Isa::template shr<4>(b), Isa::splat(15));
    const Bytes rest = reduced(Isa::sub(b, Isa::lookup(kTrits.multiple_of_27, high)), 27);
    const Bytes top = Isa::template divided<27>(Isa::sub(b, rest));
    use(3, Isa::lookup(kTrits.digit_0, top));
    use(4, Isa::lookup(kTrits.digit_1, top));
    const Bytes low = reduced(reduced(rest, 9), 9);
    use(2, Isa::lookup(kTrits.of_9, Isa::sub(rest, low)));
    use(0, Isa::lookup(kTrits.digit_0, low));
    use(1, Isa::lookup(kTrits.digit_1, low));
  }
};

template <class Isa>
struct Int4 {
  using Bytes = typename Isa::Bytes;
  using Sums = typename Isa::Sums;
  static constexpr Layout kLayout = Layout::kInt4;
  static constexpr int kPlanes = spec(kLayout).planes;
  static constexpr int kMaxCode = 15;

  static void clean(Bytes b, Bytes (&plane)[kPlanes]) {
    const Bytes mask = Isa::splat(15);
    plane[0] = Isa::land(b, mask);
    plane[1] = Isa::land(Isa::template shr<4>(b), mask);
  }
  static void scaled(Bytes b, Bytes (&plane)[kPlanes]) {  // by 16^s
    plane[0] = Isa::land(b, Isa::splat(0x0F));
    plane[1] = Isa::land(b, Isa::splat(0xF0));
  }
  static Sums unscale_plane(Sums sum, int s) { return s == 0 ? sum : Isa::template sar<4>(sum); }
  static Sums unscale(const Sums (&sum)[kPlanes]) { return unscale_planes<Isa, Int4>(sum); }
};

template <class Isa>
struct Int8 {
  using Bytes = typename Isa::Bytes;
  using Sums = typename Isa::Sums;
  static constexpr Layout kLayout = Layout::kInt8;
  static constexpr int kPlanes = 1;
  static constexpr int kMaxCode = 255;

  static void clean(Bytes b, Bytes (&plane)[kPlanes]) { plane[0] = b; }
  static void scaled(Bytes b, Bytes (&plane)[kPlanes]) { plane[0] = b; }
  static Sums unscale(const Sums (&sum)[kPlanes]) { return sum[0]; }
};

// 2-bit fields of the four base-3 digits of each index below 81.
struct TritFields {
  uint8_t fields[128] = {};
  constexpr TritFields() {
    for (int b = 0; b < 81; ++b)
      for (int s = 0; s < 4; ++s)
        fields[b] = static_cast<uint8_t>(fields[b] | (b / kPowersOf3[s] % 3) << (2 * s));
  }
};

}  // namespace bitjax

#endif  // BITJAX_FFI_LAYOUTS_H_
