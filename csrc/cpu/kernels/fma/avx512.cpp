// AVX-512 tiles of float32: 24 of the 32 registers accumulate, 3 hold B, 1 the broadcast A. Listed by dispatch.cpp.
#if defined(__x86_64__)
#include "../common/isa_avx512.h"

#include "../common/avx512_float32.h"
#include "tile.h"

CONV1X1_KERNELS_BEGIN

// A in panels of float32, B in place in float16 and converted as it is loaded, so that no panel of B is written and
// read again.
struct Avx512Float16B : Plain<Avx512Float32> {
  using PB = uint16_t;
  static Op load_op(const PB* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static Op load_op(const PB* p, Mask m) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(m, p)); }
};

CONV1X1_KERNELS_END

CONV1X1_TARGET_BEGIN
namespace conv1x1 {

using namespace CONV1X1_ISA;

Microkernel make_avx512_float32() {
  return make_microkernel<Avx512Float32, 8, 3>("float32_8x48_avx512", "avx512", DType::kFloat32);
}
Microkernel make_avx512_float32_wide() {
  return make_microkernel<Avx512Float32, 6, 4>("float32_6x64_avx512", "avx512", DType::kFloat32);
}
Microkernel make_avx512_float32_narrow() {
  return make_microkernel<Avx512Float32, 16, 1, true>("float32_16x16_avx512", "avx512", DType::kFloat32);
}
Microkernel make_avx512_float32_tall() {
  return make_microkernel<Avx512Float32, 14, 2, true>("float32_14x32_avx512", "avx512", DType::kFloat32);
}
Microkernel make_avx512_float32_float16_b() {
  Microkernel kernel =
      make_tiles<Avx512Float16B, 8, 3>("float32xfloat16_8x48_avx512", "avx512", DType::kFloat32, DType::kFloat32);
  fill_packing(kernel, static_cast<float*>(nullptr));
  kernel.b_in_place = DType::kFloat16;
  return kernel;
}

}  // namespace conv1x1
CONV1X1_TARGET_END
#endif
