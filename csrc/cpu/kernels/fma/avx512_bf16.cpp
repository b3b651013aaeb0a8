// AVX512-BF16 tiles: pairs of bfloat16 multiplied and added to float32 accumulators, two k a step (vdpbf16ps).
// Registers are used as in avx512.cpp. The instruction takes denormal operands and sums for zero and rounds after each
// of its two additions. The conversion of the result takes denormals for zero as well. Listed by dispatch.cpp.
#if defined(__x86_64__)
#include "../common/isa_avx512_bf16.h"

#include "../common/pairs.h"
#include "tile.h"

CONV1X1_KERNELS_BEGIN

struct Avx512BFloat16 : Avx512Float32 {
  static constexpr int kKr = 2;
  static constexpr bool kStoresHalfInRegisters = true;        // nearly every tile is stored as bfloat16
  typedef uint32_t P __attribute__((aligned(2), may_alias));  // two bfloat16, in place or in a panel
  using PB = P;
  using Op = __m512i;
  static Op broadcast(const P* p) { return _mm512_set1_epi32(static_cast<int>(*p)); }
  static Op load_op(const P* p) { return _mm512_loadu_si512(p); }
  static Op load_op(const P* p, Mask m) { return _mm512_maskz_loadu_epi32(m, p); }
  static Reg multiply_add(Op a, Op b, Reg c) { return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b); }
  static __m256i half_of(Reg x, bool) { return nearest_bfloat16(x); }
};

CONV1X1_KERNELS_END

CONV1X1_TARGET_BEGIN
namespace conv1x1 {

using namespace CONV1X1_ISA;

Microkernel make_avx512_bf16_bfloat16() {
  Microkernel kernel =
      make_tiles<Avx512BFloat16, 8, 3>("bfloat16_8x48_avx512_bf16", "avx512_bf16", DType::kFloat32, DType::kBFloat16);
  fill_pairs(kernel);
  return kernel;
}
Microkernel make_avx512_bf16_bfloat16_wide() {
  Microkernel kernel =
      make_tiles<Avx512BFloat16, 6, 4>("bfloat16_6x64_avx512_bf16", "avx512_bf16", DType::kFloat32, DType::kBFloat16);
  fill_pairs(kernel);
  return kernel;
}
Microkernel make_avx512_bf16_bfloat16_narrow() {
  Microkernel kernel = make_tiles<Avx512BFloat16, 16, 1, true>("bfloat16_16x16_avx512_bf16", "avx512_bf16",
                                                               DType::kFloat32, DType::kBFloat16);
  fill_pairs(kernel);
  return kernel;
}

}  // namespace conv1x1
CONV1X1_TARGET_END
#endif
