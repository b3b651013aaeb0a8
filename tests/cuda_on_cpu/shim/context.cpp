// See context.h.
#include "context.h"

#include <cstdint>

#if !CONV1X1_EMULATOR_PORTABLE
// Saves what the ABI has a callee preserve on the old stack, and takes it from the new one. The floating-point control
// words are the same for all fibers of an OS thread.
extern "C" __attribute__((visibility("hidden"))) void conv1x1_switch_stack(void** save, void* load);
asm(R"(
.text
.globl conv1x1_switch_stack
.hidden conv1x1_switch_stack
.type conv1x1_switch_stack, @function
conv1x1_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size conv1x1_switch_stack, .-conv1x1_switch_stack
)");
#endif

namespace conv1x1::cuda::emulator {

void Context::start_at(void (*entry)()) {
#if CONV1X1_EMULATOR_ASAN
  __asan_unpoison_memory_region(stack, size);  // frames of an aborted launch were never left
#endif
#if CONV1X1_EMULATOR_PORTABLE
  getcontext(&state);
  state.uc_stack.ss_sp = stack;
  state.uc_stack.ss_size = size;
  state.uc_link = nullptr;
  makecontext(&state, entry, 0);
#else
  // As if `entry` had been called: its return address, at which the stack is 8 bytes off a multiple of 16, then the
  // address that conv1x1_switch_stack returns to, then its six registers.
  uintptr_t* top = reinterpret_cast<uintptr_t*>(stack + size - 16);
  *--top = 0;
  *--top = reinterpret_cast<uintptr_t>(entry);
  for (int i = 0; i < 6; ++i) *--top = 0;
  stack_pointer = top;
#endif
}

void switch_context(Context* from, Context* to) {
#if CONV1X1_EMULATOR_ASAN
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, to->stack, to->size);
#endif
#if CONV1X1_EMULATOR_PORTABLE
  swapcontext(&from->state, &to->state);
#else
  conv1x1_switch_stack(&from->stack_pointer, to->stack_pointer);
#endif
#if CONV1X1_EMULATOR_ASAN
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
}

void entered_from([[maybe_unused]] Context* from) {
#if CONV1X1_EMULATOR_ASAN
  const void* stack = nullptr;
  size_t size = 0;
  __sanitizer_finish_switch_fiber(nullptr, &stack, &size);
  from->stack = static_cast<unsigned char*>(const_cast<void*>(stack));
  from->size = size;
#endif
}

}  // namespace conv1x1::cuda::emulator
