#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "training.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace bitjax {
namespace {

#if defined(__x86_64__)

struct Cpuid {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  Cpuid(unsigned leaf, unsigned subleaf) {
    // Leaves above the CPU's highest are not run and read as zeros.
    if (!__get_cpuid_count(leaf, subleaf, &eax, &ebx, &ecx, &edx)) eax = ebx = ecx = edx = 0;
  }
};

bool bit(unsigned value, int index) { return ((value >> index) & 1U) != 0; }

// Which register states the operating system saves, as XCR0 bits; 0 without OSXSAVE.
uint64_t os_saved_state() {
  if (!bit(Cpuid(1, 0).ecx, 27)) return 0;
  uint32_t low;
  uint32_t high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

bool has_all(uint64_t value, uint64_t bits) { return (value & bits) == bits; }
constexpr uint64_t kYmmState = 0x06;  // SSE, AVX
constexpr uint64_t kZmmState = 0xE6;  // SSE, AVX, opmask, upper halves of ZMM, ZMM16-31

bool cpu_has_avx2() {
  return has_all(os_saved_state(), kYmmState) && bit(Cpuid(1, 0).ecx, 28) &&
         bit(Cpuid(1, 0).ecx, 12) && bit(Cpuid(7, 0).ebx, 5);  // AVX, FMA, AVX2
}

[[maybe_unused]] bool cpu_has_avxvnni() { return cpu_has_avx2() && bit(Cpuid(7, 1).eax, 4); }

bool cpu_has_avx512vbmi() { return bit(Cpuid(7, 0).ecx, 1); }

bool cpu_has_avx512vnni() {
  const Cpuid leaf7(7, 0);
  const bool f = bit(leaf7.ebx, 16);
  const bool bw = bit(leaf7.ebx, 30);
  const bool vl = bit(leaf7.ebx, 31);
  const bool vnni = bit(leaf7.ecx, 11);
  return cpu_has_avx2() && has_all(os_saved_state(), kZmmState) && f && bw && vl && vnni;
}

[[maybe_unused]] bool cpu_has_avx512bf16() { return cpu_has_avx512vnni() && bit(Cpuid(7, 1).eax, 5); }

#elif defined(__aarch64__) && defined(__linux__)

#ifndef HWCAP2_I8MM  // headers older than Linux 5.7
#define HWCAP2_I8MM (1 << 13)
#endif

bool cpu_has_dotprod() { return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0; }

[[maybe_unused]] bool cpu_has_i8mm() { return (getauxval(AT_HWCAP2) & HWCAP2_I8MM) != 0; }

#elif defined(__aarch64__) && defined(__APPLE__)

bool has_feature(const char* name) {
  int value = 0;
  size_t size = sizeof value;
  return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
}

bool cpu_has_dotprod() { return has_feature("hw.optional.arm.FEAT_DotProd"); }

[[maybe_unused]] bool cpu_has_i8mm() { return has_feature("hw.optional.arm.FEAT_I8MM"); }

#elif defined(__aarch64__)

// No way to ask is known here.
bool cpu_has_dotprod() { return false; }
[[maybe_unused]] bool cpu_has_i8mm() { return false; }

#endif

struct Entry {
  Kernel kernel;
  AttentionKernel attention;
  TrainingAttentionKernel (*training)();
  bool supported;
};

// The macros come from CMakeLists.txt, one for each kernel file that is built.
const std::vector<Entry>& entries() {
  static const std::vector<Entry> all = {
#ifdef BITJAX_HAVE_AVX512VBMI
      {avx512vbmi_kernel(), avx512vbmi_attention(), avx512vnni_training_attention,
       cpu_has_avx512vnni() && cpu_has_avx512vbmi()},
#endif
#ifdef BITJAX_HAVE_AVX512VNNI
      {avx512vnni_kernel(), avx512vnni_attention(), avx512vnni_training_attention,
       cpu_has_avx512vnni()},
#endif
#ifdef BITJAX_HAVE_AVXVNNI
      {avxvnni_kernel(), avxvnni_attention(), avx2_training_attention, cpu_has_avxvnni()},
#endif
#ifdef BITJAX_HAVE_AVX2
      {avx2_kernel(), avx2_attention(), avx2_training_attention, cpu_has_avx2()},
#endif
#ifdef BITJAX_HAVE_I8MM
      {i8mm_kernel(), i8mm_attention(), neon_training_attention, cpu_has_i8mm()},
#endif
#ifdef BITJAX_HAVE_DOTPROD
      {dotprod_kernel(), dotprod_attention(), neon_training_attention, cpu_has_dotprod()},
#endif
#ifdef BITJAX_HAVE_NEON
      {neon_kernel(), neon_attention(), neon_training_attention, true},  // 64-bit Arm includes NEON
#endif
      {scalar_kernel(), scalar_attention(), scalar_training_attention, true},
  };
  return all;
}

constexpr size_t kMaxKernels = 8;
std::atomic<uint64_t> product_count[kMaxKernels];    // parallel to entries()
std::atomic<uint64_t> attention_count[kMaxKernels];  // likewise
std::atomic<const Kernel*> forced{nullptr};

std::vector<std::string> names(bool supported_only) {
  std::vector<std::string> result;
  for (const Entry& entry : entries())
    if (entry.supported || !supported_only) result.emplace_back(entry.kernel.name);
  return result;
}

std::string join(const std::vector<std::string>& parts) {
  std::string result;
  for (const std::string& part : parts) result += (result.empty() ? "" : ", ") + part;
  return result;
}

std::vector<std::pair<std::string, uint64_t>> counts(const std::atomic<uint64_t>* count) {
  std::vector<std::pair<std::string, uint64_t>> result;
  for (size_t i = 0; i < entries().size(); ++i)
    result.emplace_back(entries()[i].kernel.name, count[i].load(std::memory_order_relaxed));
  return result;
}

const Kernel* find(const std::string& name, const char* asked_by) {
  for (const Entry& entry : entries()) {
    if (name != entry.kernel.name) continue;
    if (entry.supported) return &entry.kernel;
    throw std::invalid_argument(std::string(asked_by) + ": this machine cannot run kernel '" +
                                name + "'; available: " + join(names(true)));
  }
  throw std::invalid_argument(std::string(asked_by) + ": unknown kernel '" + name +
                              "'; compiled: " + join(names(false)));
}

const Kernel* find_default() {
  const char* name = std::getenv("BITJAX_KERNEL");
  if (name != nullptr && *name != '\0') return find(name, "environment variable BITJAX_KERNEL");
  for (const Entry& entry : entries())
    if (entry.supported) return &entry.kernel;
  return nullptr;  // not reached: the scalar kernel is always supported
}

}  // namespace

std::vector<std::string> compiled_kernels() { return names(false); }

std::vector<std::string> available_kernels() { return names(true); }

const Kernel& active_kernel() {
  if (const Kernel* kernel = forced.load(std::memory_order_acquire)) return *kernel;
  static const Kernel* const chosen = find_default();  // a throw leaves it to the next call
  return *chosen;
}

const AttentionKernel& active_attention() {
  const char* name = active_kernel().name;
  for (const Entry& entry : entries())
    if (name == entry.kernel.name) return entry.attention;
  return entries().back().attention;  // not reached: active kernels are among the entries
}

TrainingAttentionKernel active_training_attention() {
  return training_attention_of(active_kernel().name);
}

TrainingAttentionKernel training_attention_of(const std::string& kernel) {
  for (const Entry& entry : entries())
    if (kernel == entry.kernel.name) return entry.training();
  throw std::invalid_argument("unknown kernel '" + kernel + "'");
}

const TrainingKernel* training_kernel() {
#ifdef BITJAX_HAVE_AVX512BF16
  static const TrainingKernel kernel = avx512bf16_training();
  return cpu_has_avx512bf16() ? &kernel : nullptr;
#else
  return nullptr;
#endif
}

void force_kernel(const std::string& name) {
  forced.store(name.empty() ? nullptr : find(name, "force_kernel"), std::memory_order_release);
}

void count_call(const Kernel& kernel) {
  for (size_t i = 0; i < entries().size(); ++i)
    if (&entries()[i].kernel == &kernel) product_count[i].fetch_add(1, std::memory_order_relaxed);
}

void count_call(const AttentionKernel& kernel) {
  for (size_t i = 0; i < entries().size(); ++i)
    if (&entries()[i].attention == &kernel)
      attention_count[i].fetch_add(1, std::memory_order_relaxed);
}

std::vector<std::pair<std::string, uint64_t>> kernel_calls() { return counts(product_count); }

std::vector<std::pair<std::string, uint64_t>> attention_calls() { return counts(attention_count); }

}  // namespace bitjax
