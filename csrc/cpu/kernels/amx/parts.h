// Panels of float32 and float16 for multiply-adds in bfloat16. A number is exactly the sum of PARTS bfloat16. The first
// part is the number rounded to nearest; the others are what is left of it, 8 bits each. A group of KS steps (32 k)
// lies in a panel once for every part. A step is k and k + 16 of the group, because two vectors along k give these
// pairs without a shuffle.
//
//  Henry, Tang, Heinecke: Leveraging the bfloat16 Artificial Intelligence Datatype For Higher-Precision Computations,
//  ARITH 2019.
#pragma once

#include "instructions.h"

CONV1X1_KERNELS_BEGIN

template <int PARTS>
constexpr int kProducts = PARTS == 3 ? 6 : PARTS * PARTS;

template <int PARTS>
struct Parts {
  __m512i pairs[PARTS];  // low halves from `low`, high ones from `high`
};

// Splits the lanes of two vectors. Half of the first part's last bit is added to round it; ties go away from zero.
// Infinities and NaN stay what they are or leave a NaN in a later part. So do numbers that round to infinity.
template <int PARTS>
CONV1X1_INLINE inline Parts<PARTS> split(__m512 low, __m512 high) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000)), half = _mm512_set1_epi32(0x8000);
  Parts<PARTS> parts;
#pragma GCC unroll 3
  for (int p = 0; p < PARTS; ++p) {
    __m512i l = _mm512_castps_si512(low), h = _mm512_castps_si512(high);
    if (p == 0) l = _mm512_add_epi32(l, half), h = _mm512_add_epi32(h, half);
    parts.pairs[p] = _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(l, 16), h);
    if (p + 1 < PARTS) {
      low = _mm512_sub_ps(low, _mm512_castsi512_ps(_mm512_and_si512(l, upper)));
      high = _mm512_sub_ps(high, _mm512_castsi512_ps(_mm512_and_si512(h, upper)));
    }
  }
  return parts;
}

inline __m512 load_sixteen(const float* p, __mmask16 lanes) { return _mm512_maskz_loadu_ps(lanes, p); }
inline __m512 load_sixteen(const Float16* p, __mmask16 lanes) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes, p));
}

// Loads sixteen elements, with zeros where the saved output y holds the gradient back, as drop_blocked() in convert.h.
template <Mask M, class S>
CONV1X1_INLINE inline __m512 load_sixteen_masked(const S* p, const S* y, __mmask16 lanes) {
  if constexpr (M != Mask::kNone) {
    const __m512 saved = load_sixteen(y, lanes);
    lanes &= _mm512_cmp_ps_mask(saved, _mm512_setzero_ps(), _CMP_NLE_UQ);
    if (M == Mask::kReLU6) lanes &= _mm512_cmp_ps_mask(saved, _mm512_set1_ps(6), _CMP_NGE_UQ);
  }
  return load_sixteen(p, lanes);
}

inline __mmask16 first_lanes(int64_t n) {
  return n >= 16 ? __mmask16(0xffff) : (n <= 0 ? __mmask16(0) : static_cast<__mmask16>((1u << n) - 1));
}

// Splits one step of a panel of B: rows s0 and s1, which are k and k + 16. The first part goes to d, each other part
// `part` elements further. A null row counts as zeros.
template <int PARTS, Mask M, class S>
CONV1X1_INLINE inline void split_rows(Pair* d, int64_t part, const S* s0, const S* s1, const S* y0, const S* y1,
                                      int64_t n) {
  for (int64_t j = 0; j < n; j += 16) {
    const __mmask16 lanes = first_lanes(n - j);
    const Parts<PARTS> x = split<PARTS>(s0 ? load_sixteen_masked<M>(s0 + j, y0 + j, lanes) : _mm512_setzero_ps(),
                                        s1 ? load_sixteen_masked<M>(s1 + j, y1 + j, lanes) : _mm512_setzero_ps());
#pragma GCC unroll 3
    for (int p = 0; p < PARTS; ++p) _mm512_mask_storeu_epi32(d + p * part + j, lanes, x.pairs[p]);
  }
}

// Where sixteen k of every row lie: in one run, or in two (the rest of one image and the beginning of the next).
struct Sixteen {
  int64_t at, then, aux_at, aux_then;
  __mmask16 first, second;
};

inline bool sixteen_at(Sixteen& x, const Axis& axis_k, int64_t k, int64_t n) {
  x = {};
  if (n <= 0) return true;
  if (n > kTile) n = kTile;
  const Run run = run_at(axis_k, k, n);
  x.at = run.offset;
  x.aux_at = run.aux_offset;
  x.first = first_lanes(run.length);
  if (run.length == n) return true;
  const Run rest = run_at(axis_k, k + run.length, n - run.length);
  x.then = rest.offset - run.length;
  x.aux_then = rest.aux_offset - run.length;
  x.second = first_lanes(n) & static_cast<__mmask16>(~x.first);
  return run.length + rest.length == n;
}

template <Mask M, class S>
CONV1X1_INLINE inline void stage_sixteen(float* to, const S* src, const S* aux, const Sixteen& x) {
  _mm512_store_ps(to, _mm512_or_ps(load_sixteen_masked<M>(src + x.at, aux + x.aux_at, x.first),
                                   load_sixteen_masked<M>(src + x.then, aux + x.aux_then, x.second)));
}

template <Mask M, class S>
void stage_rows_masked(float* staged, const S* src, const S* aux, int64_t rs, int64_t ars, int64_t nr,
                       const Sixteen& low, const Sixteen& high) {
  for (int64_t r = 0; r < nr; ++r, src += rs, aux += ars, staged += kGroup) {
    stage_sixteen<M>(staged, src, aux, low);
    stage_sixteen<M>(staged + kTile, src, aux, high);
  }
}

// Copies the rows of a group to `staged`, as float32. k is contiguous except at the borders of images. `staged` has
// zeros past n.
template <class S>
void stage_rows(float* staged, const void* src, const void* aux, const Axis& axis_r, int64_t r0, int64_t nr,
                const Axis& axis_k, int64_t k, int64_t n, Mask mask) {
  const Run rows = run_at(axis_r, r0, nr);
  Sixteen low, high;
  if (rows.length == nr && (mask == Mask::kNone || axis_k.aux_stride[axis_k.nd - 1] == 1) &&
      sixteen_at(low, axis_k, k, n) && sixteen_at(high, axis_k, k + kTile, n - kTile)) {
    const S *s = static_cast<const S*>(src) + rows.offset, *y = s;
    if (mask != Mask::kNone) y = static_cast<const S*>(aux) + rows.aux_offset;
    const int64_t rs = rows.stride, ars = rows.aux_stride;
    switch (mask) {
      case Mask::kNone: return stage_rows_masked<Mask::kNone>(staged, s, s, rs, rs, nr, low, high);
      case Mask::kReLU: return stage_rows_masked<Mask::kReLU>(staged, s, y, rs, ars, nr, low, high);
      case Mask::kReLU6: return stage_rows_masked<Mask::kReLU6>(staged, s, y, rs, ars, nr, low, high);
    }
  }
  pack<float, S, false>(staged, kGroup, src, aux, axis_r, r0, nr, axis_k, k, n, mask);
  for (int64_t r = 0; r < nr && n < kGroup; ++r)
    __builtin_memset(staged + r * kGroup + n, 0, static_cast<size_t>(kGroup - n) * sizeof(float));
}

// Lines of float32: those of the tensor itself, if it has such lines, or those copied to `staged`.
struct Lines {
  const float* first;
  int64_t pitch;
};

// Returns rows [r0, r0 + nr) of k [k0, k0 + n) as lines along k (K_MAJOR: as lines along r, which can be read to whole
// tiles). `staged` has zeros from n to kGroup.
template <class S, bool K_MAJOR>
Lines lines_of(float* staged, const void* src, const void* aux, const Axis& axis_r, int64_t r0, int64_t nr,
               const Axis& axis_k, int64_t k0, int64_t n, Mask mask) {
  const Axis &major = K_MAJOR ? axis_k : axis_r, &minor = K_MAJOR ? axis_r : axis_k;
  const int64_t major0 = K_MAJOR ? k0 : r0, majors = K_MAJOR ? n : nr, minor0 = K_MAJOR ? r0 : k0;
  const int64_t minors = K_MAJOR ? nr : n, pitch = K_MAJOR ? kTiledMr : kGroup;
  if constexpr (std::is_same<S, float>::value) {
    const Run run = run_at(minor, minor0, minors), lines = run_at(major, major0, majors);
    const bool readable = n == kGroup && (!K_MAJOR || nr % kTile == 0);
    if (mask == Mask::kNone && readable && run.stride == 1 && run.length == minors && lines.length == majors)
      return {static_cast<const float*>(src) + run.offset + lines.offset, lines.stride};
  }
  if constexpr (K_MAJOR) {
    pack<float, S, true>(staged, pitch, src, aux, axis_r, r0, nr, axis_k, k0, n, mask);
    __builtin_memset(staged + n * pitch, 0, static_cast<size_t>((kGroup - n) * pitch) * sizeof(float));
  } else {
    stage_rows<S>(staged, src, aux, axis_r, r0, nr, axis_k, k0, n, mask);
  }
  return {staged, pitch};
}

// Sets `rows` to sixteen lines from line r on. Lines past nr are zeros.
inline void sixteen_lines(const float** rows, const Lines& lines, int64_t r, int64_t nr) {
  alignas(64) static const float zeros[kGroup] = {};
  for (int64_t i = 0; i < kTile; ++i) rows[i] = r + i < nr ? lines.first + (r + i) * lines.pitch : zeros;
}

// Packs a panel of B.
template <int PARTS, class S>
void pack_parts_b(void* dst, int64_t ld, const void* src, const void* aux, const Axis& axis_r, int64_t r0, int64_t nr,
                  const Axis& axis_k, int64_t k0, int64_t nk, Mask mask) {
  alignas(64) float staged[kGroup * kTiledNr], turned[kGroup * kTile];
  Pair* group = static_cast<Pair*>(dst);
  const int64_t part = kTile * ld;
  const auto split_step = [&](int64_t s, int64_t r, const float* s0, const float* s1, int64_t width) CONV1X1_INLINE {
    split_rows<PARTS, Mask::kNone>(group + s * ld + r, part, s0, s1, s0, s1, width);
  };
  for (int64_t k = 0; k < nk; k += kGroup, group += PARTS * part) {
    const int64_t n = nk - k < kGroup ? nk - k : kGroup;
    if (axis_k.inner_stride() == 1) {
      const Lines lines = lines_of<S, false>(staged, src, aux, axis_r, r0, nr, axis_k, k0 + k, n, mask);
      for (int64_t r = 0; r < ld; r += kTile) {
        const float* rows[kTile];
        sixteen_lines(rows, lines, r, nr);
        transpose_square(turned, kTile, [&](int64_t i) { return rows[i]; });
        transpose_square(turned + kTile * kTile, kTile, [&](int64_t i) { return rows[i] + kTile; });
        for (int64_t s = 0; s < kTile; ++s) split_step(s, r, turned + s * kTile, turned + (s + kTile) * kTile, kTile);
      }
      continue;
    }
    pack<float, S, true>(staged, ld, src, aux, axis_r, r0, nr, axis_k, k0 + k, n, mask);
    __builtin_memset(staged + n * ld, 0, static_cast<size_t>((kGroup - n) * ld) * sizeof(float));
    for (int64_t s = 0; s < kTile; ++s) split_step(s, 0, staged + s * ld, staged + (s + kTile) * ld, ld);
  }
}

template <int PARTS, Mask M, class S>
void pack_parts_rows_masked(const Segment* segments, int count, const S* src, const S* aux, const Axis& axis_k,
                            int64_t k0, int64_t nk) {
  const int64_t ks = axis_k.stride[0], aks = axis_k.aux_stride[0];
  for (int64_t k = 0; k < nk; k += k % kGroup == kTile - 1 ? kTile + 1 : 1) {
    const S* s0 = src + (k0 + k) * ks;
    const S* y0 = M == Mask::kNone ? s0 : aux + (k0 + k) * aks;
    const bool pairs = k + kTile < nk;
    const int64_t ahead = k % kGroup + kRowsAhead < kTile ? kRowsAhead : kRowsAhead + kTile;  // k + kTile.. is read now
    for (const Segment* g = segments; g < segments + count; ++g) {
      const int64_t part = kTile * g->ld, step = k / kGroup * PARTS * kTile + k % kGroup;
      Pair* d = static_cast<Pair*>(g->dst) + step * g->ld;
      const S *s = s0 + g->offset, *y = y0 + (M == Mask::kNone ? g->offset : g->aux_offset);
      if (k + ahead + kTile < nk)
        for (const int64_t row : {ahead, ahead + kTile}) {
          fetch_line(s + row * ks, g->length);
          if (M != Mask::kNone) fetch_line(y + row * aks, g->length);
        }
      split_rows<PARTS, M>(d, part, s, pairs ? s + kTile * ks : nullptr, y, y + kTile * aks, g->length);
      for (int64_t z = g->length; z < g->length + g->zeros; ++z)
        for (int p = 0; p < PARTS; ++p) d[p * part + z].bits = 0;
    }
  }
  // Fills in zeros for the steps that the last group lacks.
  for (int64_t s = nk % kGroup; s > 0 && s < kTile; ++s)
    for (const Segment* g = segments; g < segments + count; ++g)
      for (int p = 0; p < PARTS; ++p)
        __builtin_memset(static_cast<Pair*>(g->dst) + ((nk / kGroup * PARTS + p) * kTile + s) * g->ld, 0,
                         static_cast<size_t>(g->length + g->zeros) * sizeof(Pair));
}

template <int PARTS, class S>
void pack_parts_rows(const Segment* segments, int count, const void* src, const void* aux, const Axis& axis_k,
                     int64_t k0, int64_t nk, Mask mask) {
  const S *s = static_cast<const S*>(src), *x = static_cast<const S*>(aux);
  switch (mask) {
    case Mask::kNone: return pack_parts_rows_masked<PARTS, Mask::kNone>(segments, count, s, x, axis_k, k0, nk);
    case Mask::kReLU: return pack_parts_rows_masked<PARTS, Mask::kReLU>(segments, count, s, x, axis_k, k0, nk);
    case Mask::kReLU6: return pack_parts_rows_masked<PARTS, Mask::kReLU6>(segments, count, s, x, axis_k, k0, nk);
  }
}

// Splits GROUPS groups of A's panel, one row after the other, where rows are contiguous along k. Prefetches the same
// groups of the next row.
template <int PARTS, Mask M, int GROUPS, class S>
CONV1X1_INLINE inline void split_groups_a(Pair* group, int64_t ld, const S* src, const S* aux, int64_t rs, int64_t ars,
                                          int64_t nr, __mmask16 low, __mmask16 high) {
  const int64_t part = ld * kTile;
  for (int64_t r = 0; r < nr; ++r, src += rs, aux += ars, group += kTile) {
    if (GROUPS > 1 && r + 1 < nr) {
      fetch_line(src + rs, GROUPS * kGroup);
      if (M != Mask::kNone) fetch_line(aux + ars, GROUPS * kGroup);
    }
#pragma GCC unroll 4
    for (int g = 0; g < GROUPS; ++g) {
      const S *s = src + g * kGroup, *y = aux + g * kGroup;
      const Parts<PARTS> x =
          split<PARTS>(load_sixteen_masked<M>(s, y, low), load_sixteen_masked<M>(s + kTile, y + kTile, high));
#pragma GCC unroll 3
      for (int p = 0; p < PARTS; ++p) _mm512_storeu_si512(group + (g * PARTS + p) * part, x.pairs[p]);
    }
  }
}

template <int PARTS, Mask M, class S>
void split_rows_a(Pair* group, int64_t ld, const S* src, const S* aux, int64_t rs, int64_t ars, int64_t nr,
                  int64_t nk) {
  constexpr __mmask16 all = 0xffff;
  int64_t k = 0;
  const auto next = [&](int groups) {
    k += groups * kGroup;
    src += groups * kGroup;
    aux += groups * kGroup;
    group += groups * PARTS * kTile * ld;
  };
  for (; k + kTogether * kGroup <= nk; next(kTogether))
    split_groups_a<PARTS, M, kTogether>(group, ld, src, aux, rs, ars, nr, all, all);
  for (; k + kGroup <= nk; next(1)) split_groups_a<PARTS, M, 1>(group, ld, src, aux, rs, ars, nr, all, all);
  if (k < nk)
    split_groups_a<PARTS, M, 1>(group, ld, src, aux, rs, ars, nr, first_lanes(nk - k), first_lanes(nk - k - kTile));
}

// PackAhead::step. It packs one row after the other, so that memory is read in its own order.
template <int PARTS, Mask M, class S>
void split_ahead(PackAhead& ahead, int64_t pieces) {
  const int64_t part = ahead.count * kTile;
  int64_t row = ahead.row, group = ahead.group;
  if (pieces > ahead.left) pieces = ahead.left;
  ahead.left -= pieces;
  for (; pieces > 0; --pieces) {
    const S *s = reinterpret_cast<const S*>(ahead.rows[row]) + group * kGroup, *y = s;
    if constexpr (M != Mask::kNone) y = reinterpret_cast<const S*>(ahead.aux[row]) + group * kGroup;
    const int64_t n = ahead.k - group * kGroup;
    const Parts<PARTS> x = split<PARTS>(load_sixteen_masked<M>(s, y, first_lanes(n)),
                                        load_sixteen_masked<M>(s + kTile, y + kTile, first_lanes(n - kTile)));
    Pair* to = static_cast<Pair*>(ahead.panel) + group * PARTS * part + row * kTile;
#pragma GCC unroll 3
    for (int p = 0; p < PARTS; ++p) _mm512_storeu_si512(to + p * part, x.pairs[p]);
    if (++group == ahead.groups) group = 0, ++row;
  }
  ahead.row = row;
  ahead.group = group;
}

// Prefetches the lines along r of the group that begins at k.
template <class S>
void fetch_group(const void* src, const void* aux, const Run& rows, const Axis& axis_k, int64_t k, int64_t n,
                 Mask mask) {
  if (n <= 0) return;
  const Run run = run_at(axis_k, k, n < kGroup ? n : kGroup);
  const S* s = static_cast<const S*>(src) + rows.offset + run.offset;
  for (int64_t i = 0; i < run.length; ++i) fetch_line(s + i * run.stride, rows.length);
  if (mask == Mask::kNone) return;
  const S* x = static_cast<const S*>(aux) + rows.aux_offset + run.aux_offset;
  for (int64_t i = 0; i < run.length; ++i) fetch_line(x + i * run.aux_stride, rows.length);
}

template <int PARTS, class S>
void pack_parts_a(void* dst, int64_t ld, const void* src, const void* aux, const Axis& axis_r, int64_t r0, int64_t nr,
                  const Axis& axis_k, int64_t k0, int64_t nk, Mask mask) {
  alignas(64) float staged[kGroup * kTiledMr];
  const Run rows = run_at(axis_r, r0, nr);
  const bool unit_k = axis_k.inner_stride() == 1;
  for (int64_t k = 0; k < nk;) {
    Pair* group = static_cast<Pair*>(dst) + k / kGroup * PARTS * kTile * ld;
    int64_t n = nk - k < kGroup ? nk - k : kGroup;
    if (unit_k) {
      const Run run = run_at(axis_k, k0 + k, nk - k);
      const int64_t whole = run.length == nk - k ? nk - k : run.length / kGroup * kGroup;
      if (whole > 0 && rows.length == nr && (mask == Mask::kNone || run.aux_stride == 1)) {
        const S *s = static_cast<const S*>(src) + rows.offset + run.offset, *y = s;
        if (mask != Mask::kNone) y = static_cast<const S*>(aux) + rows.aux_offset + run.aux_offset;
        const int64_t rs = rows.stride, ars = rows.aux_stride;
        switch (mask) {
          case Mask::kNone: split_rows_a<PARTS, Mask::kNone>(group, ld, s, s, rs, rs, nr, whole); break;
          case Mask::kReLU: split_rows_a<PARTS, Mask::kReLU>(group, ld, s, y, rs, ars, nr, whole); break;
          case Mask::kReLU6: split_rows_a<PARTS, Mask::kReLU6>(group, ld, s, y, rs, ars, nr, whole); break;
        }
        n = whole;
      } else {
        stage_rows<S>(staged, src, aux, axis_r, r0, nr, axis_k, k0 + k, n, mask);
        split_rows_a<PARTS, Mask::kNone>(group, ld, staged, staged, kGroup, kGroup, nr, kGroup);
      }
    } else {
      fetch_group<S>(src, aux, rows, axis_k, k0 + k + n, nk - k - n, mask);
      const Lines lines = lines_of<S, true>(staged, src, aux, axis_r, r0, nr, axis_k, k0 + k, n, mask);
      alignas(64) float turned[kTile * kGroup];
      for (int64_t r = 0; r < nr; r += kTile) {
        const int64_t here = nr - r < kTile ? nr - r : kTile;
        for (int64_t half = 0; half < kGroup; half += kTile) {
          const float* from[kTile];
          sixteen_lines(from, {lines.first + r, lines.pitch}, half, kGroup);
          transpose_square(turned + half, kGroup, [&](int64_t i) { return from[i]; });
        }
        split_rows_a<PARTS, Mask::kNone>(group + r * kTile, ld, turned, turned, kGroup, kGroup, here, kGroup);
      }
    }
    k += n;
  }
}

// AmxKernel::has_small. It looks at the first parts alone, in which a number below 2^-134 is zero.
template <int PARTS>
bool has_small(const void* panel, int64_t ld, int64_t steps) {
  const __m512i one = _mm512_set1_epi16(1);
  __m512i least = _mm512_set1_epi16(-1);  // of twice the magnitude less 1, which for zero is the largest number
  const Pair* group = static_cast<const Pair*>(panel);
  for (int64_t s = 0; s < steps; s += PARTS * kTile, group += PARTS * kTile * ld)
    for (int64_t i = 0; i < ld * kTile; i += kTile) {
      const __m512i x = _mm512_loadu_si512(group + i);
      least = _mm512_min_epu16(least, _mm512_sub_epi16(_mm512_add_epi16(x, x), one));
    }
  return _mm512_cmplt_epu16_mask(least, _mm512_set1_epi16(2 * (kSmallBelow >> 16) - 1)) != 0;
}

template <int PARTS, class S>
constexpr void fill_packing_ahead(AmxKernel& amx) {
  amx.has_small = has_small<PARTS>;
  amx.pack_ahead[static_cast<int>(Mask::kNone)] = split_ahead<PARTS, Mask::kNone, S>;
  amx.pack_ahead[static_cast<int>(Mask::kReLU)] = split_ahead<PARTS, Mask::kReLU, S>;
  amx.pack_ahead[static_cast<int>(Mask::kReLU6)] = split_ahead<PARTS, Mask::kReLU6, S>;
}

template <int PARTS, class S>
void fill_parts(Microkernel& kernel, DType storage) {
  const int i = static_cast<int>(storage);
  kernel.pack_a[static_cast<int>(AccessA::kCols)][i] = pack_parts_a<PARTS, S>;
  kernel.pack_b[i] = pack_parts_b<PARTS, S>;
  kernel.pack_rows[i] = pack_parts_rows<PARTS, S>;
  kernel.sum_rows = sum_tiled_rows;
  kernel.sum_columns = sum_columns<float, Pair, 2>;
  fill_conversion<float, float>(kernel, DType::kFloat32);
  fill_conversion<float, S>(kernel, storage);
}

CONV1X1_KERNELS_END
