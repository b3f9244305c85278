// Whether a product reads its weights by rows or by columns, learnt from how long either took.
//
// Columns skip the inputs whose activation is zero, and lines that are left out cost more than their
// share of one stream: of 335 in 1,000 inputs, from memory, columns took 0.6 of the time of rows on Zen 5
// in quiet minutes and more than rows in others, and 1.4 times as long on Zen 4. Both forms give the same
// bits, so a wrong guess costs time only.
#ifndef BITJAX_FFI_FORM_TIMES_H_
#define BITJAX_FFI_FORM_TIMES_H_

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>

namespace bitjax {

// Shares of non-zero activations up to which columns won on every machine measured, and from which on
// they never did; between them times decide.
constexpr double kSurelyColumns = 0.1;
constexpr double kSurelyRows = 0.4;

// The times of one shape of weights.
class FormTimes {
 public:
  // Calls of which one takes the form that seems slower, to see whether it still is.
  static constexpr uint32_t kTryEvery = 64;

  bool by_columns(int64_t nonzero) {
    const float rows = rows_.load(std::memory_order_relaxed);
    const float input = input_.load(std::memory_order_relaxed);
    if (rows == 0 || input == 0) return rows != 0;  // each once
    const bool faster = input * static_cast<float>(nonzero) < rows;
    const bool other = calls_.fetch_add(1, std::memory_order_relaxed) % kTryEvery == kTryEvery - 1;
    return faster != other;
  }

  // A call took so many nanoseconds, more than zero.
  void took(bool by_columns, int64_t nonzero, float nanoseconds) {
    if (!by_columns) return learn(rows_, nanoseconds);
    if (nonzero > 0) learn(input_, nanoseconds / static_cast<float>(nonzero));
  }

 private:
  // Towards what was seen: quickly downwards, slowly upwards, for a call may have had to wait for other
  // things than its own work.
  static void learn(std::atomic<float>& value, float seen) {
    const float before = value.load(std::memory_order_relaxed);
    const float after = before == 0    ? seen
                        : seen < before ? (before + seen) / 2
                                        : before + (std::min(seen, 2 * before) - before) / 8;
    value.store(after, std::memory_order_relaxed);
  }

  // Of a product by rows, and of one by columns for each non-zero input; 0: not yet known. Threads may
  // lose each other's changes.
  std::atomic<float> rows_{0}, input_{0};
  std::atomic<uint32_t> calls_{0};
};

// The times of every shape in use, by a key of the caller's that is not 0. Beyond some number of shapes
// the last place serves all the others.
class FormTimesByShape {
 public:
  FormTimes& operator[](uint64_t key) {
    for (size_t i = 0; i + 1 < places_.size(); ++i) {
      uint64_t held = 0;
      if (places_[i].key.compare_exchange_strong(held, key) || held == key) return places_[i].times;
    }
    return places_.back().times;
  }

 private:
  struct Place {
    std::atomic<uint64_t> key{0};
    FormTimes times;
  };
  std::array<Place, 32> places_;
};

}  // namespace bitjax

#endif  // BITJAX_FFI_FORM_TIMES_H_
