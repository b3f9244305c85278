// The largest of a stream of values.
#ifndef BITJAX_FFI_CANDIDATES_H_
#define BITJAX_FFI_CANDIDATES_H_

#include <algorithm>
#include <cstdint>
#include <functional>
#include <limits>

namespace bitjax {

// Of equal values the lower token is the larger candidate.
struct Candidate {
  float value;
  int32_t token;
  bool operator>(const Candidate& other) const {
    return value > other.value || (value == other.value && token < other.token);
  }
};

// Takes candidates with rising tokens, in linear time: twice as many are held before half is dropped.
class Largest {
 public:
  Largest(Candidate* room, int64_t count) : held_(room), count_(count) {}
  static int64_t room(int64_t count) { return 2 * count; }

  // Only larger values need be added.
  float threshold() const { return threshold_; }
  int64_t size() const { return size_; }

  void add(Candidate candidate) {
    held_[size_++] = candidate;
    if (size_ == room(count_)) drop();
  }

  // Leaves the largest in front.
  void drop() {
    if (size_ <= count_) return;
    std::nth_element(held_, held_ + count_ - 1, held_ + size_, std::greater<Candidate>());
    threshold_ = held_[count_ - 1].value;
    size_ = count_;
  }

 private:
  Candidate* held_;
  int64_t count_;
  int64_t size_ = 0;
  float threshold_ = -std::numeric_limits<float>::infinity();
};

}  // namespace bitjax

#endif  // BITJAX_FFI_CANDIDATES_H_
