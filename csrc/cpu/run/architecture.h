// What the code outside of kernels/ must know of the architecture: the floating-point environment, and the fence
// after streaming stores.
#pragma once

#if defined(__x86_64__)
#include <xmmintrin.h>
#elif defined(__aarch64__)
#include <cstdint>
#else
#include <cfenv>
#endif

namespace conv1x1 {

// The calling thread's rounding and treatment of denormals (torch.set_flush_denormal). <cfenv> also saves the
// exceptions' flags and x86's second unit: reading it once and writing it twice would take 190 ns instead of 9.
#if defined(__x86_64__)
using FloatingPointControl = unsigned;
inline FloatingPointControl floating_point_control() { return _mm_getcsr(); }
inline void set_floating_point_control(FloatingPointControl control) { _mm_setcsr(control); }
#elif defined(__aarch64__)
using FloatingPointControl = uint64_t;
inline FloatingPointControl floating_point_control() {
  FloatingPointControl control;
  asm volatile("mrs %0, fpcr" : "=r"(control) : : "memory");
  return control;
}
inline void set_floating_point_control(FloatingPointControl control) {
  asm volatile("msr fpcr, %0" : : "r"(control) : "memory");
}
#else
using FloatingPointControl = std::fenv_t;
inline FloatingPointControl floating_point_control() {
  FloatingPointControl control;
  std::fegetenv(&control);
  return control;
}
inline void set_floating_point_control(const FloatingPointControl& control) { std::fesetenv(&control); }
#endif

// Orders stores past the caches before later stores. Only kernels for x86 store past the caches.
inline void finish_streaming() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace conv1x1
