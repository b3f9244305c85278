// Python module bitjax._ffi: the custom calls' capsules, kernel introspection and the format's
// constants. Used by bitjax/ops/ffi.py alone.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <limits>
#include <optional>
#include <thread>
#include <vector>

#include "attention.h"
#include "dispatch.h"
#include "handlers.h"
#include "kernel.h"
#include "packed_format.h"
#include "parallel.h"
#include "sampling.h"
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
  for (const bitjax::Registration& entry : bitjax::kPagedRegistrations) add(entry);
  for (const bitjax::Registration& entry : bitjax::kHeadRegistrations) add(entry);
  for (const bitjax::Registration& entry : bitjax::kRowRegistrations) add(entry);
  for (const bitjax::Registration& entry : bitjax::kSamplingRegistrations) add(entry);
  for (const bitjax::Registration& entry : bitjax::kTrainingRegistrations) add(entry);
  for (const bitjax::Registration& entry : bitjax::kTrainingAttentionRegistrations) add(entry);
  return result;
}

template <typename T, typename... Shape>
using Array = nb::ndarray<T, nb::device::cpu, nb::c_contig, Shape...>;
using Matrix = Array<const float, nb::ndim<2>>;

void require_size(const char* what, size_t got, size_t wanted) {
  if (got != wanted) {
    const std::string message = std::string("sample: ") + what + " has " + std::to_string(got) +
                                " values; wanted " + std::to_string(wanted);
    throw nb::value_error(message.c_str());
  }
}

// Values of logits that make a second thread pay: its start takes some 20 us, one of sampling 0.1-1 ns.
constexpr size_t kThreadValues = 1 << 19;

// Rows of logits to tokens. The columns of `floats` [R, 6]: temperature, top_p, min_p, repetition,
// presence and frequency penalty; of `integers` [R, 7]: row of the logits, top_k, seed, sample, position,
// row of the masks or -1, wanted log-probabilities or -1. Edits of row r lie from offsets[r] on.
void sample(const Matrix& logits, const Matrix& floats, Array<const int64_t, nb::ndim<2>> integers,
            Array<const int64_t, nb::ndim<1>> offsets, Array<const int32_t, nb::ndim<1>> tokens,
            const Matrix& edits, Array<const uint32_t, nb::ndim<2>> masks,
            Array<int32_t, nb::ndim<1>> drawn, Array<float, nb::ndim<1>> logprobs,
            Array<int32_t, nb::ndim<2>> top_tokens, Array<float, nb::ndim<2>> top_logprobs) {
  const size_t rows = integers.shape(0);
  const size_t vocabulary = logits.shape(1);
  const size_t most = top_tokens.shape(1);
  require_size("floats", floats.size(), 6 * rows);
  require_size("integers", integers.size(), 7 * rows);
  require_size("offsets", offsets.size(), rows + 1);
  require_size("drawn", drawn.size(), rows);
  require_size("logprobs", logprobs.size(), rows);
  require_size("top_tokens", top_tokens.size(), most * rows);
  require_size("top_logprobs", top_logprobs.size(), most * rows);
  require_size("edits", edits.size(), 3 * tokens.size());
  if (masks.shape(0) > 0) require_size("masks", masks.shape(1), (vocabulary + 31) / 32);
  const int64_t* all = integers.data();
  for (size_t r = 0; r < rows; ++r) {
    const int64_t* n = all + 7 * r;
    const int64_t first = offsets.data()[r];
    const int64_t last = offsets.data()[r + 1];
    if (n[0] < 0 || n[0] >= static_cast<int64_t>(logits.shape(0)) || n[1] < 0 || n[5] < -1 ||
        n[5] >= static_cast<int64_t>(masks.shape(0)) || n[6] > static_cast<int64_t>(most) ||
        first < 0 || first > last || last > static_cast<int64_t>(tokens.size()))
      throw nb::value_error("sample: a row's numbers are out of range");
  }
  static_assert(sizeof(bitjax::Edit) == 3 * sizeof(float), "edits are rows of three");
  const bitjax::Kernel& kernel = bitjax::active_kernel();
  const auto one = [&](size_t r) {
    const int64_t* n = all + 7 * r;
    const float* f = floats.data() + 6 * r;
    const int64_t first = offsets.data()[r];
    const bitjax::SampleRow row{
        logits.data() + static_cast<size_t>(n[0]) * vocabulary, f[0], f[1], f[2], f[3], f[4], f[5],
        n[1], static_cast<uint64_t>(n[2]), static_cast<uint64_t>(n[3]), static_cast<uint64_t>(n[4]),
        tokens.data() + first, reinterpret_cast<const bitjax::Edit*>(edits.data()) + first,
        offsets.data()[r + 1] - first,
        n[5] < 0 ? nullptr : masks.data() + static_cast<size_t>(n[5]) * masks.shape(1)};
    const bitjax::Drawn result = bitjax::sample_row(
        kernel, row, static_cast<int64_t>(vocabulary), std::max<int64_t>(n[6], 0),
        top_tokens.data() + most * r, top_logprobs.data() + most * r, n[6] >= 0);
    drawn.data()[r] = result.token;
    logprobs.data()[r] = result.logprob;
  };
  const nb::gil_scoped_release release;
  const auto limit = static_cast<size_t>(
      std::min<int64_t>(bitjax::thread_limit.load(), std::thread::hardware_concurrency()));
  const size_t threads = std::min(std::min(limit, rows), 1 + rows * vocabulary / kThreadValues);
  std::atomic<size_t> next{0};
  const auto work = [&] {
    for (size_t r = next++; r < rows; r = next++) one(r);
  };
  std::vector<std::thread> helpers;
  for (size_t i = 1; i < threads; ++i) helpers.emplace_back(work);
  work();
  for (std::thread& helper : helpers) helper.join();
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
  m.def("sample", &sample, "Draws tokens from rows of logits; see sampling.h.");
  m.def("noise", &bitjax::noise, nb::arg("seed"), nb::arg("sample"), nb::arg("position"),
        "The number in (0, 1) that decides a token.");
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
