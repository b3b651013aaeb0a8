// Switching stacks: a context is a stack and where on it execution stopped. Assembly on x86-64, ucontext elsewhere or
// with CONV1X1_EMULATOR_UCONTEXT. AddressSanitizer is told of every switch.
#pragma once

#include <cstddef>

#if !defined(__x86_64__) || defined(CONV1X1_EMULATOR_UCONTEXT)
#define CONV1X1_EMULATOR_PORTABLE 1
#include <ucontext.h>
#else
#define CONV1X1_EMULATOR_PORTABLE 0
#endif

#if defined(__SANITIZE_ADDRESS__)
#define CONV1X1_EMULATOR_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define CONV1X1_EMULATOR_ASAN 1
#endif
#endif
#ifndef CONV1X1_EMULATOR_ASAN
#define CONV1X1_EMULATOR_ASAN 0
#endif
#if CONV1X1_EMULATOR_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace conv1x1::cuda::emulator {

// An OS thread's own stack, or a fiber's. `entry` must never return.
struct Context {
  unsigned char* stack = nullptr;  // lowest address
  size_t size = 0;
#if CONV1X1_EMULATOR_PORTABLE
  ucontext_t state;
#else
  void* stack_pointer = nullptr;
#endif

  void start_at(void (*entry)());
};

// Stops `from` and continues `to`; returns when something continues `from`.
void switch_context(Context* from, Context* to);
// The first thing a new fiber does: `from` is who was stopped for it.
void entered_from(Context* from);

}  // namespace conv1x1::cuda::emulator
