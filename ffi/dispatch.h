// Which kernels are built in, which of them this machine can run, and which one runs.
//
// Order of decision: the kernel forced by force_kernel(), else the one named by the environment
// variable BITJAX_KERNEL (read once), else the first available one in the order of compiled().
// Naming a kernel that is unknown or unsupported is an error, never a fallback.
#ifndef BITJAX_FFI_DISPATCH_H_
#define BITJAX_FFI_DISPATCH_H_

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "attention.h"
#include "kernel.h"
#include "training_attention.h"

namespace bitjax {

// Names in order of preference, fastest first.
std::vector<std::string> compiled_kernels();
std::vector<std::string> available_kernels();

// The kernel that products use now. Throws std::invalid_argument when BITJAX_KERNEL names an
// unknown or unsupported one.
const Kernel& active_kernel();

// Attention compiled for the same instruction set.
const AttentionKernel& active_attention();

// The same for training's attention, of which sets that are alike in float32 share one.
TrainingAttentionKernel active_training_attention();
TrainingAttentionKernel training_attention_of(const std::string& kernel);

// Forces a kernel for the whole process from the next product on; an empty name lifts the force.
// Throws std::invalid_argument, and changes nothing, when the kernel is unknown or unsupported.
void force_kernel(const std::string& name);

// How many products, and how many calls of attention, each compiled kernel has run in this process.
void count_call(const Kernel& kernel);
void count_call(const AttentionKernel& kernel);
std::vector<std::pair<std::string, uint64_t>> kernel_calls();
std::vector<std::pair<std::string, uint64_t>> attention_calls();

}  // namespace bitjax

#endif  // BITJAX_FFI_DISPATCH_H_
