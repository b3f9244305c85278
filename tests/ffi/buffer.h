// Buffers of exactly the size that is asked for, for tests of what is read and written beyond them.
//
// On the heap they begin at an offset and end with their allocation: the address sanitizer sees every
// byte beyond. With guard pages their end is a page's end, and the next page cannot be touched, which
// needs no sanitizer (under emulation there is none) and no instrumented load (masked ones are not).
#ifndef BITJAX_TESTS_FFI_BUFFER_H_
#define BITJAX_TESTS_FFI_BUFFER_H_

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

namespace bitjax {

inline bool guard_pages = false;  // for buffers from now on

class Release {
 public:
  explicit Release(size_t mapped = 0) : mapped_(mapped) {}
  void operator()(char* p) const {
    if (mapped_ == 0) {
      delete[] p;
    } else {
      munmap(p, mapped_);
    }
  }

 private:
  size_t mapped_;
};

template <typename T>
class Buffer {
 public:
  Buffer(int64_t size, size_t offset) : size_(static_cast<size_t>(size)) {
    const size_t bytes = size_ * sizeof(T);
    if (!guard_pages) {
      memory_.reset(new char[offset * sizeof(T) + bytes]);
      begin_ = reinterpret_cast<T*>(memory_.get()) + offset;
      return;
    }
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t used = (bytes + page - 1) / page * page;
    void* p = mmap(nullptr, used + page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    memory_ = {static_cast<char*>(p), Release(used + page)};
    if (used > 0 && mprotect(p, used, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
    begin_ = reinterpret_cast<T*>(memory_.get() + used - bytes);
  }
  Buffer(const std::vector<T>& values, size_t offset)
      : Buffer(static_cast<int64_t>(values.size()), offset) {
    if (size_ > 0) std::memcpy(begin_, values.data(), size_ * sizeof(T));
  }
  Buffer(int64_t size, T value, size_t offset)
      : Buffer(std::vector<T>(static_cast<size_t>(size), value), offset) {}
  T* get() const { return begin_; }
  T& operator[](int64_t i) const { return begin_[i]; }
  size_t size() const { return size_; }

 private:
  std::unique_ptr<char, Release> memory_{nullptr, Release()};
  T* begin_;
  size_t size_;
};

}  // namespace bitjax

#endif  // BITJAX_TESTS_FFI_BUFFER_H_
