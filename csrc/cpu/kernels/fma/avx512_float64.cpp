// AVX-512 tiles of float64. Listed by dispatch.cpp.
#if defined(__x86_64__)
#include "../common/isa_avx512.h"

#include "tile.h"

CONV1X1_KERNELS_BEGIN

struct Avx512Float64 {
  using T = double;
  using Reg = __m512d;
  using Mask = __mmask8;
  static constexpr int kWidth = 8;
  static Mask first(int64_t n) { return n >= 8 ? Mask(0xff) : Mask((1u << n) - 1); }
  static Reg zero() { return _mm512_setzero_pd(); }
  static Reg set1(T x) { return _mm512_set1_pd(x); }
  static Reg load(const T* p) { return _mm512_loadu_pd(p); }
  static Reg load(const T* p, Mask m) { return _mm512_maskz_loadu_pd(m, p); }
  static void store(T* p, Reg x) { _mm512_storeu_pd(p, x); }
  static void stream(T* p, Reg x) { _mm512_stream_pd(p, x); }
  static void store(T* p, Reg x, Mask m) { _mm512_mask_storeu_pd(p, m, x); }
  static Reg add(Reg a, Reg b) { return _mm512_add_pd(a, b); }
  static constexpr bool kSplits = true;
  static Reg add(Reg a, Reg b, Mask m) { return _mm512_mask_add_pd(a, m, a, b); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_pd(a, b, c); }
  static Reg max(Reg limit, Reg x) { return _mm512_max_pd(limit, x); }
  static Reg min(Reg limit, Reg x) { return _mm512_min_pd(limit, x); }
  static constexpr bool kStoresHalf = false, kStoresHalfInRegisters = false;
};

CONV1X1_KERNELS_END

CONV1X1_TARGET_BEGIN
namespace conv1x1 {

using namespace CONV1X1_ISA;

Microkernel make_avx512_float64() {
  return make_microkernel<Avx512Float64, 8, 3>("float64_8x24_avx512", "avx512", DType::kFloat64);
}

}  // namespace conv1x1
CONV1X1_TARGET_END
#endif
