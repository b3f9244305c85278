// AVX-VNNI: the dot product of AVX-512 VNNI on 256-bit vectors, for CPUs without AVX-512 (Alder Lake
// and later). Activations are quantised by the AVX2 kernel.
//
// Differs from the scalar kernel only in the order of exact integer sums. tests/ffi compiles this
// file a second time with BITJAX_AVXVNNI_EVEX, in the encoding of the same instruction that AVX-512
// machines run.

#include "ymm.h"

#ifdef BITJAX_AVXVNNI_EVEX
#define BITJAX_DPBUSD "vpdpbusd"
#else
#define BITJAX_DPBUSD "%{vex%} vpdpbusd"
#endif

namespace bitjax {
namespace {

struct AvxVnni : Ymm {
  // One row: both halves of a block in one stream, and planes masked in place, 8 or 10 accumulators.
  // More rows would spill those; up to three, half a block's planes still fit.
  static constexpr int stream_vectors(int m) { return m == 1 ? 2 : 1; }
  static constexpr bool mask_in_place(int m) { return m <= 3; }
  static constexpr bool pairs(Layout layout) { return layout == Layout::kTernary16; }

  template <int max_code>
  struct Dot : WideGroups<AvxVnni> {
    using Narrow = Sums;
    static constexpr int64_t kSpan = int64_t{1} << 40;
    static Narrow none() { return _mm256_setzero_si256(); }
    static Narrow dot(Narrow acc, Bytes codes, int32_t group) {
      // Not the intrinsic: GCC 12 copies its accumulator to another register and back.
      asm(BITJAX_DPBUSD " %2, %1, %0" : "+x"(acc) : "x"(codes), "x"(_mm256_set1_epi32(group)));
      return acc;
    }
    static Sums widen(Sums acc, Narrow narrow) { return _mm256_add_epi32(acc, narrow); }
  };
};

}  // namespace

#ifdef BITJAX_AVXVNNI_EVEX
Kernel avxvnni_evex_kernel();
Kernel avxvnni_evex_kernel() {
  const Kernel avx2 = avx2_kernel();
  return make_kernel<AvxVnni>("avxvnni-evex", avx2.quantize_f32, avx2.quantize_bf16);
}
#else
Kernel avxvnni_kernel() {
  const Kernel avx2 = avx2_kernel();  // AVX-VNNI implies AVX2
  return make_kernel<AvxVnni>("avxvnni", avx2.quantize_f32, avx2.quantize_bf16);
}
#endif

}  // namespace bitjax
