// AVX-512 with AVX512-BF16, for what follows in this file; see isa.h.
#pragma once

#include <immintrin.h>

#if !defined(CONV1X1_ISA)
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // the intrinsics' own undefined operands (GCC bug 105593)
#endif
#define CONV1X1_ISA avx512_bf16
#define CONV1X1_TARGET "avx512bf16,avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,f16c"
#define CONV1X1_VECTOR_BYTES 64
#define CONV1X1_HAS_AVX512
#define CONV1X1_HAS_AVX512_BF16
#endif

#include "isa.h"
