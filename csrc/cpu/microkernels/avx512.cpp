// AVX-512 tiles of float32: 24 of the 32 registers accumulate, 3 hold B, 1 the broadcast A. Listed by dispatch.cpp.
#include "isa.h"

#if defined(__x86_64__)
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // the intrinsics' own undefined operands (GCC bug 105593)
#endif
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "../plan.h"

CONV1X1_TARGET_BEGIN("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,f16c")
namespace conv1x1 {
namespace {

#define CONV1X1_VECTOR_BYTES 64
// clang-format off: the includes build on each other
#include "convert.inc"
#include "avx512_float32.inc"
#include "packing.inc"
#include "activations.inc"
// clang-format on

// clang-format off: the includes build on each other
#include "tile_epilogue.inc"
#include "tile.inc"
// clang-format on

// A in panels of float32, B in place in float16, converted as it is loaded: no panel of B is written and read again.
struct Avx512Float16B : Plain<Avx512Float32> {
  using PB = uint16_t;
  static Op load_op(const PB* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static Op load_op(const PB* p, Mask m) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(m, p)); }
};

}  // namespace

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
