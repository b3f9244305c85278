// AVX-512 with VBMI (Ice Lake, Zen 4 and later), whose 128-byte table look-up decodes ternary1.6.

#include "kernels_avx512vnni.cc"
