// float32 in AVX-512, for every set of microkernels that accumulates in it: its vector type (tile.h), and lines of
// float16.
#pragma once

#include "isa_avx512.h"  // first

#include "convert.h"

CONV1X1_KERNELS_BEGIN

// Converts float16 by its instructions, which compilers do not use for such a loop by themselves.
inline void load_line(float* d, const Float16* s, int64_t n) {
  for (; n >= 16; n -= 16, d += 16, s += 16)
    _mm512_storeu_ps(d, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(s))));
  const __mmask16 m = static_cast<__mmask16>((1u << n) - 1);
  if (n > 0) _mm512_mask_storeu_ps(d, m, _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(m, s)));
}

inline void store_line(Float16* d, const float* s, int64_t n) {
  for (; n >= 16; n -= 16, d += 16, s += 16)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(d), _mm512_cvtps_ph(_mm512_loadu_ps(s), _MM_FROUND_TO_NEAREST_INT));
  const __mmask16 m = static_cast<__mmask16>((1u << n) - 1);
  if (n > 0) _mm256_mask_storeu_epi16(d, m, _mm512_cvtps_ph(_mm512_maskz_loadu_ps(m, s), _MM_FROUND_TO_NEAREST_INT));
}

// to[i * pitch + j] = row(j)[i], i, j < 16.
template <class Row>
CONV1X1_INLINE inline void transpose_square(float* to, int64_t pitch, const Row& row) {
  for (int64_t c = 0; c < 16; c += 4, to += 4 * pitch) {
    __m512 x[4];  // 128 bits each of rows q, q + 4, q + 8, q + 12
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
      x[q] = _mm512_broadcast_f32x4(_mm_loadu_ps(row(q) + c));
      x[q] = _mm512_mask_broadcast_f32x4(x[q], 0x00f0, _mm_loadu_ps(row(q + 4) + c));
      x[q] = _mm512_mask_broadcast_f32x4(x[q], 0x0f00, _mm_loadu_ps(row(q + 8) + c));
      x[q] = _mm512_mask_broadcast_f32x4(x[q], 0xf000, _mm_loadu_ps(row(q + 12) + c));
    }
    const __m512d low0 = _mm512_castps_pd(_mm512_unpacklo_ps(x[0], x[1])),
                  low1 = _mm512_castps_pd(_mm512_unpacklo_ps(x[2], x[3]));
    const __m512d high0 = _mm512_castps_pd(_mm512_unpackhi_ps(x[0], x[1])),
                  high1 = _mm512_castps_pd(_mm512_unpackhi_ps(x[2], x[3]));
    _mm512_storeu_ps(to, _mm512_castpd_ps(_mm512_unpacklo_pd(low0, low1)));
    _mm512_storeu_ps(to + pitch, _mm512_castpd_ps(_mm512_unpackhi_pd(low0, low1)));
    _mm512_storeu_ps(to + 2 * pitch, _mm512_castpd_ps(_mm512_unpacklo_pd(high0, high1)));
    _mm512_storeu_ps(to + 3 * pitch, _mm512_castpd_ps(_mm512_unpackhi_pd(high0, high1)));
  }
}

// Transposes a square of 16 x 16 for packing.h's transpose().
template <class T>
inline void transpose_square_of(T* dst, int64_t ld, const char* src, int64_t pitch) {
  transpose_square(reinterpret_cast<float*>(dst), ld,
                   [&](int64_t r) { return reinterpret_cast<const float*>(src + r * pitch); });
}

struct Avx512Float32 {
  using T = float;
  using Reg = __m512;
  using Mask = __mmask16;
  static constexpr int kWidth = 16;
  static Mask first(int64_t n) { return n >= 16 ? Mask(0xffff) : Mask((1u << n) - 1); }
  static Reg zero() { return _mm512_setzero_ps(); }
  static Reg set1(T x) { return _mm512_set1_ps(x); }
  static Reg load(const T* p) { return _mm512_loadu_ps(p); }
  static Reg load(const T* p, Mask m) { return _mm512_maskz_loadu_ps(m, p); }
  static void store(T* p, Reg x) { _mm512_storeu_ps(p, x); }
  static void stream(T* p, Reg x) { _mm512_stream_ps(p, x); }
  static void store(T* p, Reg x, Mask m) { _mm512_mask_storeu_ps(p, m, x); }
  static Reg add(Reg a, Reg b) { return _mm512_add_ps(a, b); }
  static constexpr bool kSplits = true;
  static Reg add(Reg a, Reg b, Mask m) { return _mm512_mask_add_ps(a, m, a, b); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }
  static Reg max(Reg limit, Reg x) { return _mm512_max_ps(limit, x); }  // returns x where either is NaN
  static Reg min(Reg limit, Reg x) { return _mm512_min_ps(limit, x); }
  static constexpr bool kStoresHalf = true, kStoresHalfInRegisters = false;
  static Reg load_half(const uint16_t* p, Mask m, bool bfloat) {
    const __m256i bits = _mm256_maskz_loadu_epi16(m, p);
    return bfloat ? _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16)) : _mm512_cvtph_ps(bits);
  }
  static __m256i half_of(Reg x, bool bfloat) {
    return bfloat ? bfloat16_of(x) : _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
  }
  static void store_half(uint16_t* p, __m256i x, Mask m) { _mm256_mask_storeu_epi16(p, m, x); }
  static void stream_half(uint16_t* p, __m256i x) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), x); }
  static __m256i bfloat16_of(Reg x) {  // rounds as store_as does
    const __m512i u = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    const __m512i quiet = _mm512_mask_or_epi32(rounded, nan, u, _mm512_set1_epi32(0x00400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(quiet, 16));
  }
};

CONV1X1_KERNELS_END
