// Tiles in GCC/Clang vector extensions: any CPU these compilers know, SSE2 on a plain x86-64. Listed by dispatch.cpp.
#include "tile.h"

CONV1X1_KERNELS_BEGIN

template <class Element, int WIDTH>
struct PortableVector {
  using T = Element;
  typedef T Reg __attribute__((vector_size(WIDTH * sizeof(T)), aligned(sizeof(T)), may_alias));
  using Mask = int64_t;
  static constexpr int kWidth = WIDTH;
  static Mask first(int64_t n) { return n < WIDTH ? n : WIDTH; }
  static Reg zero() { return Reg{}; }
  static Reg set1(T x) { return x - Reg{}; }
  static Reg load(const T* p) { return *reinterpret_cast<const Reg*>(p); }
  static Reg load(const T* p, Mask n) {
    if (n == WIDTH) return load(p);
    Reg r{};
    for (int64_t i = 0; i < n; ++i) r[i] = p[i];
    return r;
  }
  static void store(T* p, Reg x) { *reinterpret_cast<Reg*>(p) = x; }
  static void stream(T* p, Reg x) { store(p, x); }
  static void store(T* p, Reg x, Mask n) {
    if (n == WIDTH) return store(p, x);
    for (int64_t i = 0; i < n; ++i) p[i] = x[i];
  }
  static Reg add(Reg a, Reg b) { return a + b; }
  static Reg fma(Reg a, Reg b, Reg c) { return a * b + c; }
  static Reg max(Reg limit, Reg x) { return x < limit ? limit : x; }
  static Reg min(Reg limit, Reg x) { return x > limit ? limit : x; }
  static constexpr bool kStoresHalf = false, kStoresHalfInRegisters = false, kSplits = false;
};

CONV1X1_KERNELS_END

CONV1X1_TARGET_BEGIN
namespace conv1x1 {

using namespace CONV1X1_ISA;

Microkernel make_portable_float32() {
  return make_microkernel<PortableVector<float, 4>, 4, 2>("float32_4x8_portable", "scalar", DType::kFloat32);
}
Microkernel make_portable_float64() {
  return make_microkernel<PortableVector<double, 2>, 4, 2>("float64_4x4_portable", "scalar", DType::kFloat64);
}

}  // namespace conv1x1
CONV1X1_TARGET_END
