// SiLU, Hardswish and GELU on a finished tile. float32: branch-free polynomials that the compiler vectorises for the
// including file's ISA; float64: the C library. ReLU and ReLU6 live in the tile's epilogue.
//
// Coefficients: weighted least-squares (Lawson) minimax fits, relative error 2e-9 for exp on [-ln2/2, ln2/2], 2e-8 for
// erf below 15/16, and absolute error 2e-9 for erf = 1 - exp(P(x)) above.
#pragma once

#include <cmath>

#include "convert.h"

CONV1X1_KERNELS_BEGIN

inline float exp_of(float x) {
  x = x > 89.0f ? 89.0f : x;  // exp(89) overflows to infinity, exp(-104) is zero
  x = x < -104.0f ? -104.0f : x;
  const float magic = 0x1.8p23f;  // adding it rounds to the nearest integer and leaves that in the low bits
  const float shifted = x * 1.44269504f + magic, n = shifted - magic;
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 0.0013836846f;
  p = p * r + 0.0083748158f;
  p = p * r + 0.041668225f;
  p = p * r + 0.1666642f;
  p = p * r + 0.4999999f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  // 2^n in two factors, so that the ends of the range neither overflow early nor lose denormals.
  const int32_t i = bit_cast<int32_t>(shifted) - 0x4b400000, half = i >> 1;
  return p * bit_cast<float>((half + 127) << 23) * bit_cast<float>((i - half + 127) << 23);
}

inline float erf_of(float x) {
  const float s = x * x;
  float near = -0.00059194188f;
  near = near * s + 0.0049791303f;
  near = near * s + -0.026757035f;
  near = near * s + 0.11281552f;
  near = near * s + -0.37612468f;
  near = (near * s + 0.12837911f) * x + x;
  float a = x < 0 ? -x : x;
  a = a > 4.0f ? 4.0f : a;
  float far = 0.00019295006f;
  far = far * a + -0.003013943f;
  far = far * a + 0.022110354f;
  far = far * a + -0.10369007f;
  far = far * a + -0.63745707f;
  far = far * a + -1.1275126f;
  far = far * a + -0.00023507643f;
  far = 1.0f - exp_of(far);
  return a < 0.9375f ? near : (x < 0 ? -far : far);
}

inline double exp_of(double x) { return std::exp(x); }
inline double erf_of(double x) { return std::erf(x); }

template <class T>
void activate_tile(void* tile, int64_t ld, int64_t m, int64_t n, Activation activation) {
  for (int64_t i = 0; i < m; ++i) {
    T* row = static_cast<T*>(tile) + i * ld;
    switch (activation) {
      case Activation::kSiLU:
        for (int64_t j = 0; j < n; ++j) row[j] = row[j] / (T(1) + exp_of(-row[j]));
        break;
      case Activation::kHardswish:
        for (int64_t j = 0; j < n; ++j) {
          const T x = row[j], up = x + T(3), low = up < T(0) ? T(0) : up, clipped = low > T(6) ? T(6) : low;
          row[j] = x * clipped / T(6);
        }
        break;
      case Activation::kGELU:
        for (int64_t j = 0; j < n; ++j) row[j] = T(0.5) * row[j] * (T(1) + erf_of(row[j] * T(0.70710678118654752440)));
        break;
      default: break;  // done in the epilogue
    }
  }
}

CONV1X1_KERNELS_END
