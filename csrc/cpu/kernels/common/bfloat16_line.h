// Converts lines of float32 to bfloat16 by the instruction that also converts a tile's results: denormal results are
// zero.
#pragma once

#include "isa_avx512_bf16.h"  // first

#include "convert.h"

CONV1X1_KERNELS_BEGIN

inline __m256i nearest_bfloat16(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

inline void store_line(BFloat16* d, const float* s, int64_t n) {
  for (; n >= 16; n -= 16, d += 16, s += 16)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(d), nearest_bfloat16(_mm512_loadu_ps(s)));
  const __mmask16 m = static_cast<__mmask16>((1u << n) - 1);
  if (n > 0) _mm256_mask_storeu_epi16(d, m, nearest_bfloat16(_mm512_maskz_loadu_ps(m, s)));
}

CONV1X1_KERNELS_END
