// Panels of bfloat16 in pairs along k, for multiply-adds that take two k at once. An element of a panel has k in its
// low half and k + 1 in its high half. An odd last k is paired with zero.
#pragma once

#include "packing.h"

CONV1X1_KERNELS_BEGIN

struct Pair {
  uint32_t bits;
};

template <class Lanes>
inline void add_parts(Lanes& sum, const Pair* p, int half) {
  typedef uint32_t Bits __attribute__((vector_size(sizeof(Lanes))));
  Bits x;
  __builtin_memcpy(&x, p, sizeof x);
  sum += half ? (Lanes)(x & 0xffff0000u) : (Lanes)(x << 16);
}

template <Mask M>
inline uint32_t low_half(const BFloat16* p, const BFloat16* aux) {
  return read<BFloat16, M>(p, aux).bits;
}

// d[j] = (s0[j], s1[j]), under the masks of x0 and x1.
template <Mask M>
inline void interleave(Pair* d, const BFloat16* s0, const BFloat16* s1, const BFloat16* x0, const BFloat16* x1,
                       int64_t n) {
  by_lanes<Pair>(n, [=](int64_t j, auto lanes) {
    Lanes<BFloat16, lanes> low, high;
    load_masked<M>(low, s0 + j, x0 + j);
    load_masked<M>(high, s1 + j, x1 + j);
    typedef Lanes<uint32_t, lanes> Both;
    const Both both = __builtin_convertvector(low, Both) | __builtin_convertvector(high, Both) << 16;
    __builtin_memcpy(d + j, &both, sizeof both);
  });
}

// Packs a rectangle whose k are whole pairs.
template <Mask M>
void pack_pairs_rect(Pair* dst, int64_t ld, const Rect<BFloat16>& q) {
  constexpr bool mask = M != Mask::kNone;
  if ((q.ks == 1 || q.ks == 2) && (!mask || q.aks == q.ks)) {  // a pair is one 32-bit number of the source, or staged
    constexpr int64_t kHalf = sizeof(BFloat16), kChunk = 64;
    if (!mask && q.ks == 1) {
      transpose(&dst->bits, ld, q.src, q.rs * kHalf, q.nr, q.nk / 2);
    } else {
      BFloat16 staged[kMaxNr * kChunk];
      for (int64_t k = 0; k < q.nk; k += kChunk) {
        const int64_t nk = q.nk - k < kChunk ? q.nk - k : kChunk;
        for (int64_t r = 0; r < q.nr; r += kMaxNr) {
          const int64_t nr = q.nr - r < kMaxNr ? q.nr - r : kMaxNr;
          copy_lines_of<BFloat16, M>(q.ks, staged, kChunk, q.src + r * q.rs + k * q.ks,
                                     mask ? q.aux + r * q.ars + k * q.aks : nullptr, q.rs, q.ars, nr, nk);
          transpose(&dst[k / 2 * ld + r].bits, ld, staged, kChunk * kHalf, nr, nk / 2);
        }
      }
    }
    return;
  }
  const bool lines = q.rs == 1 && (!mask || q.ars == 1);
  const bool every_other = !mask && q.rs == 2 && q.nr <= kMaxNr;
  for (int64_t k = 0; k < q.nk; k += 2) {
    Pair* d = dst + k / 2 * ld;
    const BFloat16 *s0 = q.src + k * q.ks, *s1 = s0 + q.ks;
    const BFloat16 *x0 = mask ? q.aux + k * q.aks : s0, *x1 = mask ? x0 + q.aks : s1;
    if (lines) {
      interleave<M>(d, s0, s1, x0, x1, q.nr);
      continue;
    }
    if (every_other) {
      BFloat16 low[kMaxNr], high[kMaxNr];
      every_second(low, s0, q.nr);
      every_second(high, s1, q.nr);
      interleave<Mask::kNone>(d, low, high, low, high, q.nr);
      continue;
    }
    for (int64_t r = 0; r < q.nr; ++r)
      d[r].bits = low_half<M>(s0 + r * q.rs, x0 + r * q.ars) | low_half<M>(s1 + r * q.rs, x1 + r * q.ars) << 16;
  }
}

template <Mask M>
void pack_pairs_masked(Pair* dst, int64_t ld, const BFloat16* src, const BFloat16* aux, const Axis& axis_r, int64_t r0,
                       int64_t nr, const Axis& axis_k, int64_t k0, int64_t nk) {
  constexpr bool mask = M != Mask::kNone;
  for (int64_t r = 0; r < nr;) {
    const Run run_r = run_at(axis_r, r0 + r, nr - r);
    for (int64_t k = 0; k < nk;) {
      const Run run_k = run_at(axis_k, k0 + k, nk - k);
      const auto at = [&](int64_t i) { return src + run_r.offset + run_k.offset + i * run_k.stride; };
      const auto aux_at = [&](int64_t i) {
        return mask ? aux + run_r.aux_offset + run_k.aux_offset + i * run_k.aux_stride : nullptr;
      };
      // A run of k may begin or end within a pair, as in images of 7x7 pixels.
      const int64_t head = k & 1, pairs = (run_k.length - head) / 2, tail = run_k.length - head - 2 * pairs;
      const auto single = [&](int64_t i, auto&& put) {
        Pair* d = dst + (k + i) / 2 * ld + r;
        for (int64_t j = 0; j < run_r.length; ++j)
          put(d[j], low_half<M>(at(i) + j * run_r.stride, mask ? aux_at(i) + j * run_r.aux_stride : nullptr));
      };
      if (head) single(0, [](Pair& d, uint32_t x) { d.bits |= x << 16; });
      if (pairs)
        pack_pairs_rect<M>(dst + (k + head) / 2 * ld + r, ld,
                           {at(head), aux_at(head), run_r.stride, run_k.stride, run_r.aux_stride, run_k.aux_stride,
                            run_r.length, 2 * pairs});
      if (tail) single(head + 2 * pairs, [](Pair& d, uint32_t x) { d.bits = x; });
      k += run_k.length;
    }
    r += run_r.length;
  }
  for (int64_t k = 0; k < nk; k += 2)
    for (int64_t r = nr; r < ld; ++r) dst[k / 2 * ld + r].bits = 0;
}

inline void pack_pairs_k_major(void* dst, int64_t ld, const void* src, const void* aux, const Axis& axis_r, int64_t r0,
                               int64_t nr, const Axis& axis_k, int64_t k0, int64_t nk, Mask mask) {
  Pair* d = static_cast<Pair*>(dst);
  const BFloat16 *s = static_cast<const BFloat16*>(src), *x = static_cast<const BFloat16*>(aux);
  switch (mask) {
    case Mask::kNone: return pack_pairs_masked<Mask::kNone>(d, ld, s, x, axis_r, r0, nr, axis_k, k0, nk);
    case Mask::kReLU: return pack_pairs_masked<Mask::kReLU>(d, ld, s, x, axis_r, r0, nr, axis_k, k0, nk);
    case Mask::kReLU6: return pack_pairs_masked<Mask::kReLU6>(d, ld, s, x, axis_r, r0, nr, axis_k, k0, nk);
  }
}

// k has one stride. FETCH: prefetch rows ahead even without a mask.
template <Mask M, bool FETCH>
void pack_pair_rows_masked(const Segment* segments, int count, const BFloat16* src, const BFloat16* aux,
                           const Axis& axis_k, int64_t k0, int64_t nk) {
  const int64_t ks = axis_k.stride[0], aks = axis_k.aux_stride[0];
  for (int64_t k = 0; k < nk; k += 2) {
    const BFloat16* s0 = src + (k0 + k) * ks;
    const BFloat16* x0 = M == Mask::kNone ? s0 : aux + (k0 + k) * aks;
    const int64_t next = k + 1 < nk ? ks : 0, aux_next = k + 1 < nk ? aks : 0;
    for (const Segment* g = segments; g < segments + count; ++g) {
      Pair* d = static_cast<Pair*>(g->dst) + k / 2 * g->ld;
      const BFloat16 *s = s0 + g->offset, *x = x0 + (M == Mask::kNone ? g->offset : g->aux_offset);
      if ((FETCH || M != Mask::kNone) && k + kRowsAhead + 1 < nk) {
        for (int64_t row = kRowsAhead; row < kRowsAhead + 2; ++row) {
          fetch_line(s + row * ks, g->length);
          if (M != Mask::kNone) fetch_line(x + row * aks, g->length);
        }
      }
      interleave<M>(d, s, s + next, x, x + aux_next, g->length);
      if (k + 1 == nk)
        for (int64_t r = 0; r < g->length; ++r) d[r].bits &= 0xffffu;
      for (int64_t z = g->length; z < g->length + g->zeros; ++z) d[z].bits = 0;
    }
  }
}

template <bool FETCH>
inline void pack_pair_rows(const Segment* segments, int count, const void* src, const void* aux, const Axis& axis_k,
                           int64_t k0, int64_t nk, Mask mask) {
  const BFloat16 *s = static_cast<const BFloat16*>(src), *x = static_cast<const BFloat16*>(aux);
  switch (mask) {
    case Mask::kNone: return pack_pair_rows_masked<Mask::kNone, FETCH>(segments, count, s, x, axis_k, k0, nk);
    case Mask::kReLU: return pack_pair_rows_masked<Mask::kReLU, FETCH>(segments, count, s, x, axis_k, k0, nk);
    case Mask::kReLU6: return pack_pair_rows_masked<Mask::kReLU6, FETCH>(segments, count, s, x, axis_k, k0, nk);
  }
}

// Where k is contiguous, pairs are too, so rows are copied as they are.
inline void pack_pairs_r_major(void* dst, int64_t ld, const void* src, const void* aux, const Axis& axis_r, int64_t r0,
                               int64_t nr, const Axis& axis_k, int64_t k0, int64_t nk, Mask mask) {
  pack<BFloat16, BFloat16, false>(dst, 2 * ld, src, aux, axis_r, r0, nr, axis_k, k0, nk, mask);
  if (nk & 1)
    for (int64_t r = 0; r < nr; ++r) static_cast<BFloat16*>(dst)[r * 2 * ld + nk] = BFloat16{};
}

inline void fill_pairs(Microkernel& kernel) {
  const int i = static_cast<int>(DType::kBFloat16);
  kernel.pack_a[static_cast<int>(AccessA::kRows)][i] = pack_pairs_r_major;
  kernel.pack_a[static_cast<int>(AccessA::kCols)][i] = kernel.pack_b[i] = pack_pairs_k_major;
  kernel.pack_rows[i] = pack_pair_rows<false>;
  kernel.sum_rows = sum_rows<float, Pair, 2>;
  kernel.sum_columns = sum_columns<float, Pair, 2>;
  fill_conversion<float, float>(kernel, DType::kFloat32);
  fill_conversion<float, BFloat16>(kernel, DType::kBFloat16);
}

CONV1X1_KERNELS_END
