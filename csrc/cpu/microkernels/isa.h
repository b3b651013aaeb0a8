// Compile part of a file for one instruction set, whatever the compiler's flags. Used after every #include, around
// code that sits in an anonymous namespace: per-file -m flags would let the linker keep, say, an AVX-512 copy of a
// shared inline function and run it on an older CPU.
#pragma once

#define CONV1X1_INLINE __attribute__((always_inline))

// One function for all callers: neither inlined nor copied for constant arguments.
#if defined(__clang__)
#define CONV1X1_NOINLINE __attribute__((noinline))
#else
#define CONV1X1_NOINLINE __attribute__((noinline, noclone))
#endif

#define CONV1X1_PRAGMA(x) _Pragma(#x)
// Before a loop whose count is constant: unrolled whole, so that an array it indexes can live in registers.
#if defined(__clang__)
#define CONV1X1_UNROLL CONV1X1_PRAGMA(clang loop unroll(full))
#else
#define CONV1X1_UNROLL CONV1X1_PRAGMA(GCC unroll 32)
#endif

#if defined(__clang__)
#define CONV1X1_TARGET_BEGIN(isa) \
  CONV1X1_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define CONV1X1_TARGET_END CONV1X1_PRAGMA(clang attribute pop)
#else
#define CONV1X1_TARGET_BEGIN(isa) CONV1X1_PRAGMA(GCC push_options) CONV1X1_PRAGMA(GCC target(isa))
#define CONV1X1_TARGET_END CONV1X1_PRAGMA(GCC pop_options)
#endif
