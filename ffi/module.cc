// Python module bitjax._ffi: the custom calls' capsules, kernel introspection and the format's
// constants. Used by bitjax/ops/ffi.py alone.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <limits>
#include <optional>

#include "attention.h"
#include "dispatch.h"
#include "handlers.h"
#include "kernel.h"
#include "packed_format.h"
#include "parallel.h"
#include "training.h"

namespace nb = nanobind;

namespace {

nb::dict registrations() {
  nb::dict result;
  const auto add = [&result](const bitjax::Registration& entry) {
    result[entry.name] = nb::capsule(reinterpret_cast<void*>(entry.handler));
  };
  for (const bitjax::Registration& entry : bitjax::kMatmulRegistrations) add(entry);
  for (const bitjax::Registration& entry : bitjax::kAttentionRegistrations) add(entry);
  for (const bitjax::Registration& entry : bitjax::kHeadRegistrations) add(entry);
  for (const bitjax::Registration& entry : bitjax::kTrainingRegistrations) add(entry);
  for (const bitjax::Registration& entry : bitjax::kTrainingAttentionRegistrations) add(entry);
  return result;
}

nb::dict counts(const std::vector<std::pair<std::string, uint64_t>>& calls) {
  nb::dict result;
  for (const auto& [name, count] : calls) result[name.c_str()] = count;
  return result;
}

}  // namespace

NB_MODULE(_ffi, m) {
  m.def("registrations", &registrations, "Custom call name -> handler capsule, platform cpu.");
  m.def("kernels_compiled", &bitjax::compiled_kernels, "Names, fastest first.");
  m.def("kernels_available", &bitjax::available_kernels, "Those this machine can run.");
  m.def(
      "active_kernel", [] { return std::string(bitjax::active_kernel().name); },
      "The kernel that products use now.");
  m.def(
      "training_products", [] { return bitjax::training_kernel() != nullptr; },
      "Whether this machine can run the products of a training step.");
  m.def(
      "force_kernel",
      [](const std::optional<std::string>& name) {
        if (name && name->empty()) throw nb::value_error("force_kernel: empty name; use None");
        bitjax::force_kernel(name.value_or(""));
      },
      nb::arg("name").none(),
      "Force a kernel by name for the whole process; None lifts the force.");
  m.def(
      "dot_rounds", [](int64_t rounds) { return bitjax::active_kernel().dot_rounds(rounds); },
      nb::arg("rounds"), nb::call_guard<nb::gil_scoped_release>(),
      "Multiply-adds done by so many rounds of independent dot products of the active kernel.");
  m.def(
      "read_all",
      [](nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu> bytes) {
        return bitjax::active_kernel().read_all(bytes.data(), static_cast<int64_t>(bytes.size()));
      },
      nb::arg("bytes"), nb::call_guard<nb::gil_scoped_release>(), "Reads every byte, folding them.");
  m.def(
      "set_threads",
      [](const std::optional<int64_t>& threads) -> std::optional<int64_t> {
        if (threads && *threads < 1) throw nb::value_error("set_threads: wanted 1 or more, or None");
        constexpr int64_t kNone = std::numeric_limits<int64_t>::max();
        const int64_t before = bitjax::thread_limit.exchange(threads.value_or(kNone));
        return before == kNone ? std::nullopt : std::optional<int64_t>(before);
      },
      nb::arg("threads").none(),
      "Limits the threads of each custom call; None lifts the limit. Returns the one before.");
  m.def(
      "kernel_calls", [] { return counts(bitjax::kernel_calls()); },
      "Products run so far by each compiled kernel.");
  m.def(
      "attention_calls", [] { return counts(bitjax::attention_calls()); },
      "Calls of attention run so far by each compiled kernel.");
  m.attr("KEY_BLOCK") = bitjax::kStepSlots;
  m.attr("FORMAT_VERSION") = bitjax::kFormatVersion;
  nb::dict layouts;
  for (int i = 0; i < bitjax::kLayoutCount; ++i) {
    const bitjax::LayoutSpec& spec = bitjax::kLayouts[i];
    layouts[spec.name] = nb::make_tuple(i, spec.planes, spec.offset, spec.group_blocks,
                                        bitjax::max_inputs(static_cast<bitjax::Layout>(i)));
  }
  m.attr("LAYOUTS") = layouts;  // name -> number, planes, offset, group blocks, largest K
}
