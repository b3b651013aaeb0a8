// Multiplies 2 x 2 tiles for one group of steps. Operands have one or several parts (parts.h).
#pragma once

#include "parts.h"

CONV1X1_KERNELS_BEGIN

// Where A lies, in place or in a panel: its rows are `pitch` bytes apart. The next part of the same steps lies `part`
// bytes further, the next group of steps `step` bytes further.
struct TiledRows {
  const char* rows;
  int64_t pitch, part, step;
};

template <int PARTS, AccessA ACCESS>
inline TiledRows tiled_rows(const AmxTileArgs& t) {
  if constexpr (ACCESS == AccessA::kCols) {
    const int64_t part = t.lda * kTileBytes;
    return {static_cast<const char*>(t.a), kTileBytes, part, PARTS * part};
  }
  const char* first = static_cast<const char*>(t.a_rows[0]);
  return {first, t.m > 1 ? static_cast<const char*>(t.a_rows[1]) - first : kTileBytes, 0, kTileBytes};
}

template <int TILE, bool ONCE>
inline void load_b(const void* rows, int64_t pitch) {
  if constexpr (ONCE)
    tile_load_once<TILE>(rows, pitch);
  else
    tile_load<TILE>(rows, pitch);
}

// C += the products of parts. With three parts, three products are left out, those where neither part is the first and
// one is the last: they are 2^-27 of the operands' product in the mean, at most 2^-23. Each product is added to C with
// a rounding of its own, the largest last. `mirrored`: in the order that a call with the operands exchanged would use,
// so that bits do not depend on which operand is A: an image alone may have other roles than a batch. between() is
// called after each product of 2 x 2 tiles.
template <int PARTS, int MT, int NV, bool ONCE, class Between>
CONV1X1_INLINE inline void multiply_group(const char* a, const char* second_a, int64_t a_pitch, int64_t a_part,
                                          const char* b, int64_t b_pitch, [[maybe_unused]] bool mirrored,
                                          const Between& between) {
  // Multiplies one part of A by one part of B. a_loads and b_loads name the part to be loaded right before its first
  // product. kLoaded: the part of the product before is used again.
  const auto multiply = [&](int a_loads, int b_loads) CONV1X1_INLINE {
    const char *to_b = b + b_loads * kTile * b_pitch, *to_a = a + a_loads * a_part,
               *to_second = second_a + a_loads * a_part;
    if (b_loads >= 0) load_b<6, ONCE>(to_b, b_pitch);
    if (a_loads >= 0) tile_load<4>(to_a, a_pitch);
    tile_multiply_add<0, 4, 6>();
    if constexpr (NV == 2) {
      if (b_loads >= 0) load_b<7, ONCE>(to_b + kTileBytes, b_pitch);
      tile_multiply_add<1, 4, 7>();
    }
    if constexpr (MT == 2) {
      if (a_loads >= 0) tile_load<5>(to_second, a_pitch);
      tile_multiply_add<2, 5, 6>();
    }
    if constexpr (MT == 2 && NV == 2) tile_multiply_add<3, 5, 7>();
    between();
  };
  constexpr int kLoaded = -1;
  if constexpr (PARTS == 1) {
    multiply(0, 0);
  } else if (!mirrored) {
    multiply(0, PARTS - 1);
    if constexpr (PARTS == 3) multiply(kLoaded, 1);
    multiply(1, kLoaded);
    multiply(kLoaded, 0);
    if constexpr (PARTS == 3) multiply(2, kLoaded);
    multiply(0, kLoaded);
  } else {
    multiply(PARTS - 1, 0);
    if constexpr (PARTS == 3) multiply(1, kLoaded);
    multiply(kLoaded, 1);
    multiply(0, kLoaded);
    if constexpr (PARTS == 3) multiply(kLoaded, 2);
    multiply(kLoaded, 0);
  }
}

template <int MT, int NV>
CONV1X1_INLINE inline void zero_tiles() {
  tile_zero<0>();
  if constexpr (NV == 2) tile_zero<1>();
  if constexpr (MT == 2) tile_zero<2>();
  if constexpr (MT == 2 && NV == 2) tile_zero<3>();
}

template <int MT, int NV>
CONV1X1_INLINE inline void load_tiles(const float* c, int64_t ld, int64_t second) {
  tile_load<0>(c, ld * 4);
  if constexpr (NV == 2) tile_load<1>(c + kTile, ld * 4);
  if constexpr (MT == 2) tile_load<2>(c + second * ld, ld * 4);
  if constexpr (MT == 2 && NV == 2) tile_load<3>(c + second * ld + kTile, ld * 4);
}

template <int MT, int NV>
CONV1X1_INLINE inline void store_tiles(float* c, int64_t ld, int64_t second) {
  tile_store<0>(c, ld * 4);
  if constexpr (NV == 2) tile_store<1>(c + kTile, ld * 4);
  if constexpr (MT == 2) tile_store<2>(c + second * ld, ld * 4);
  if constexpr (MT == 2 && NV == 2) tile_store<3>(c + second * ld + kTile, ld * 4);
}

// Copies a C with less than whole tiles into `whole`, in rows of kTiledNr, from where tiles load it.
template <class V>
inline void copy_in(float* whole, const float* c, int64_t ld, int64_t m, int64_t n) {
  for (int64_t i = 0; i < (m < kTile ? kTile : m); ++i)
    for (int64_t j = 0; j < kTiledNr; j += kTile) {
      const auto mask = V::first(i < m && j < n ? n - j : 0);
      V::store(whole + i * kTiledNr + j, V::load(c + (i < m ? i * ld + j : 0), mask));
    }
}

// The number of rows of the pending tile that are finished during the products of one group.
inline int64_t rows_a_group(int64_t groups) {
  return groups > 0 && groups < kTile ? (kTiledMr + groups - 1) / groups : 2;
}

constexpr int64_t kRowsInL1 = 40 << 10, kColumnsInL1 = 16 << 10;

// A tile store takes a thousand cycles longer if there was no tile store for about two thousand cycles, whichever tile
// is stored (measured with a loop of loads, products and a store). Long calls therefore store a tile in between, all of
// its rows to one line. These stores are as many groups apart as take about 1,800 cycles.
template <int PARTS, int MT, int NV>
constexpr int64_t kGroupsAStore = 1800 / (kProducts<PARTS> * (MT * NV == 4 ? 96 : 52));

// Is B loaded by tile_load_once()? A's rows are multiplied by one panel of B after the other and stay in L1 if they
// fit. B comes from L2, unless a call has few panels, and must then not displace A's rows. (These loads are slower than
// others.)
template <int PARTS>
inline bool loads_b_once(const AmxTileArgs& t) {
  return PARTS == 1 ? t.panels * t.k * kTiledNr * 4 > kColumnsInL1 : t.m * t.k * 4 <= kRowsInL1;
}

CONV1X1_KERNELS_END
