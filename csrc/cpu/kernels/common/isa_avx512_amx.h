// AMX beside AVX-512 with AVX512-BF16, which every CPU with AMX has, for what follows in this file; see isa.h.
#pragma once

#include <immintrin.h>

#if !defined(CONV1X1_ISA)
#if defined(__clang__)  // its assembler takes only what the function's target has
#define CONV1X1_TARGET "amx-tile,amx-bf16,avx512bf16,avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,f16c"
#else
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // the intrinsics' own undefined operands (GCC bug 105593)
#define CONV1X1_TARGET "avx512bf16,avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,f16c"
#endif
#define CONV1X1_ISA avx512_amx
#define CONV1X1_VECTOR_BYTES 64
#define CONV1X1_HAS_AVX512
#define CONV1X1_HAS_AVX512_BF16
#endif

#include "isa.h"
