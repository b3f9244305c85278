// XLA custom calls for platform "cpu". handlers.cc states each one's operands and checks.
#ifndef BITJAX_FFI_HANDLERS_H_
#define BITJAX_FFI_HANDLERS_H_

// XLA's own types, declared so that only handlers.cc needs XLA's headers.
struct XLA_FFI_CallFrame;
struct XLA_FFI_Error;

namespace bitjax {

struct Registration {
  const char* name;
  XLA_FFI_Error* (*handler)(XLA_FFI_CallFrame* call);
};

constexpr int kRegistrationCount = 2;
extern const Registration kRegistrations[kRegistrationCount];

}  // namespace bitjax

#endif  // BITJAX_FFI_HANDLERS_H_
