// Overloads of convert.h's load_line and store_line, for conversions that an instruction set has instructions for and
// that compilers do not find in a loop.
#pragma once

#include "convert.h"

#if defined(CONV1X1_HAS_AVX512)
#include "avx512_float32.h"
#elif defined(CONV1X1_HAS_F16C)
#include "f16c_line.h"
#endif
#if defined(CONV1X1_HAS_AVX512_BF16)
#include "bfloat16_line.h"
#endif
