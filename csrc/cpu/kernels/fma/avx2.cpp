// AVX2 + FMA tiles: 12 of the 16 registers accumulate, 2 hold B, 1 the broadcast A. Listed by dispatch.cpp.
#if defined(__x86_64__)
#include "../common/isa_avx2.h"

#include "tile.h"

CONV1X1_KERNELS_BEGIN

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
  // On some AMD cores a masked load takes a turn of a pipe from the multipliers.
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

CONV1X1_KERNELS_END

CONV1X1_TARGET_BEGIN
namespace conv1x1 {

using namespace CONV1X1_ISA;

Microkernel make_avx2_float32() {
  return make_microkernel<Avx2Float32, 6, 2>("float32_6x16_avx2", "avx2", DType::kFloat32);
}
Microkernel make_avx2_float64() {
  return make_microkernel<Avx2Float64, 6, 2>("float64_6x8_avx2", "avx2", DType::kFloat64);
}

}  // namespace conv1x1
CONV1X1_TARGET_END
#endif
