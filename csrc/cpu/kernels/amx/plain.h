// The commonest calls of tile.h: whole tiles, one part, one chain, stored in runs as bfloat16, without a residual. What
// tile.h reads from memory between products is in registers here.
#pragma once

#include "fetch.h"
#include "multiply.h"
#include "pending.h"

CONV1X1_KERNELS_BEGIN

inline bool is_plain(const AmxTileArgs& t) {
  if (t.m != kTiledMr || t.n != kTiledNr || t.k == 0 || t.fetch.lines.rows > 0) return false;
  if (!Stretch::is(t.next_a) || !Stretch::is(t.next_c)) return false;
  const Epilogue* e = t.epilogue;
  return e && t.pending && e->store == Store::kBFloat16 && !t.c_in && !t.splits && !e->residual &&
         !(e->bias_m && e->bias_n);
}

// BIAS: as in finish_plain_rows.
template <class V, int BIAS, bool ONCE>
void plain_tiles(const AmxTileArgs& t, const TiledRows& a, Pending& p, FinishRows finish) {
  using Reg = typename V::Reg;
  // The pending tile is finished in this loop only if it is whole and is stored as this call's tiles are.
  const bool same_epilogue = p.finish == finish && p.n == kTiledNr && p.epilogue->stream == t.epilogue->stream;
  if (p.next < p.m && !same_epilogue) finish_pending<V>(&p);
  const int64_t groups = t.k / kTile, steps = groups * t.tiles * t.panels, b_pitch = t.ldb * 4;
  const int64_t at_once = rows_a_group(groups);
  Stretch next_a(t.next_a, steps), next_c(t.next_c, steps);
  alignas(64) char line[kTileBytes];
  // What is left of the pending tile.
  int64_t left = p.m - p.next, ld = p.ld_out * 2;
  const float *sums = p.whole[p.current] + p.next * kTiledNr, *bias_m = p.bias_m ? p.bias_m + p.next : nullptr,
              *bias_n = p.bias_n;
  char* out = static_cast<char*>(p.out) + p.next * ld;
  int current = p.current;
  const Bounds<V> bounds(*t.epilogue);
  const bool stream = t.epilogue->stream;
  const char* tile_rows = a.rows;
  for (int64_t tile = 0; tile < t.tiles; ++tile, tile_rows += t.a_step) {
    const char* panel_b = static_cast<const char*>(t.b);
    for (int64_t panel = 0; panel < t.panels; ++panel, panel_b += t.b_step) {
      const char *rows = tile_rows, *b = panel_b;
      const auto group = [&]() CONV1X1_INLINE {
        multiply_group<1, 2, 2, ONCE>(rows, rows + kTile * a.pitch, a.pitch, 0, b, b_pitch, false, [] {});
        next_a.step();
        next_c.step();
        rows += a.step;
        b += kTile * b_pitch;
      };
      zero_tiles<2, 2>();
      int64_t g = 0;
      if (left > 0) {
        [[maybe_unused]] Reg bias[2];
        if constexpr (BIAS == 0) bias[0] = V::load(bias_n), bias[1] = V::load(bias_n + kTile);
        for (; left > 0; left -= at_once, ++g) {
          group();
          for (int64_t n = at_once < left ? at_once : left; n > 0; --n, sums += kTiledNr, out += ld) {
            if constexpr (BIAS == 1) bias[0] = bias[1] = V::set1(*bias_m++);
            Reg c[2] = {V::load(sums), V::load(sums + kTile)};
            finish_row<V, BIAS, true>(c, bias, bounds);
            put_row<V, Store::kBFloat16>(out, 0, c, kTiledNr, stream);
          }
        }
      }
      for (int64_t since = g; g < groups; ++g) {
        group();
        if (++since == kGroupsAStore<1, 2, 2> && g + 1 < groups) tile_store<6>(line, 0), since = 0;
      }
      current ^= 1;
      sums = p.whole[current];
      store_tiles<2, 2>(p.whole[current], kTiledNr, kTile);
      left = kTiledMr;
      ld = t.ld_out * 2;
      out = static_cast<char*>(t.c_out) + tile * kTiledMr * ld + panel * t.panel_out * 2;
      if constexpr (BIAS == 1) bias_m = static_cast<const float*>(t.epilogue->bias_m) + tile * kTiledMr;
      if constexpr (BIAS == 0) bias_n = static_cast<const float*>(t.epilogue->bias_n) + panel * kTiledNr;
    }
  }
  // The last tile waits for the next call.
  p.current = current ^ 1;
  wait<V, 1>(p, t, t.tiles - 1, t.panels - 1, nullptr, false);
  p.finish = finish;
}

template <class V, bool ONCE>
void plain_call(const AmxTileArgs& t, const TiledRows& a) {
  const Epilogue& e = *t.epilogue;
  Pending& p = *static_cast<Pending*>(t.pending);
  const FinishRows finish = finish_plain_for<V, Store::kBFloat16>(e);
  if (e.bias_m)
    plain_tiles<V, 1, ONCE>(t, a, p, finish);
  else if (e.bias_n)
    plain_tiles<V, 0, ONCE>(t, a, p, finish);
  else
    plain_tiles<V, -1, ONCE>(t, a, p, finish);
}

CONV1X1_KERNELS_END
