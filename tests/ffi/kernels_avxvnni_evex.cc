// The AVX-VNNI kernel in the EVEX encoding, which AVX-512 VNNI machines can run; for kernel_test.

#define BITJAX_AVXVNNI_EVEX
#include "kernels_avxvnni.cc"
