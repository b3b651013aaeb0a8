// SiLU, Hardswish and GELU on a finished tile. float32: branch-free polynomials on whole vectors. float64: the C
// library. ReLU and ReLU6 live in the tile's epilogue.
//
// Coefficients: weighted least-squares (Lawson) minimax fits, relative error 2e-9 for exp on [-ln2/2, ln2/2], 2e-8 for
// erf below 15/16, and absolute error 2e-9 for erf = 1 - exp(P(x)) above.
#pragma once

#include <cmath>

#include "convert.h"

CONV1X1_KERNELS_BEGIN

// Vectors are written out: g++ 12 leaves the loop over single elements scalar for AVX2 and for SSE2, because of the
// choices and of the bits that it looks at.
constexpr int kFloatLanes = CONV1X1_VECTOR_BYTES / sizeof(float);
using Floats = VectorOf<float, kFloatLanes>::type;
using Ints = VectorOf<int32_t, kFloatLanes>::type;

CONV1X1_INLINE inline Floats exp_of(Floats x) {
  x = x > 89.0f ? Floats{} + 89.0f : x;  // exp(89) overflows to infinity, exp(-104) is zero
  x = x < -104.0f ? Floats{} - 104.0f : x;
  const float magic = 0x1.8p23f;  // adding it rounds to the nearest integer and leaves that in the low bits
  const Floats shifted = x * 1.44269504f + magic, n = shifted - magic;
  const Floats r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Floats p = r * 0.0013836846f + 0.0083748158f;
  p = p * r + 0.041668225f;
  p = p * r + 0.1666642f;
  p = p * r + 0.4999999f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  // 2^n in two factors, so that the ends of the range neither overflow early nor lose denormals.
  const Ints i = bit_cast<Ints>(shifted) - 0x4b400000, half = i >> 1;
  return p * bit_cast<Floats>((half + 127) << 23) * bit_cast<Floats>((i - half + 127) << 23);
}

CONV1X1_INLINE inline Floats erf_of(Floats x) {
  const Floats s = x * x;
  Floats near = s * -0.00059194188f + 0.0049791303f;
  near = near * s + -0.026757035f;
  near = near * s + 0.11281552f;
  near = near * s + -0.37612468f;
  near = (near * s + 0.12837911f) * x + x;
  Floats a = x < 0.0f ? -x : x;
  a = a > 4.0f ? Floats{} + 4.0f : a;
  Floats far = a * 0.00019295006f + -0.003013943f;
  far = far * a + 0.022110354f;
  far = far * a + -0.10369007f;
  far = far * a + -0.63745707f;
  far = far * a + -1.1275126f;
  far = far * a + -0.00023507643f;
  far = 1.0f - exp_of(far);
  const Floats with_sign = x < 0.0f ? -far : far;
  return a < 0.9375f ? near : with_sign;
}

inline double exp_of(double x) { return std::exp(x); }
inline double erf_of(double x) { return std::erf(x); }

template <class X>
CONV1X1_INLINE inline X silu_of(X x) {
  return x / (1.0f + exp_of(-x));
}
template <class X>
CONV1X1_INLINE inline X hardswish_of(X x) {
  const X up = x + 3.0f, low = up < 0.0f ? X{} : up, clipped = low > 6.0f ? X{} + 6.0f : low;
  return x * clipped / 6.0f;
}
template <class X>
CONV1X1_INLINE inline X gelu_of(X x) {
  if constexpr (sizeof(X) == sizeof(double) && !std::is_same<X, Floats>::value)
    return 0.5 * x * (1.0 + erf_of(x * 0.70710678118654752440));
  else
    return 0.5f * x * (1.0f + erf_of(x * static_cast<float>(0.70710678118654752440)));
}

// row[j] = f(row[j]), a vector at a time for float.
template <class F>
CONV1X1_INLINE inline void apply(float* row, int64_t n, const F& f) {
  for (; n > 0; row += kFloatLanes, n -= kFloatLanes) {
    Floats x = {};
    if (n >= kFloatLanes) {
      load_lanes(x, row);
      x = f(x);
      __builtin_memcpy(row, &x, sizeof x);
    } else {
      for (int64_t j = 0; j < n; ++j) x[j] = row[j];
      x = f(x);
      for (int64_t j = 0; j < n; ++j) row[j] = x[j];
    }
  }
}
template <class F>
CONV1X1_INLINE inline void apply(double* row, int64_t n, const F& f) {
  for (int64_t j = 0; j < n; ++j) row[j] = f(row[j]);
}

template <class T>
void activate_tile(void* tile, int64_t ld, int64_t m, int64_t n, Activation activation) {
  for (int64_t i = 0; i < m; ++i) {
    T* row = static_cast<T*>(tile) + i * ld;
    switch (activation) {
      case Activation::kSiLU: apply(row, n, [](auto x) CONV1X1_INLINE { return silu_of(x); }); break;
      case Activation::kHardswish: apply(row, n, [](auto x) CONV1X1_INLINE { return hardswish_of(x); }); break;
      case Activation::kGELU: apply(row, n, [](auto x) CONV1X1_INLINE { return gelu_of(x); }); break;
      default: break;  // done in the epilogue
    }
  }
}

CONV1X1_KERNELS_END
