// AVX2, FMA and F16C, for what follows in this file; see isa.h.
#pragma once

#include <immintrin.h>

#if !defined(CONV1X1_ISA)
#define CONV1X1_ISA avx2
#define CONV1X1_TARGET "avx2,fma,f16c"
#define CONV1X1_VECTOR_BYTES 32
#define CONV1X1_HAS_F16C
#endif

#include "isa.h"
