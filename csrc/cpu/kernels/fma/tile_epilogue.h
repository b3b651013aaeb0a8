// The epilogue of a tile whose sums lie in memory (in L1). tile.h does the plainest case in registers; this file does
// all others. There is one function for each vector type, for tiles of any size.
#pragma once

#include "../common/isa.h"
#include "../microkernel.h"

CONV1X1_KERNELS_BEGIN

// Bytes of an element of C.
template <class V>
int64_t out_size(const Epilogue* e) {
  return e && e->store != Store::kAsIs ? 2 : static_cast<int64_t>(sizeof(typename V::T));
}

// Is the tile stored in rows, without a residual, in a type that tile.h can store?
template <class V>
inline bool is_plain(const FmaTileArgs& t, const Epilogue& e) {
  return !e.residual && !t.splits && (e.store == Store::kAsIs || V::kStoresHalfInRegisters);
}

// Prefetches for writing the lines of C to which the next tile of the strip, of m rows, will be stored.
template <class V>
CONV1X1_NOINLINE void fetch_next_out(const FmaTileArgs& t, const char* out, int64_t m, int nv) {
  asm volatile("");  // a side effect: compilers drop calls of functions that do nothing but prefetch
  const int64_t size = out_size<V>(t.epilogue), row = t.n * size;
  for (int64_t i = m; i < 2 * m; ++i) {
    const char* next = out + i * t.ld_out * size;
    if (t.splits) {
      for (int j = 0; j < nv; ++j) {
        const Split& s = t.splits[j];
        __builtin_prefetch(next + s.at * size, 1);
        __builtin_prefetch(next + (s.then + V::kWidth - 1) * size, 1);
      }
      continue;
    }
    for (int64_t at = 0; at < row; at += 64) __builtin_prefetch(next + at, 1);
    __builtin_prefetch(next + row - 1, 1);
  }
}

// How a vector of C and of the residual is read and written: AsIs in the accumulators' type, AsHalf in a half type.
template <class V>
struct AsIs {
  using T = typename V::T;
  using Mask = typename V::Mask;
  using Reg = typename V::Reg;
  const T* residual;
  T* c;
  AsIs(const Epilogue& e, char* out) : residual(static_cast<const T*>(e.residual)), c(reinterpret_cast<T*>(out)) {}
  Reg load(int64_t at, Mask m) const { return V::load(residual + at, m); }
  void store(int64_t at, Reg x, Mask m) const { V::store(c + at, x, m); }
  void stream(int64_t at, Reg x) const { V::stream(c + at, x); }
};

template <class V>
struct AsHalf {
  using Mask = typename V::Mask;
  using Reg = typename V::Reg;
  const uint16_t* residual;
  uint16_t* c;
  bool bfloat;
  AsHalf(const Epilogue& e, char* out)
      : residual(static_cast<const uint16_t*>(e.residual)),
        c(reinterpret_cast<uint16_t*>(out)),
        bfloat(e.store == Store::kBFloat16) {}
  Reg load(int64_t at, Mask m) const { return V::load_half(residual + at, m, bfloat); }
  void store(int64_t at, Reg x, Mask m) const { V::store_half(c + at, V::half_of(x, bfloat), m); }
  void stream(int64_t at, Reg x) const { V::stream_half(c + at, V::half_of(x, bfloat)); }
};

// Finishes rows [0, m) of `sums`, each of nv vectors, and stores them to `out`. They are rows [first, first + m) of the
// strip.
template <class V, class C>
void finish_rows_of(const FmaTileArgs& t, const Epilogue& e, const typename V::T* sums, char* out, int64_t first,
                    int64_t m, int nv) {
  using T = typename V::T;
  using Reg = typename V::Reg;
  using Mask = typename V::Mask;
  constexpr int W = V::kWidth;
  const C c(e, out);
  const Reg lower = V::set1(static_cast<T>(e.lower)), upper = V::set1(static_cast<T>(e.upper));
  const T *bias_m = static_cast<const T*>(e.bias_m), *bias_n = static_cast<const T*>(e.bias_n);
  const bool has_residual = e.residual != nullptr;
  for (int j = 0; j < nv; ++j) {
    const Mask lanes = V::first(t.n - j * W);
    const Reg of_columns = bias_n ? V::load(bias_n + j * W, lanes) : V::zero();
    for (int64_t i = 0; i < m; ++i) {
      Reg x = V::load(sums + (i * nv + j) * W);
      if (bias_m) x = V::add(x, V::set1(bias_m[first + i]));
      if (bias_n) x = V::add(x, of_columns);
      const int64_t residual = (first + i) * e.ld_residual, to = i * t.ld_out;
      if constexpr (V::kSplits) {
        if (t.splits) {  // the columns lie in one or two runs
          const Split& s = t.splits[j];
          const Mask one = V::first(s.lanes) & lanes, two = static_cast<Mask>(lanes & ~one);
          if (has_residual) {
            x = V::add(x, c.load(residual + s.at, one), one);
            if (two) x = V::add(x, c.load(residual + s.then, two), two);
          }
          x = V::min(upper, V::max(lower, x));
          c.store(to + s.at, x, one);
          if (two) c.store(to + s.then, x, two);
          continue;
        }
      }
      if (has_residual) x = V::add(x, c.load(residual + j * W, lanes));
      x = V::min(upper, V::max(lower, x));
      if (e.stream)
        c.stream(to + j * W, x);
      else
        c.store(to + j * W, x, lanes);
    }
  }
}

template <class V>
CONV1X1_NOINLINE void finish_in_memory(const FmaTileArgs& t, const Epilogue& e, const typename V::T* sums, char* out,
                                       int64_t first, int64_t m, int nv) {
  if constexpr (V::kStoresHalf)
    if (e.store != Store::kAsIs) return finish_rows_of<V, AsHalf<V>>(t, e, sums, out, first, m, nv);
  finish_rows_of<V, AsIs<V>>(t, e, sums, out, first, m, nv);
}

CONV1X1_KERNELS_END
