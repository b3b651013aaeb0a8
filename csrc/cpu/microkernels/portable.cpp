// Tiles in GCC/Clang vector extensions: any CPU these compilers know, SSE2 on a plain x86-64. Listed by dispatch.cpp.
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "../plan.h"
#include "isa.h"

namespace conv1x1 {
namespace {

#define CONV1X1_VECTOR_BYTES 16
// clang-format off: the includes build on each other
#include "convert.inc"
#include "packing.inc"
#include "activations.inc"
// clang-format on

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

// clang-format off: the includes build on each other
#include "tile_epilogue.inc"
#include "tile.inc"
// clang-format on

}  // namespace

Microkernel make_portable_float32() {
  return make_microkernel<PortableVector<float, 4>, 4, 2>("float32_4x8_portable", "scalar", DType::kFloat32);
}
Microkernel make_portable_float64() {
  return make_microkernel<PortableVector<double, 2>, 4, 2>("float64_4x4_portable", "scalar", DType::kFloat64);
}

}  // namespace conv1x1
