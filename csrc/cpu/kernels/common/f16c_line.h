// Converts lines of float16, eight elements at a time.
#pragma once

#include "isa_avx2.h"  // first

#include "convert.h"

CONV1X1_KERNELS_BEGIN

// Converts float16 by its instructions, which compilers do not use for a loop by themselves.
inline void load_line(float* d, const Float16* s, int64_t n) {
  int64_t j = 0;
  for (; j + 8 <= n; j += 8)
    _mm256_storeu_ps(d + j, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(s + j))));
  for (; j < n; ++j) d[j] = _cvtsh_ss(s[j].bits);
}

inline void store_line(Float16* d, const float* s, int64_t n) {
  int64_t j = 0;
  for (; j + 8 <= n; j += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(d + j),
                     _mm256_cvtps_ph(_mm256_loadu_ps(s + j), _MM_FROUND_TO_NEAREST_INT));
  for (; j < n; ++j) d[j].bits = _cvtss_sh(s[j], _MM_FROUND_TO_NEAREST_INT);
}

CONV1X1_KERNELS_END
