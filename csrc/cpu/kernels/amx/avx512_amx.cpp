// The microkernels for AMX. One instruction multiplies and adds 16 x 16 x 32 bfloat16, in pairs along k. float32 and
// float16 are multiplied as sums of bfloat16. Packing, epilogue and conversions use AVX-512 and AVX512-BF16, which
// every CPU with AMX has. Listed by dispatch.cpp.
#if defined(__x86_64__)
#include "../common/isa_avx512_amx.h"

#include "../common/activations.h"
#include "tile.h"

CONV1X1_KERNELS_BEGIN

struct AmxFloat32 : Avx512Float32 {
  // Denormal results of bfloat16 become zero, as with AVX512-BF16.
  static __m256i half_of(Reg x, bool bfloat) {
    return bfloat ? nearest_bfloat16(x) : _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
  }
  // Stores two neighbouring vectors as bfloat16. Together they are 64 bytes, a whole line if the address is aligned.
  using Lanes32 = __mmask32;
  static Lanes32 first_half(int64_t n) { return n >= 32 ? ~Lanes32{0} : (Lanes32{1} << n) - 1; }
  static void store_halves(uint16_t* p, Reg low, Reg high, Lanes32 lanes, bool stream) {
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(high, low);
    if (stream)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(p), both);
    else
      _mm512_mask_storeu_epi16(p, lanes, both);
  }
};

template <int PARTS>
constexpr AmxKernel make_amx() {
  AmxKernel amx{};
  fill_tiled<AmxFloat32, PARTS, AccessA::kRows>(amx);
  fill_tiled<AmxFloat32, PARTS, AccessA::kCols>(amx);
  amx.products = kProducts<PARTS>;
  amx.enter = configure_tiles;
  amx.leave = release_tiles;
  amx.finish_pending = finish_pending<AmxFloat32>;
  return amx;
}

Microkernel make_tiled(const char* name, int parts, const AmxKernel& amx) {
  Microkernel kernel{};
  kernel.name = name;
  kernel.isa = "avx512_amx";
  kernel.dtype = DType::kFloat32;
  kernel.operand = kernel.b_in_place = DType::kBFloat16;
  kernel.kr = 2;
  kernel.parts = parts;
  kernel.mr = kTiledMr;
  kernel.nr = kTiledNr;
  kernel.vector = kernel.ks = kernel.m_unit = kTile;
  kernel.stores_half = true;
  kernel.splits = true;
  kernel.amx = &amx;
  kernel.activate = activate_tile<float>;
  return kernel;
}

template <int PARTS, class S>
constexpr AmxKernel make_amx_in_parts() {
  AmxKernel amx = make_amx<PARTS>();
  fill_packing_ahead<PARTS, S>(amx);
  fill_splits<PARTS, S>(amx);
  return amx;
}

// A kernel for a dtype whose numbers are sums of several bfloat16.
template <int PARTS, class S>
Microkernel make_in_parts(const char* name, DType storage) {
  static constexpr AmxKernel amx = make_amx_in_parts<PARTS, S>();
  Microkernel kernel = make_tiled(name, PARTS, amx);
  fill_parts<PARTS, S>(kernel, storage);
  return kernel;
}

CONV1X1_KERNELS_END

CONV1X1_TARGET_BEGIN
namespace conv1x1 {

using namespace CONV1X1_ISA;

Microkernel make_avx512_amx_bfloat16() {
  static constexpr AmxKernel amx = make_amx<1>();
  Microkernel kernel = make_tiled("bfloat16_32x32_avx512_amx", 1, amx);
  fill_pairs(kernel);
  const int storage = static_cast<int>(DType::kBFloat16);
  kernel.pack_a[static_cast<int>(AccessA::kCols)][storage] = pack_tiled_a;
  kernel.pack_b[storage] = pack_tiled_b;
  kernel.pack_rows[storage] = pack_tiled_rows;  // for B; panels of A are packed one tile at a time
  kernel.sum_rows = sum_tiled_rows;
  return kernel;
}
Microkernel make_avx512_amx_float32() { return make_in_parts<3, float>("float32_32x32_avx512_amx", DType::kFloat32); }
Microkernel make_avx512_amx_float16() { return make_in_parts<2, Float16>("float16_32x32_avx512_amx", DType::kFloat16); }

}  // namespace conv1x1
CONV1X1_TARGET_END
#endif
