// Helpers that stay awake between loops.
//
// A token of a large model is some 150 short loops, a few microseconds apart. A pool's thread falls
// asleep after some 25 us without work and takes 20-50 us to wake, as long as a loop lasts. So a
// helper that has finished a loop stands by for a while: it watches for the next one and joins it
// within a fraction of a microsecond. While it stands by it yields its core to whoever wants it.
//
// One loop at a time is posted; the loops of other callers meanwhile go through their pools alone.
#ifndef BITJAX_FFI_STANDBY_H_
#define BITJAX_FFI_STANDBY_H_

#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>

namespace bitjax {

inline void spin_pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// What a helper does for a loop; it returns when there is nothing left to take.
class Helped {
 public:
  virtual void help() noexcept = 0;

 protected:
  ~Helped() = default;
};

class Standby {
 public:
  // How long a helper waits for the next loop: longer than what lies between the calls of a program and
  // between two tokens, short enough to cost nothing once a program has ended.
  static constexpr std::chrono::microseconds kPatience{500};
  // Polls before a helper yields its core between polls: some 5 us.
  static constexpr int kEagerPolls = 200;

  // Shows the loop to the helpers that stand by, until withdraw(). False when another one is shown.
  bool post(Helped* loop) {
    Helped* none = nullptr;
    if (!posted_.compare_exchange_strong(none, loop)) return false;
    number_.fetch_add(1);
    return true;
  }

  // Hides the loop; returns when no helper is inside it. Call it when the loop has nothing left to take.
  void withdraw() {
    posted_.exchange(nullptr);  // not a store, which QEMU 7 lets later loads overtake
    while (inside_.load() != 0) spin_pause();
  }

  // Helpers that will see a loop posted before this call.
  int64_t helpers() const { return helpers_.load(); }

  // Joins posted loops until none has come for kPatience.
  void stand_by() noexcept {
    helpers_.fetch_add(1);
    uint64_t seen = 0;
    auto since = std::chrono::steady_clock::now();
    for (int polls = 0;; ++polls) {
      if (join(seen)) {
        polls = 0;
        since = std::chrono::steady_clock::now();
      } else if (polls < kEagerPolls) {
        spin_pause();
      } else if (std::chrono::steady_clock::now() - since < kPatience) {
        std::this_thread::yield();
      } else {
        break;
      }
    }
    // Whoever posts after this asks the pool for a helper; whoever posted before is served.
    helpers_.fetch_sub(1);
    join(seen);
  }

 private:
  // Helps with the posted loop if it is not the one of number `seen`.
  bool join(uint64_t& seen) {
    if (posted_.load() == nullptr || number_.load() == seen) return false;
    inside_.fetch_add(1);
    // Only what is still posted once this thread is counted is sure to stay.
    Helped* const loop = posted_.load();
    if (loop != nullptr) {
      seen = number_.load();
      loop->help();
    }
    inside_.fetch_sub(1);
    return loop != nullptr;
  }

  alignas(64) std::atomic<Helped*> posted_{nullptr};
  std::atomic<uint64_t> number_{0};  // of loops posted so far
  alignas(64) std::atomic<int64_t> inside_{0};
  std::atomic<int64_t> helpers_{0};
};

inline Standby& standby() {
  static Standby instance;
  return instance;
}

}  // namespace bitjax

#endif  // BITJAX_FFI_STANDBY_H_
