// AVX2 + FMA tiles: 12 of the 16 registers accumulate, 2 hold B, 1 the broadcast A. Listed by dispatch.cpp.
#include "isa.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "../plan.h"

CONV1X1_TARGET_BEGIN("avx2,fma,f16c")
namespace conv1x1 {
namespace {

#define CONV1X1_VECTOR_BYTES 32
#include "convert.inc"
// float16 by the instructions for it, which compilers do not find in a loop.
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

// clang-format off: the includes build on each other
#include "packing.inc"
#include "activations.inc"
// clang-format on

// Masks for the first n lanes, read from the middle of -1 .. -1 0 .. 0.
alignas(32) const int32_t kLanes32[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};
alignas(32) const int64_t kLanes64[8] = {-1, -1, -1, -1, 0, 0, 0, 0};

struct Avx2Float32 {
  using T = float;
  using Reg = __m256;
  struct Mask {
    __m256i lanes;
    bool full;
  };
  static constexpr int kWidth = 8;
  static Mask first(int64_t n) {
    const int64_t lanes = n < 8 ? n : 8;
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(kLanes32 + 8 - lanes)), n >= 8};
  }
  static Reg zero() { return _mm256_setzero_ps(); }
  static Reg set1(T x) { return _mm256_set1_ps(x); }
  static Reg load(const T* p) { return _mm256_loadu_ps(p); }
  // A masked load takes a turn of the multipliers' pipes from them on some AMD cores.
  static Reg load(const T* p, Mask m) { return m.full ? load(p) : _mm256_maskload_ps(p, m.lanes); }
  static void store(T* p, Reg x) { _mm256_storeu_ps(p, x); }
  static void stream(T* p, Reg x) { _mm256_stream_ps(p, x); }
  static void store(T* p, Reg x, Mask m) {
    if (m.full)  // a masked store is microcoded on some AMD cores
      store(p, x);
    else
      _mm256_maskstore_ps(p, m.lanes, x);
  }
  static Reg add(Reg a, Reg b) { return _mm256_add_ps(a, b); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }
  static Reg max(Reg limit, Reg x) { return _mm256_max_ps(limit, x); }  // returns x where either is NaN
  static Reg min(Reg limit, Reg x) { return _mm256_min_ps(limit, x); }
  static constexpr bool kStoresHalf = false, kStoresHalfInRegisters = false, kSplits = false;
};

struct Avx2Float64 {
  using T = double;
  using Reg = __m256d;
  struct Mask {
    __m256i lanes;
    bool full;
  };
  static constexpr int kWidth = 4;
  static Mask first(int64_t n) {
    const int64_t lanes = n < 4 ? n : 4;
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(kLanes64 + 4 - lanes)), n >= 4};
  }
  static Reg zero() { return _mm256_setzero_pd(); }
  static Reg set1(T x) { return _mm256_set1_pd(x); }
  static Reg load(const T* p) { return _mm256_loadu_pd(p); }
  static Reg load(const T* p, Mask m) { return m.full ? load(p) : _mm256_maskload_pd(p, m.lanes); }
  static void store(T* p, Reg x) { _mm256_storeu_pd(p, x); }
  static void stream(T* p, Reg x) { _mm256_stream_pd(p, x); }
  static void store(T* p, Reg x, Mask m) {
    if (m.full)
      store(p, x);
    else
      _mm256_maskstore_pd(p, m.lanes, x);
  }
  static Reg add(Reg a, Reg b) { return _mm256_add_pd(a, b); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_pd(a, b, c); }
  static Reg max(Reg limit, Reg x) { return _mm256_max_pd(limit, x); }
  static Reg min(Reg limit, Reg x) { return _mm256_min_pd(limit, x); }
  static constexpr bool kStoresHalf = false, kStoresHalfInRegisters = false, kSplits = false;
};

// clang-format off: the includes build on each other
#include "tile_epilogue.inc"
#include "tile.inc"
// clang-format on

}  // namespace

Microkernel make_avx2_float32() {
  return make_microkernel<Avx2Float32, 6, 2>("float32_6x16_avx2", "avx2", DType::kFloat32);
}
Microkernel make_avx2_float64() {
  return make_microkernel<Avx2Float64, 6, 2>("float64_6x8_avx2", "avx2", DType::kFloat64);
}

}  // namespace conv1x1
CONV1X1_TARGET_END
#endif
