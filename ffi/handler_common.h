// What the XLA handlers share: messages, type checks, and the guard that turns exceptions into errors.
// Included by handler files alone.
#ifndef BITJAX_FFI_HANDLER_COMMON_H_
#define BITJAX_FFI_HANDLER_COMMON_H_

#include <new>
#include <stdexcept>
#include <string>

#include "xla/ffi/api/ffi.h"

namespace bitjax {

namespace ffi = xla::ffi;
using Dims = ffi::AnyBuffer::Dimensions;

inline std::string text(Dims dims) {
  std::string result = "[";
  for (size_t i = 0; i < dims.size(); ++i) result += (i == 0 ? "" : ", ") + std::to_string(dims[i]);
  return result + "]";
}

// What is wrong with an operand; built only when something is, since a product takes microseconds.
inline std::invalid_argument wrong(const char* what, const std::string& wanted, const std::string& got) {
  return std::invalid_argument(std::string(what) + ": wanted " + wanted + ", got " + got);
}

inline std::string text(ffi::DataType type) {
  switch (type) {
    case ffi::DataType::F32: return "f32";
    case ffi::DataType::BF16: return "bf16";
    case ffi::DataType::S8: return "s8";
    case ffi::DataType::U8: return "u8";
    case ffi::DataType::S32: return "s32";
    case ffi::DataType::U32: return "u32";
    default: return "type " + std::to_string(static_cast<int>(type));
  }
}

inline void require_type(const ffi::AnyBuffer& buffer, ffi::DataType wanted, const char* what) {
  if (buffer.element_type() != wanted) throw wrong(what, text(wanted), text(buffer.element_type()));
}

// No exception crosses into XLA.
template <typename Function>
ffi::Error guarded(const char* name, const Function& function) noexcept {
  const auto failed = [name](ffi::ErrorCode code, const char* message) {
    return ffi::Error(code, std::string(name) + ": " + message);
  };
  try {
    function();
    return ffi::Error::Success();
  } catch (const std::invalid_argument& error) {
    return failed(ffi::ErrorCode::kInvalidArgument, error.what());
  } catch (const std::bad_alloc&) {
    return failed(ffi::ErrorCode::kResourceExhausted, "no memory for temporary values");
  } catch (const std::exception& error) {
    return failed(ffi::ErrorCode::kInternal, error.what());
  } catch (...) {
    return failed(ffi::ErrorCode::kInternal, "unknown exception");
  }
}

template <typename T>
T* data(const ffi::AnyBuffer& buffer) {
  return static_cast<T*>(buffer.untyped_data());
}

}  // namespace bitjax

#endif  // BITJAX_FFI_HANDLER_COMMON_H_
