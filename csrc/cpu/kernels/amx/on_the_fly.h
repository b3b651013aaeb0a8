// An operand in parts that is read in place (OnTheFly). A group is split between the products of the group before, into
// one of two places in L1. A panel would be written to L2 and read only once.
#pragma once

#include "parts.h"

CONV1X1_KERNELS_BEGIN

// Prefetches a row's group of the next tile.
template <class S>
CONV1X1_INLINE inline void fetch_next(const char* row) {
  for (size_t at = 0; at < kGroup * sizeof(S); at += kTileBytes) __builtin_prefetch(row + at, 0, 2);
}

// Splits rows of A that are contiguous along k.
template <int PARTS, Mask M, class S>
void split_rows_of_a(const OnTheFly& on_the_fly, OnTheFlyGroup& group, int64_t pieces) {
  constexpr int64_t part = kTiledMr * kTileBytes;
  const __mmask16 low = first_lanes(group.k), high = first_lanes(group.k - kTile);
  const int64_t pitch = on_the_fly.pitch, aux_pitch = on_the_fly.aux_pitch, left = group.count - group.next;
  const char *row = group.src + group.next * pitch, *saved = row;
  if constexpr (M != Mask::kNone) saved = group.aux + group.next * aux_pitch;
  char* to = group.to + group.next * kTileBytes;
  pieces = pieces < left ? pieces : left;
  group.next += pieces;
  for (const char* const end = to + pieces * kTileBytes; to != end; row += pitch, to += kTileBytes) {
    const S *s = reinterpret_cast<const S*>(row), *y = reinterpret_cast<const S*>(saved);
    fetch_next<S>(row + kTiledMr * pitch);
    if constexpr (M != Mask::kNone) {
      fetch_next<S>(saved + kTiledMr * aux_pitch);
      saved += aux_pitch;
    }
    const Parts<PARTS> x =
        split<PARTS>(load_sixteen_masked<M>(s, y, low), load_sixteen_masked<M>(s + kTile, y + kTile, high));
#pragma GCC unroll 3
    for (int p = 0; p < PARTS; ++p) _mm512_store_si512(to + p * part, x.pairs[p]);
  }
}

// Loads sixteen columns of a row of B.
template <Mask M, class S, bool WHOLE>
CONV1X1_INLINE inline __m512 load_on_the_fly(const char* row, const char* saved, const OnTheFlyVector& v) {
  const S *s = reinterpret_cast<const S*>(row), *y = reinterpret_cast<const S*>(saved);
  const __m512 x = load_sixteen_masked<M>(s + v.at, y + v.aux_at, WHOLE ? __mmask16(0xffff) : v.first);
  if (WHOLE || v.second == 0) return x;
  return _mm512_or_ps(x, load_sixteen_masked<M>(s + v.then, y + v.aux_then, v.second));
}

// Splits vectors of columns of B from step `first` on; a step has two k. Prefetches the vectors of the next tile, even
// if that tile has fewer. The members of `group` are read before the first store, because the compiler would have to
// read them again after a store.
template <int PARTS, Mask M, class S, bool WHOLE, int VECTORS>
CONV1X1_INLINE inline void split_vectors_of_b(const OnTheFly& on_the_fly, const OnTheFlyGroup& group, int64_t first,
                                              int64_t end) {
  constexpr int64_t step = VECTORS * kTileBytes, part = kTile * step, size = sizeof(S);
  const OnTheFlyVector vectors[2] = {group.vectors[0], group.vectors[1]};
  const int64_t pitch = on_the_fly.pitch, aux_pitch = M == Mask::kNone ? 0 : on_the_fly.aux_pitch;
  int64_t left = group.k - first;
  const char *row = group.src + first * pitch, *saved = M == Mask::kNone ? row : group.aux + first * aux_pitch;
  char* to = group.to + first * step;
  for (const char* const last = group.to + end * step; to != last;
       to += step, row += pitch, saved += aux_pitch, --left) {
#pragma GCC unroll 2
    for (int64_t k = 0; k < kGroup; k += kTile)
#pragma GCC unroll 2
      for (const OnTheFlyVector& v : vectors) {
        __builtin_prefetch(row + k * pitch + v.next * size, 0, 2);
        if (M != Mask::kNone) __builtin_prefetch(saved + k * aux_pitch + v.aux_next * size, 0, 2);
      }
#pragma GCC unroll 2
    for (int j = 0; j < VECTORS; ++j) {
      const auto load = [&](int64_t k) CONV1X1_INLINE {
        if (!WHOLE && k >= left) return _mm512_setzero_ps();
        return load_on_the_fly<M, S, WHOLE>(row + k * pitch, saved + k * aux_pitch, vectors[j]);
      };
      const Parts<PARTS> x = split<PARTS>(load(0), load(kTile));
#pragma GCC unroll 3
      for (int p = 0; p < PARTS; ++p) _mm512_store_si512(to + p * part + j * kTileBytes, x.pairs[p]);
    }
  }
}

template <int PARTS, Mask M, class S>
void split_columns_of_b(const OnTheFly& on_the_fly, OnTheFlyGroup& group, int64_t pieces) {
  const bool two = group.count == 2 * kTile, whole = group.k >= kGroup;
  const OnTheFlyVector &one = group.vectors[0], &other = group.vectors[two];
  const int64_t first = group.next >> two, steps = first + ((pieces + two) >> two), end = steps < kTile ? steps : kTile;
  group.next = end << two;
  const bool all = whole && (one.first & other.first) == 0xffff;
  if (two)
    all ? split_vectors_of_b<PARTS, M, S, true, 2>(on_the_fly, group, first, end)
        : split_vectors_of_b<PARTS, M, S, false, 2>(on_the_fly, group, first, end);
  else
    all ? split_vectors_of_b<PARTS, M, S, true, 1>(on_the_fly, group, first, end)
        : split_vectors_of_b<PARTS, M, S, false, 1>(on_the_fly, group, first, end);
}

template <int PARTS, class S, Mask M>
constexpr void fill_splits_of(AmxKernel& kernel) {
  kernel.on_the_fly[0][static_cast<int>(M)] = split_rows_of_a<PARTS, M, S>;
  kernel.on_the_fly[1][static_cast<int>(M)] = split_columns_of_b<PARTS, M, S>;
}

template <int PARTS, class S>
constexpr void fill_splits(AmxKernel& kernel) {
  fill_splits_of<PARTS, S, Mask::kNone>(kernel);
  fill_splits_of<PARTS, S, Mask::kReLU>(kernel);
  fill_splits_of<PARTS, S, Mask::kReLU6>(kernel);
}

enum class OnTheFlyOperand { kNothing, kA, kB };

// Splits what the tiles of a call read in place, one group after the other.
template <int PARTS, int NV, OnTheFlyOperand SPLIT>
class OnTheFlySplitter {
 public:
  OnTheFlySplitter(const AmxTileArgs& t, int64_t groups) : on_the_fly_(*t.on_the_fly), t_(t), groups_(groups) {
    begin();
    split(group_.count);
  }

  // Returns the next group, in parts. step() will split the group after it.
  const char* take() {
    if (group_.next < group_.count) split(group_.count);
    const char* const taken = group_.to;
    place_ ^= 1;
    if (++g_ < groups_) {
      follow();
    } else if (++tile_ < (SPLIT == OnTheFlyOperand::kA ? t_.tiles : t_.panels)) {
      g_ = 0;
      begin();
    } else {
      group_.next = group_.count = 0;
    }
    return taken;
  }

  CONV1X1_INLINE void step() {
    if (group_.next < group_.count) split((group_.count + kProducts<PARTS> - 1) / kProducts<PARTS>);
  }

 private:
  void split(int64_t pieces) { on_the_fly_.split(on_the_fly_, group_, pieces); }

  void begin() {  // the first group of a tile
    const int64_t tile = SPLIT == OnTheFlyOperand::kA ? tile_ : 0;
    group_ = {on_the_fly_.src + tile * on_the_fly_.step,
              on_the_fly_.aux ? on_the_fly_.aux + tile * on_the_fly_.aux_step : nullptr,
              on_the_fly_.k,
              SPLIT == OnTheFlyOperand::kA ? nullptr : on_the_fly_.vectors + 2 * tile_,
              places_[place_],
              0,
              SPLIT == OnTheFlyOperand::kA ? t_.m : NV * kTile};
  }
  void follow() {
    group_.src += on_the_fly_.group;
    if (group_.aux) group_.aux += on_the_fly_.aux_group;
    group_.k -= kGroup;
    group_.to = places_[place_];
    group_.next = 0;
  }

  const OnTheFly& on_the_fly_;
  const AmxTileArgs& t_;
  const int64_t groups_;
  int64_t tile_ = 0, g_ = 0;
  int place_ = 0;
  OnTheFlyGroup group_;
  alignas(64) char places_[2][PARTS * kTiledMr * kTileBytes];
};
template <int PARTS, int NV>
class OnTheFlySplitter<PARTS, NV, OnTheFlyOperand::kNothing> {
 public:
  OnTheFlySplitter(const AmxTileArgs&, int64_t) {}
  const char* take() { return nullptr; }
  void step() {}
};

CONV1X1_KERNELS_END
