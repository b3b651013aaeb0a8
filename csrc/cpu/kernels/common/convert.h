// Half types in memory: what their bits mean, and lines of them from and to the accumulators' type. Plain loops for the
// compiler to vectorise; lines.h has those for which an instruction set has instructions of its own.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../microkernel.h"
#include "isa.h"

CONV1X1_KERNELS_BEGIN

template <class To, class From>
inline To bit_cast(From x) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To y;
  __builtin_memcpy(&y, &x, sizeof y);
  return y;
}

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline float load_as(float x, float) { return x; }
inline double load_as(double x, double) { return x; }
inline float load_as(BFloat16 x, float) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
inline float load_as(Float16 x, float) {
  // Shift the exponent and mantissa into place; a multiplication by 2^112 then fixes the exponent's bias, and makes
  // normal numbers of denormal ones. Infinities and NaNs get the largest exponent back.
  const uint32_t h = x.bits, sign = (h & 0x8000u) << 16, magnitude = (h & 0x7fffu) << 13;
  const float scaled = bit_cast<float>(magnitude) * 0x1p112f;
  const uint32_t finite = bit_cast<uint32_t>(scaled), special = magnitude | 0x7f800000u;
  return bit_cast<float>(sign | (magnitude >= 0x0f800000u ? special : finite));
}

inline void store_as(float* p, float x) { *p = x; }
inline void store_as(double* p, double x) { *p = x; }
inline void store_as(BFloat16* p, float x) {
  const uint32_t u = bit_cast<uint32_t>(x), rounded = u + 0x7fffu + ((u >> 16) & 1u);
  p->bits = static_cast<uint16_t>((x != x ? u | 0x00400000u : rounded) >> 16);
}
inline void store_as(Float16* p, float x) {
  const uint32_t u = bit_cast<uint32_t>(x), sign = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
  // Normal results: round the mantissa to 10 bits in integers. Denormal ones: let a float addition round at 2^-24.
  const uint32_t normal = (a - 0x38000000u + 0xfffu + ((a >> 13) & 1u)) >> 13;
  const uint32_t denormal = bit_cast<uint32_t>(bit_cast<float>(a) + 0.5f) - 0x3f000000u;
  const uint32_t large = a > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t h = a >= 0x477ff000u ? large : (a < 0x38800000u ? denormal : normal);
  p->bits = static_cast<uint16_t>(sign | h);
}

inline BFloat16 load_as(BFloat16 x, BFloat16) { return x; }  // panels of bfloat16

// Vectors in the compiler's notation have the length of the instruction set's own (CONV1X1_VECTOR_BYTES). Longer ones
// are no faster, and their comparisons are made one element at a time: g++ 12 makes 16 scalar comparisons of 16 floats
// for AVX2, but 2 vector comparisons of 2 times 8.

// Calls f(offset, lanes) for the pieces of a line of n elements of S. A piece is a whole vector (16 elements at most),
// then half as many elements, down to 4, then single elements. Packing works on lines of 8 to 48 elements, for which
// the loops that compilers make are mostly prologue and calls of memcpy. The last piece may begin within the piece
// before it, so f must not read what it writes.
template <class S, int PIECE = 16, class F>
__attribute__((always_inline)) inline void by_lanes(int64_t n, const F& f) {
  constexpr int kVector = CONV1X1_VECTOR_BYTES / sizeof(S);
  if constexpr (PIECE > kVector && PIECE > 4) {
    by_lanes<S, PIECE / 2>(n, f);
  } else {
    const std::integral_constant<int, PIECE> lanes;
    int64_t j = 0;
    for (; j + PIECE <= n; j += PIECE) f(j, lanes);
    if (j == n) return;
    if (n > PIECE) return f(n - PIECE, lanes);
    if constexpr (PIECE > 4)
      by_lanes<S, PIECE / 2>(n, f);
    else
      for (; j < n; ++j) f(j, std::integral_constant<int, 1>());
  }
}

template <class T, int N>
struct VectorOf {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
};

template <class S, int N>
using Lanes = typename VectorOf<typename std::conditional<sizeof(S) == 2, uint16_t, S>::type, N>::type;

template <class V>
__attribute__((always_inline)) inline void load_lanes(V& x, const void* p) {
  __builtin_memcpy(&x, p, sizeof x);
}

// d[j] = s[j], converting.
template <class T, class S>
inline void load_line(T* d, const S* s, int64_t n) {
  if constexpr (std::is_same<T, S>::value) {
    by_lanes<S>(n, [=](int64_t j, auto lanes) {
      Lanes<S, lanes> x;
      load_lanes(x, s + j);
      __builtin_memcpy(d + j, &x, sizeof x);
    });
  } else {
    for (int64_t j = 0; j < n; ++j) d[j] = load_as(s[j], T());
  }
}

template <class S, class T>
inline void store_line(S* d, const T* s, int64_t n) {
  for (int64_t j = 0; j < n; ++j) store_as(d + j, s[j]);
}

// Sets x to 0 where the saved output y holds the gradient back: where y <= 0 and, for ReLU6, where y >= 6. A NaN in y
// passes the gradient. Half types are compared as the integers that their bits are: the numbers above zero and the
// positive NaNs are one range of bits, the negative NaNs are another range.
template <Mask M, class S, class V>
__attribute__((always_inline)) inline void drop_blocked(V& x, const V& y) {
  const V zero = {};
  if constexpr (sizeof(S) == 2) {
    constexpr bool bfloat = std::is_same<S, BFloat16>::value;
    constexpr uint16_t six = bfloat ? 0x40c0 : 0x4600, infinity = bfloat ? 0x7f80 : 0x7c00;
    x &= ~(V)((y - uint16_t(1) >= zero + uint16_t(0x7fff)) & (y <= zero + uint16_t(0x8000 | infinity)));
    if (M == Mask::kReLU6) x &= ~(V)(y - six <= zero + uint16_t(infinity - six));
  } else {
    x = y <= zero ? zero : x;
    if (M == Mask::kReLU6) x = y >= zero + S(6) ? zero : x;
  }
}

// x = s[0 .. N), zero where the mask of aux holds the gradient back.
template <Mask M, class S, class V>
__attribute__((always_inline)) inline void load_masked(V& x, const S* s, const S* aux) {
  load_lanes(x, s);
  if constexpr (M != Mask::kNone) {
    V y;
    load_lanes(y, aux);
    drop_blocked<M, S>(x, y);
  }
}

// d[j] = s[j] under the mask of x.
template <Mask M, class S>
inline void mask_line(S* d, const S* s, const S* x, int64_t n) {
  by_lanes<S>(n, [=](int64_t j, auto lanes) {
    Lanes<S, lanes> v;
    load_masked<M>(v, s + j, x + j);
    __builtin_memcpy(d + j, &v, sizeof v);
  });
}

CONV1X1_KERNELS_END
