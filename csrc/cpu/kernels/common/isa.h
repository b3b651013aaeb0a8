// Compiles a part of a file for one instruction set, whatever the compiler's flags. Every kernel header stands between
// CONV1X1_KERNELS_BEGIN and CONV1X1_KERNELS_END, in a namespace named for the instruction set. A .cpp includes the
// isa_*.h of its own instruction set before any other header. A kernel header that needs more than the portable set
// includes the isa_*.h of the least set that it needs, so that an editor or a checker can read it alone.
//
// The names are internal to their file as well (namespace {}): per-file -m flags, or external names, would let the
// linker keep, say, an AVX-512 copy of a shared inline function and run it on an older CPU.
#pragma once

#define CONV1X1_PRAGMA(x) _Pragma(#x)

#if !defined(CONV1X1_ISA)
#define CONV1X1_ISA portable
#define CONV1X1_VECTOR_BYTES 16  // of the vectors that loops are written in
#define CONV1X1_TARGET_BEGIN
#define CONV1X1_TARGET_END
#elif defined(__clang__)
#define CONV1X1_TARGET_OF(isa) CONV1X1_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define CONV1X1_TARGET_BEGIN CONV1X1_TARGET_OF(CONV1X1_TARGET)
#define CONV1X1_TARGET_END CONV1X1_PRAGMA(clang attribute pop)
#else
#define CONV1X1_TARGET_OF(isa) CONV1X1_PRAGMA(GCC push_options) CONV1X1_PRAGMA(GCC target(isa))
#define CONV1X1_TARGET_BEGIN CONV1X1_TARGET_OF(CONV1X1_TARGET)
#define CONV1X1_TARGET_END CONV1X1_PRAGMA(GCC pop_options)
#endif

#define CONV1X1_KERNELS_BEGIN \
  CONV1X1_TARGET_BEGIN        \
  namespace conv1x1 {         \
  namespace CONV1X1_ISA {     \
  namespace {
#define CONV1X1_KERNELS_END \
  }                         \
  }                         \
  }                         \
  CONV1X1_TARGET_END

#define CONV1X1_INLINE __attribute__((always_inline))

// One function for all callers: the compiler neither inlines it nor copies it for constant arguments.
#if defined(__clang__)
#define CONV1X1_NOINLINE __attribute__((noinline))
#else
#define CONV1X1_NOINLINE __attribute__((noinline, noclone))
#endif

// Stands before a loop whose count is constant. The loop is unrolled completely, so that an array that it indexes can
// live in registers.
#if defined(__clang__)
#define CONV1X1_UNROLL CONV1X1_PRAGMA(clang loop unroll(full))
#else
#define CONV1X1_UNROLL CONV1X1_PRAGMA(GCC unroll 32)
#endif
