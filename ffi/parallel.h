// A loop over independent chunks, shared by the calling thread and a pool's threads.
//
// Every worker has a range of consecutive chunks of its own, so that it reads memory in one forward
// stream (two workers that alternate chunks fetch each other's data ahead of them and together read
// no faster than one). A worker that is done helps with the other ranges. Chunks are claimed from an
// atomic counter for each range. The caller works until none is left and then waits for chunks that
// helpers have claimed, and for nothing else; so it returns even when the pool never runs a helper (a
// pool of one thread, a pool busy with other calls, a call made from the pool itself). A helper that
// starts after the call has returned finds no chunk left: it touches only the shared state, which it
// keeps alive, and never the body or the buffers behind it. Helpers stand by for the next loop
// (standby.h), and only those that are missing are asked of the pool.
#ifndef BITJAX_FFI_PARALLEL_H_
#define BITJAX_FFI_PARALLEL_H_

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <limits>
#include <memory>
#include <mutex>
#include <vector>

#include "standby.h"

namespace bitjax {

// Polls of the counter before the caller sleeps: 10-20 us at the 60-140 cycles a pause takes, a few
// times the length of a chunk, because a sleep and a wake-up cost about as much.
constexpr int kSpinPolls = 500;

// Threads that a loop may use, the caller included, for the whole process.
inline std::atomic<int64_t> thread_limit{std::numeric_limits<int64_t>::max()};

template <typename Body>
class ChunkedLoop final : public Helped {
 public:
  ChunkedLoop(int64_t chunks, int64_t workers, const Body* body)
      : chunks_(chunks), body_(body), ranges_(static_cast<size_t>(workers)) {
    for (int64_t w = 0; w < workers; ++w) {
      ranges_[static_cast<size_t>(w)].next = chunks * w / workers;
      ranges_[static_cast<size_t>(w)].end = chunks * (w + 1) / workers;
    }
  }

  // As the caller: runs chunks until none is left to claim.
  void work() noexcept { work_from(0); }

  // The same as a helper; there may be more helpers about than the loop has workers.
  void help() noexcept override {
    const size_t first = helpers_.fetch_add(1, std::memory_order_relaxed) + 1;
    if (first < ranges_.size()) work_from(first);
  }

  // Returns when every chunk has run; call it after work(), when all of them are claimed.
  void wait() noexcept {
    for (int i = 0; i < kSpinPolls; ++i) {
      if (finished()) return;
      spin_pause();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    all_done_.wait(lock, [this] { return finished(); });
  }

 private:
  void work_from(size_t first) noexcept {
    for (size_t i = 0; i < ranges_.size(); ++i) {
      Range& range = ranges_[(first + i) % ranges_.size()];
      for (;;) {
        const int64_t chunk = range.next.fetch_add(1, std::memory_order_relaxed);
        if (chunk >= range.end) break;
        (*body_)(chunk);
        // The release publishes the chunk's outputs to the caller's acquire in wait().
        if (done_.fetch_add(1, std::memory_order_acq_rel) + 1 == chunks_) {
          const std::lock_guard<std::mutex> lock(mutex_);
          all_done_.notify_all();
        }
      }
    }
  }

  bool finished() const { return done_.load(std::memory_order_acquire) == chunks_; }

  // On a cache line of its own, for its worker claims from it all the time.
  struct alignas(64) Range {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
  };

  const int64_t chunks_;
  const Body* const body_;  // the caller's; alive while any chunk is unfinished
  std::vector<Range> ranges_;
  std::atomic<size_t> helpers_{0};
  std::atomic<int64_t> done_{0};
  std::mutex mutex_;
  std::condition_variable all_done_;
};

// Runs body(chunk) for every chunk in [0, chunks). body must not throw. Pool offers num_threads()
// and Schedule(callable). When helpers cannot be scheduled the caller does the work alone.
template <typename Pool, typename Body>
void parallel_for(Pool& pool, int64_t chunks, const Body& body) {
  const int64_t threads = std::min<int64_t>(pool.num_threads(), thread_limit.load());
  const int64_t helpers = std::min(threads, chunks) - 1;
  if (helpers <= 0) {
    for (int64_t chunk = 0; chunk < chunks; ++chunk) body(chunk);
    return;
  }
  const auto loop = std::make_shared<ChunkedLoop<Body>>(chunks, helpers + 1, &body);
  const bool posted = standby().post(loop.get());
  try {
    for (int64_t i = posted ? standby().helpers() : 0; i < helpers; ++i) {
      pool.Schedule([loop] {
        loop->help();
        standby().stand_by();
      });
    }
  } catch (...) {
    // Fewer helpers; those that were scheduled may be running, so the loop must still be finished.
  }
  loop->work();
  loop->wait();
  if (posted) standby().withdraw();
}

}  // namespace bitjax

#endif  // BITJAX_FFI_PARALLEL_H_
