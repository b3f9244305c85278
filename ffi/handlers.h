// XLA custom calls for platform "cpu". Each handlers_*.cc states its operands and checks.
#ifndef BITJAX_FFI_HANDLERS_H_
#define BITJAX_FFI_HANDLERS_H_

// XLA's own types, declared so that only handlers_*.cc need XLA's headers.
struct XLA_FFI_CallFrame;
struct XLA_FFI_Error;

namespace bitjax {

struct Registration {
  const char* name;
  XLA_FFI_Error* (*handler)(XLA_FFI_CallFrame* call);
};

extern const Registration kMatmulRegistrations[2];
extern const Registration kAttentionRegistrations[2];
extern const Registration kPagedRegistrations[2];
extern const Registration kHeadRegistrations[1];
extern const Registration kRowRegistrations[3];
extern const Registration kSamplingRegistrations[1];
extern const Registration kTrainingRegistrations[2];
extern const Registration kTrainingAttentionRegistrations[2];

}  // namespace bitjax

#endif  // BITJAX_FFI_HANDLERS_H_
