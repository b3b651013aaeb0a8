// The AMX instructions, and packing of bfloat16 for them. The instructions are in assembler, because g++ 12's
// intrinsics do not tell the compiler that loads read memory and stores write it. A tile register holds 16 rows of 64
// bytes, of any type. 2 x 2 tiles of C:
//
//             b0    b1            C: tmm0 tmm1    A: tmm4, tmm5, rows of 16 steps    B: tmm6, tmm7, 16 steps of
//        a0   c0    c1               tmm2 tmm3       (32 k) of one row of C             16 columns each
//        a1   c2    c3
//
// A product sums the even k and the odd k of its 16 steps in two chains, adds the two, and adds the sum to C. A row of
// C depends on its own row of A alone, a column on its own column of B. A tail of 17 to 31 rows is therefore two tiles
// that overlap, and a tail of fewer than 16 rows is copied to memory that has 16. So one configuration serves all
// calls. Loading another configuration would drop the content of all tiles and take longer than several products.
#pragma once

#include "../common/isa_avx512_amx.h"
#include "../common/pairs.h"
#include "amx_kernel.h"

CONV1X1_KERNELS_BEGIN

struct alignas(64) TileConfiguration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

inline void configure_tiles() {
  static constexpr TileConfiguration configuration;
  asm volatile("ldtilecfg %0" : : "m"(configuration));
}

// Returns to the initial state: the operating system then need not save tiles, and other code does not find this
// library's tiles.
inline void release_tiles() { asm volatile("tilerelease"); }

template <int TILE>
inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(TILE));
}

template <int TILE>
inline void tile_load(const void* rows, int64_t pitch) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(rows), "r"(pitch), "i"(TILE) : "memory");
}

// The same for memory that will not be read again soon: the load leaves the content of L1 alone.
template <int TILE>
inline void tile_load_once(const void* rows, int64_t pitch) {
  asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" : : "r"(rows), "r"(pitch), "i"(TILE) : "memory");
}

template <int TILE>
inline void tile_store(void* rows, int64_t pitch) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(rows), "r"(pitch), "i"(TILE) : "memory");
}

template <int C, int A, int B>
inline void tile_multiply_add() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}

constexpr int64_t kTile = 16;  // rows, steps and columns of a tile
constexpr int64_t kTileBytes = 64, kTiledMr = 32, kTiledNr = 32;

// Packs a panel of B, followed by zeros up to a whole group of 16 steps.
inline void pack_tiled_b(void* dst, int64_t ld, const void* src, const void* aux, const Axis& axis_r, int64_t r0,
                         int64_t nr, const Axis& axis_k, int64_t k0, int64_t nk, Mask mask) {
  pack_pairs_k_major(dst, ld, src, aux, axis_r, r0, nr, axis_k, k0, nk, mask);
  const int64_t steps = (nk + 1) / 2, whole = (steps + kTile - 1) / kTile * kTile;
  __builtin_memset(static_cast<Pair*>(dst) + steps * ld, 0, static_cast<size_t>((whole - steps) * ld) * sizeof(Pair));
}

// Packs several panels of B in the same way.
inline void pack_tiled_rows(const Segment* segments, int count, const void* src, const void* aux, const Axis& axis_k,
                            int64_t k0, int64_t nk, Mask mask) {
  pack_pair_rows<true>(segments, count, src, aux, axis_k, k0, nk, mask);
  const int64_t steps = (nk + 1) / 2, whole = (steps + kTile - 1) / kTile * kTile;
  for (const Segment* g = segments; g < segments + count; ++g)
    for (int64_t s = steps; s < whole; ++s)
      __builtin_memset(static_cast<Pair*>(g->dst) + s * g->ld, 0,
                       static_cast<size_t>(g->length + g->zeros) * sizeof(Pair));
}

// to[i * kTile + s] = from[s * ld + i], i < n.
inline void transpose_tile(Pair* to, const Pair* from, int64_t ld, int64_t n) {
  const __mmask16 rows = static_cast<__mmask16>((1u << n) - 1);
  __m512i in[16], pairs[16], fours[16];
  for (int s = 0; s < 16; ++s) in[s] = _mm512_maskz_loadu_epi32(rows, from + s * ld);
  for (int s = 0; s < 16; s += 2) {
    pairs[s] = _mm512_unpacklo_epi32(in[s], in[s + 1]);
    pairs[s + 1] = _mm512_unpackhi_epi32(in[s], in[s + 1]);
  }
  for (int s = 0; s < 16; s += 4)  // 128 bits of fours[s + c] are steps s .. s + 3 of rows c, c + 4, c + 8, c + 12
    for (int h = 0; h < 2; ++h) {
      fours[s + 2 * h] = _mm512_unpacklo_epi64(pairs[s + h], pairs[s + 2 + h]);
      fours[s + 2 * h + 1] = _mm512_unpackhi_epi64(pairs[s + h], pairs[s + 2 + h]);
    }
  for (int64_t c = 0; c < 4; ++c)
    for (int64_t odd = 0; odd < 2; ++odd) {
      const auto half = [&](int64_t s) {  // rows c and c + 8, or c + 4 and c + 12
        return odd ? _mm512_shuffle_i32x4(fours[s + c], fours[s + 4 + c], 0xdd)
                   : _mm512_shuffle_i32x4(fours[s + c], fours[s + 4 + c], 0x88);
      };
      const __m512i low = half(0), high = half(8);
      const int64_t row = 4 * odd + c;
      if (row < n) _mm512_storeu_si512(to + row * kTile, _mm512_shuffle_i32x4(low, high, 0x88));
      if (row + 8 < n) _mm512_storeu_si512(to + (row + 8) * kTile, _mm512_shuffle_i32x4(low, high, 0xdd));
    }
}

constexpr int64_t kGroup = 2 * kTile;  // k in a row of a tile
constexpr int kTogether = 4;           // groups that are read of a row along k at a time

// Copies GROUPS groups of A's panel, one row after the other, where rows are contiguous along k. Prefetches the same
// groups of the next row.
template <Mask M, int GROUPS>
CONV1X1_INLINE inline void copy_groups_a(Pair* group, int64_t ld, const BFloat16* src, const BFloat16* aux, int64_t rs,
                                         int64_t ars, int64_t nr) {
  for (int64_t r = 0; r < nr; ++r, src += rs, aux += ars, group += kTile) {
    if (r + 1 < nr) {
      fetch_line(src + rs, GROUPS * kGroup);
      if (M != Mask::kNone) fetch_line(aux + ars, GROUPS * kGroup);
    }
#pragma GCC unroll 4
    for (int g = 0; g < GROUPS; ++g) {
      Lanes<BFloat16, kGroup> x;
      load_masked<M>(x, src + g * kGroup, aux + g * kGroup);
      __builtin_memcpy(group + g * kTile * ld, &x, sizeof x);
    }
  }
}

template <Mask M>
void copy_rows_a(Pair* group, int64_t ld, const BFloat16* src, const BFloat16* aux, int64_t rs, int64_t ars, int64_t nr,
                 int64_t groups) {
  const auto next = [&](int64_t n) {
    groups -= n;
    src += n * kGroup;
    aux += n * kGroup;
    group += n * kTile * ld;
  };
  for (; groups >= kTogether; next(kTogether)) copy_groups_a<M, kTogether>(group, ld, src, aux, rs, ars, nr);
  for (; groups > 0; next(1)) copy_groups_a<M, 1>(group, ld, src, aux, rs, ars, nr);
}

// Packs a panel of A: 32 k of all rows, row by row, then the next 32 k. tileloadd reads this layout, and each row of a
// tile is a whole line.
inline void pack_tiled_a(void* dst, int64_t ld, const void* src, const void* aux, const Axis& axis_r, int64_t r0,
                         int64_t nr, const Axis& axis_k, int64_t k0, int64_t nk, Mask mask) {
  const bool k_contiguous = axis_k.inner_stride() == 1;
  const Run rows = run_at(axis_r, r0, nr);
  for (int64_t k = 0; k < nk;) {
    Pair* group = static_cast<Pair*>(dst) + k / kGroup * kTile * ld;
    int64_t n = nk - k < kGroup ? nk - k : kGroup;
    if (k_contiguous) {
      const Run run = run_at(axis_k, k0 + k, nk - k);
      const int64_t groups = run.length / kGroup;
      if (groups > 0 && rows.length == nr && (mask == Mask::kNone || run.aux_stride == 1)) {
        const BFloat16 *s = static_cast<const BFloat16*>(src) + rows.offset + run.offset, *x = s;
        if (mask != Mask::kNone) x = static_cast<const BFloat16*>(aux) + rows.aux_offset + run.aux_offset;
        const int64_t rs = rows.stride, ars = rows.aux_stride;
        switch (mask) {
          case Mask::kNone: copy_rows_a<Mask::kNone>(group, ld, s, s, rs, rs, nr, groups); break;
          case Mask::kReLU: copy_rows_a<Mask::kReLU>(group, ld, s, x, rs, ars, nr, groups); break;
          case Mask::kReLU6: copy_rows_a<Mask::kReLU6>(group, ld, s, x, rs, ars, nr, groups); break;
        }
        n = groups * kGroup;
      } else {
        pack_pairs_r_major(group, kTile, src, aux, axis_r, r0, nr, axis_k, k0 + k, n, mask);
        for (int64_t s = (n + 1) / 2; s < kTile; ++s)
          for (int64_t r = 0; r < nr; ++r) group[r * kTile + s].bits = 0;
      }
    } else {
      Pair steps[kTile * kTiledMr];
      pack_tiled_b(steps, nr, src, aux, axis_r, r0, nr, axis_k, k0 + k, n, mask);
      for (int64_t r = 0; r < nr; r += kTile)
        transpose_tile(group + r * kTile, steps + r, nr, nr - r < kTile ? nr - r : kTile);
    }
    k += n;
  }
}

// Computes sums of rows as a product with ones: every column of the product has them. It must be called between `enter`
// and `leave`, as all work of wgrad is.
inline void sum_tiled_rows(double* sums, const void* panel, int64_t, int64_t rows, int64_t steps, AccessA) {
  struct alignas(64) Ones {
    uint16_t bits[2 * kTile * kTile];
    constexpr Ones() : bits() {
      for (uint16_t& b : bits) b = 0x3f80;
    }
  };
  static constexpr Ones ones;
  alignas(64) float c[kTile * kTile];
  alignas(64) Pair few[kTile * kTile] = {};
  const Pair* p = static_cast<const Pair*>(panel);
  tile_load<6>(ones.bits, kTileBytes);
  for (int64_t done = 0; done < rows; done += kTile) {
    // Memory behind fewer than 16 rows need not be readable, so these are copied. Otherwise a last tile of fewer rows
    // begins earlier.
    const int64_t first = rows < kTile ? 0 : (done + kTile > rows ? rows - kTile : done);
    tile_zero<0>();
    for (int64_t k = 0; k < steps; k += kTile) {
      const Pair* a = p + k * rows + first * kTile;
      if (rows < kTile) {
        __builtin_memcpy(few, a, static_cast<size_t>(rows * kTile) * sizeof(Pair));
        a = few;
      }
      tile_load<4>(a, kTileBytes);
      tile_multiply_add<0, 4, 6>();
    }
    tile_store<0>(c, kTileBytes);
    for (int64_t r = done; r < rows && r < first + kTile; ++r) sums[r] += static_cast<double>(c[(r - first) * kTile]);
  }
}

CONV1X1_KERNELS_END
