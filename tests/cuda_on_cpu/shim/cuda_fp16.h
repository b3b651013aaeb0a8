// __half and its conversions for the CPU emulation, with the hardware's results: round to nearest even, subnormals
// kept, NaN becomes the canonical NaN. No arithmetic: the kernels compute in float32.
#pragma once

#include "cuda_runtime.h"

struct __half {
  unsigned short bits;
};

inline unsigned short __half_as_ushort(__half value) { return value.bits; }
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }

inline float __half2float(__half value) {
  const uint32_t sign = (value.bits & 0x8000u) << 16, rest = value.bits & 0x7fffu;
  if (rest > 0x7c00u) return __uint_as_float(0x7fffffffu);
  if (rest == 0x7c00u) return __uint_as_float(sign | 0x7f800000u);
  // The exponents differ by 112; the exact product makes subnormals normal as well.
  return __uint_as_float(sign | __float_as_uint(__uint_as_float(rest << 13) * 0x1p112f));
}

inline __half __float2half_rn(float value) {
  const uint32_t bits = __float_as_uint(value), magnitude = bits & 0x7fffffffu;
  const uint32_t sign = (bits >> 16) & 0x8000u;
  if (magnitude > 0x7f800000u) return {0x7fff};
  if (magnitude >= 0x477ff000u) return {static_cast<unsigned short>(sign | 0x7c00u)};  // 65520 and more round to inf
  // Subnormal: the unit is 2^-24, so the significand loses 126 - exponent bits; normal: it loses 13.
  const uint32_t exponent = magnitude >> 23;
  if (exponent < 102) return {static_cast<unsigned short>(sign)};  // below half the smallest subnormal
  const bool subnormal = exponent < 113;
  const uint32_t shift = subnormal ? 126 - exponent : 13;
  const uint32_t from = subnormal ? (magnitude & 0x7fffffu) | 0x800000u : magnitude - (112u << 23);
  const uint32_t rounded = (from + (1u << (shift - 1)) - 1 + ((from >> shift) & 1)) >> shift;
  return {static_cast<unsigned short>(sign | rounded)};
}
