// A call of an AMX kernel: multiplies its tiles, finishes the pending tile meanwhile, and leaves the last tile pending.
// Operands have one or several parts (parts.h).
#pragma once

#include "fetch.h"
#include "multiply.h"
#include "on_the_fly.h"
#include "pending.h"
#include "plain.h"

CONV1X1_KERNELS_BEGIN

// Computes all tiles of a call. Each is MT x NV tile registers of C. Panels of A can be read to whole tile registers.
template <class V, int PARTS, int MT, int NV, AccessA ACCESS, bool PACKS,
          OnTheFlyOperand SPLIT = OnTheFlyOperand::kNothing>
void compute_tiles(const AmxTileArgs& t) {
  Pending local;
  Pending& pending = t.pending ? *static_cast<Pending*>(t.pending) : local;
  TiledRows a = SPLIT == OnTheFlyOperand::kA ? TiledRows{nullptr, kTileBytes, kTiledMr * kTileBytes, 0}
                                             : tiled_rows<PARTS, ACCESS>(t);
  const bool once = SPLIT == OnTheFlyOperand::kNothing && loads_b_once<PARTS>(t);
  alignas(64) uint32_t copy[kTile * kTile];
  const char* const first_rows = a.rows;
  const bool copies_rows = MT == 1 && PARTS == 1 && t.m < kTile;  // memory behind the rows need not be readable
  for (int64_t i = t.m; copies_rows && i < kTile; ++i) _mm512_store_si512(copy + i * kTile, _mm512_setzero_si512());
  // Where the second tile of rows begins. It ends where C ends, so it may overlap the first one.
  const int64_t second = MT == 2 ? t.m - kTile : 0,
                b_pitch = SPLIT == OnTheFlyOperand::kB ? NV * kTileBytes : t.ldb * 4;
  const int64_t groups = t.k / (kTile * PARTS), chain = PARTS == 1 ? groups : t.chain / (kTile * PARTS);
  const bool in_place = t.m >= kTile && t.n == NV * kTile;
  const bool stores_sums = PARTS == 1 && !t.epilogue && in_place;  // without an epilogue
  const int64_t at_once = rows_a_group(groups), steps = groups * t.tiles * t.panels;
  Fetching next_a(t.next_a, steps), next_c(t.next_c, steps), ahead(t.fetch.lines, steps);
  OnTheFlySplitter<PARTS, NV, SPLIT> splitter(t, groups);
  const auto pack = [&]() CONV1X1_INLINE {
    if constexpr (PACKS)
      if (t.pack->left > 0 && pending.sums_are_complete) t.pack->step(*t.pack, t.pack->each);
    if constexpr (SPLIT != OnTheFlyOperand::kNothing) splitter.step();
  };
  FinishRows finish = nullptr;
  alignas(64) char line[kTileBytes];
  for (int64_t tile = 0, panel = 0; tile < t.tiles; panel + 1 < t.panels ? ++panel : (++tile, panel = 0)) {
    float* const whole = pending.whole[pending.current ^ 1];
    const char* b = static_cast<const char*>(t.b) + panel * t.b_step;
    const float* const c_in = t.c_in ? static_cast<const float*>(t.c_in) + panel * t.panel_in : nullptr;
    a.rows = first_rows + tile * t.a_step;
    int64_t stored = 0;  // the group after which a tile was last stored
    bool has_chain = false, first = true;
    for (int64_t g = 0; first || g < groups; first = false) {
      const int64_t end = groups - g < chain ? groups : g + chain;
      if (PARTS > 1 || !c_in) {
        zero_tiles<MT, NV>();
      } else if (in_place) {
        load_tiles<MT, NV>(c_in, t.ld_in, second);
      } else {
        copy_in<V>(whole, c_in, t.ld_in, t.m, t.n);
        load_tiles<MT, NV>(whole, kTiledNr, second);
      }
      for (; g < end; ++g, a.rows += a.step, b += PARTS * kTile * b_pitch) {
        const char *rows = a.rows, *columns = b;
        if constexpr (SPLIT == OnTheFlyOperand::kA) rows = splitter.take();
        if constexpr (SPLIT == OnTheFlyOperand::kB) columns = splitter.take();
        int64_t pitch = a.pitch;
        if (copies_rows) {
          for (int64_t i = 0; i < t.m; ++i) _mm512_store_si512(copy + i * kTile, _mm512_loadu_si512(rows + i * pitch));
          rows = reinterpret_cast<const char*>(copy);
          pitch = kTileBytes;
        }
        if (once)
          multiply_group<PARTS, MT, NV, true>(rows, rows + second * pitch, pitch, a.part, columns, b_pitch, t.mirrored,
                                              pack);
        else
          multiply_group<PARTS, MT, NV, false>(rows, rows + second * pitch, pitch, a.part, columns, b_pitch, t.mirrored,
                                               pack);
        if (g + 1 - stored == kGroupsAStore<PARTS, MT, NV> && g + 1 < end) {
          tile_store<6>(line, 0);
          stored = g + 1;
        }
        if constexpr (PARTS > 1) {
          if (has_chain) join_chain<V>(whole, pending.chain, t.m), has_chain = false;
          if (!pending.sums_are_complete) complete_sums<V>(pending);
        }
        next_a.step();
        next_c.step();
        ahead.step();
        if (pending.next < pending.m) finish_rows(pending, at_once);
      }
      if (stores_sums)
        store_tiles<MT, NV>(static_cast<float*>(t.c_out) + tile * t.m * t.ld_out + panel * t.panel_out, t.ld_out,
                            second);
      else
        store_tiles<MT, NV>(first ? whole : pending.chain, kTiledNr, second);
      stored = g;
      has_chain = !first;
    }
    if (pending.next < pending.m || !pending.sums_are_complete) finish_pending<V>(&pending);
    if (stores_sums) continue;
    wait<V, PARTS>(pending, t, tile, panel, PARTS > 1 ? c_in : nullptr, has_chain);
    if (!finish) finish = finish_for<V>(pending);
    pending.finish = finish;
  }
  if (!t.pending) finish_pending<V>(&pending);
}

template <class V, int PARTS, int MT, int NV, AccessA ACCESS>
void tiled(const AmxTileArgs& t) {
  if constexpr (PARTS == 1 && MT == 2 && NV == 2)
    if (is_plain(t)) {
      const TiledRows a = tiled_rows<PARTS, ACCESS>(t);
      return loads_b_once<PARTS>(t) ? plain_call<V, true>(t, a) : plain_call<V, false>(t, a);
    }
  if constexpr (PARTS > 1 && ACCESS == AccessA::kRows) {
    compute_tiles<V, PARTS, MT, NV, ACCESS, false, OnTheFlyOperand::kA>(t);
  } else {
    if constexpr (PARTS > 1) {
      if (t.on_the_fly) return compute_tiles<V, PARTS, MT, NV, ACCESS, false, OnTheFlyOperand::kB>(t);
      if (t.pack) return compute_tiles<V, PARTS, MT, NV, ACCESS, true>(t);
    }
    compute_tiles<V, PARTS, MT, NV, ACCESS, false>(t);
  }
}

template <class V, int PARTS, AccessA ACCESS>
constexpr void fill_tiled(AmxKernel& amx) {
  auto& fns = amx.fn[static_cast<int>(ACCESS)];
  fns[0][0] = tiled<V, PARTS, 1, 1, ACCESS>;
  fns[0][1] = tiled<V, PARTS, 1, 2, ACCESS>;
  fns[1][0] = tiled<V, PARTS, 2, 1, ACCESS>;
  fns[1][1] = tiled<V, PARTS, 2, 2, ACCESS>;
}

CONV1X1_KERNELS_END
