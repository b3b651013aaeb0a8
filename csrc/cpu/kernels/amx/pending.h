// The pending tile: its sums are in memory, and the rest is done a few rows at a time between the products of the next
// tile.
#pragma once

#include <cstddef>
#include <limits>

#include "parts.h"  // first: AMX's instruction set

#include "../common/avx512_float32.h"

CONV1X1_KERNELS_BEGIN

// A tile whose sums are in memory. The sum of its last chain must still be added to the sums before it, then c_in, then
// the epilogue follows. The epilogue is done a few rows at a time between the products of the next tile, because
// products leave the vector units idle, and because it takes long to read what tiles have just stored.
struct Pending {
  int current = 0;                             // the part of `whole` that is in use; the other part is free
  int64_t next = 0, m = 0, n = 0, ld_out = 0;  // rows from `next` on wait
  void* out = nullptr;
  void (*finish)(Pending& p, int64_t end) = nullptr;
  bool sums_are_complete = true, has_chain = false, splits = false;
  const Epilogue* epilogue = nullptr;
  const float *bias_m = nullptr, *bias_n = nullptr;  // these and the residual begin at the tile
  const void* residual = nullptr;
  const float* c_in = nullptr;
  int64_t ld_in = 0;
  RepairFn repair = nullptr;
  void* repairer = nullptr;
  int64_t tile = 0, panel = 0;  // the tile's row and column in the call
  Split split[2];
  alignas(64) float whole[2][kTiledMr * kTiledNr];  // rows of kTiledNr
  float chain[kTiledMr * kTiledNr];                 // the sum of the last chain, if has_chain
};
static_assert(sizeof(Pending) <= kMaxPending && offsetof(Pending, whole) <= kPendingState, "raise the limits");

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Stores two vectors of a row that lies in one run.
template <class V, Store STORE>
inline void put_row(void* out, int64_t at, const typename V::Reg* c, int64_t n, bool stream) {
  if constexpr (STORE == Store::kBFloat16) {
    V::store_halves(static_cast<uint16_t*>(out) + at, c[0], c[1], V::first_half(n), stream);
  } else {
    for (int64_t j = 0; j < 2 && j * kTile < n; ++j) {
      const int64_t to = at + j * kTile;
      if constexpr (STORE == Store::kFloat16) {
        uint16_t* p = static_cast<uint16_t*>(out) + to;
        if (stream)
          V::stream_half(p, V::half_of(c[j], false));
        else
          V::store_half(p, V::half_of(c[j], false), V::first(n - j * kTile));
      } else {
        float* p = static_cast<float*>(out) + to;
        if (stream)
          V::stream(p, c[j]);
        else
          V::store(p, c[j], V::first(n - j * kTile));
      }
    }
  }
}

template <class V>
struct Bounds {
  typename V::Reg lower, upper;
  explicit Bounds(const Epilogue& e)
      : lower(V::set1(static_cast<float>(e.lower))), upper(V::set1(static_cast<float>(e.upper))) {}
};

template <class V, int BIAS, bool BELOW>
CONV1X1_INLINE inline void finish_row(typename V::Reg* c, const typename V::Reg* bias, const Bounds<V>& bounds) {
  for (int j = 0; j < 2; ++j) {
    if constexpr (BIAS >= 0) c[j] = V::add(c[j], bias[j]);
    c[j] = V::max(bounds.lower, c[j]);
    if constexpr (BELOW) c[j] = V::min(bounds.upper, c[j]);
  }
}

// Finishes rows of a pending tile up to `end`, if each row is stored in one run and there is no residual. It looks
// nothing up again for a row. BIAS is the bias's stride from row to row: 1 for bias_m, 0 for bias_n, less than zero for
// no bias. BELOW: there is an upper bound.
template <class V, Store STORE, int BIAS, bool BELOW>
void finish_plain_rows(Pending& p, int64_t end) {
  const Bounds<V> bounds(*p.epilogue);
  const bool stream = p.epilogue->stream;
  [[maybe_unused]] const float* bias_m = p.bias_m;
  [[maybe_unused]] typename V::Reg bias[2];
  if constexpr (BIAS == 0) {
    bias[0] = V::load(p.bias_n, V::first(p.n));
    bias[1] = V::load(p.bias_n + kTile, V::first(p.n < kTile ? 0 : p.n - kTile));
  }
  const float* row = p.whole[p.current] + p.next * kTiledNr;
  const int64_t n = p.n, ld = p.ld_out * (STORE == Store::kAsIs ? 4 : 2);
  char* out = static_cast<char*>(p.out) + p.next * ld;
  for (int64_t i = p.next; i < end; ++i, row += kTiledNr, out += ld) {
    typename V::Reg c[2] = {V::load(row), V::load(row + kTile)};
    if constexpr (BIAS == 1) bias[0] = bias[1] = V::set1(bias_m[i]);
    finish_row<V, BIAS, BELOW>(c, bias, bounds);
    put_row<V, STORE>(out, 0, c, n, stream);
  }
  p.next = end;
}

template <class V, Store STORE>
void finish_any_rows(Pending& p, int64_t end) {
  using Reg = typename V::Reg;
  using Lanes = typename V::Mask;
  constexpr bool half = STORE != Store::kAsIs, bfloat = STORE == Store::kBFloat16;
  const Epilogue none{}, &e = p.epilogue ? *p.epilogue : none;
  const Bounds<V> bounds(e);
  const Lanes mask[2] = {V::first(p.n), V::first(p.n < kTile ? 0 : p.n - kTile)};
  const float *bias_m = p.bias_m, *bias_n = p.bias_n;
  const float* row = p.whole[p.current] + p.next * kTiledNr;
  // Calls f(vector, lanes, column) for each run of a row's vectors.
  const auto places = [&](const auto& f) {
    for (int j = 0; j < 2; ++j) {
      if (!p.splits) {
        f(j, mask[j], j * kTile);
        continue;
      }
      const Lanes first = static_cast<Lanes>(V::first(p.split[j].lanes) & mask[j]);
      f(j, first, p.split[j].at);
      f(j, static_cast<Lanes>(mask[j] & ~first), p.split[j].then);
    }
  };
  const Reg bias[2] = {bias_n ? V::load(bias_n, mask[0]) : V::zero(),
                       bias_n ? V::load(bias_n + kTile, mask[1]) : V::zero()};
  for (int64_t i = p.next; i < end; ++i, row += kTiledNr) {
    Reg c[2] = {V::load(row), V::load(row + kTile)};
    if (bias_m)
      for (Reg& x : c) x = V::add(x, V::set1(bias_m[i]));
    if (bias_n)
      for (int j = 0; j < 2; ++j) c[j] = V::add(c[j], bias[j]);
    if (p.residual)
      places([&](int j, Lanes lanes, int64_t col) {
        const int64_t at = i * e.ld_residual + col;
        const Reg x = half ? V::load_half(static_cast<const uint16_t*>(p.residual) + at, lanes, bfloat)
                           : V::load(static_cast<const float*>(p.residual) + at, lanes);
        c[j] = V::add(c[j], x, lanes);
      });
    if (p.epilogue)
      for (Reg& x : c) x = V::min(bounds.upper, V::max(bounds.lower, x));
    const int64_t to = i * p.ld_out;
    if (!p.splits) {
      put_row<V, STORE>(p.out, to, c, p.n, e.stream);
      continue;
    }
    places([&](int j, Lanes lanes, int64_t col) {
      if constexpr (half)
        V::store_half(static_cast<uint16_t*>(p.out) + to + col, V::half_of(c[j], bfloat), lanes);
      else
        V::store(static_cast<float*>(p.out) + to + col, c[j], lanes);
    });
  }
  p.next = end;
}

using FinishRows = void (*)(Pending& p, int64_t end);

template <class V, Store STORE, bool BELOW>
FinishRows finish_plain_below(const Epilogue& e) {
  return e.bias_m   ? finish_plain_rows<V, STORE, 1, BELOW>
         : e.bias_n ? finish_plain_rows<V, STORE, 0, BELOW>
                    : finish_plain_rows<V, STORE, -1, BELOW>;
}

template <class V, Store STORE>
FinishRows finish_plain_for(const Epilogue& e) {
  return e.upper < kInfinity ? finish_plain_below<V, STORE, true>(e) : finish_plain_below<V, STORE, false>(e);
}

template <class V, Store STORE>
FinishRows finish_for(const Pending& p) {
  const Epilogue* e = p.epilogue;
  const bool plain = e && !p.splits && !e->residual && !(e->bias_m && e->bias_n);
  return plain ? finish_plain_for<V, STORE>(*e) : finish_any_rows<V, STORE>;
}

template <class V>
FinishRows finish_for(const Pending& p) {
  switch (p.epilogue ? p.epilogue->store : Store::kAsIs) {
    case Store::kBFloat16: return finish_for<V, Store::kBFloat16>(p);
    case Store::kFloat16: return finish_for<V, Store::kFloat16>(p);
    default: return finish_for<V, Store::kAsIs>(p);
  }
}

// Finishes `count` rows from p.next on.
inline void finish_rows(Pending& p, int64_t count) { p.finish(p, p.next + count < p.m ? p.next + count : p.m); }

template <class V>
inline void join_chain(float* whole, const float* chain, int64_t m) {
  for (int64_t i = 0; i < m * kTiledNr; i += kTile) V::store(whole + i, V::add(V::load(whole + i), V::load(chain + i)));
}

// Completes the sums of a pending tile: adds the last chain, repairs doubtful sums, adds c_in. The epilogue may follow.
template <class V>
void complete_sums(Pending& p) {
  p.sums_are_complete = true;
  float* const whole = p.whole[p.current];
  if (p.has_chain) join_chain<V>(whole, p.chain, p.m);
  const int64_t lanes[2] = {p.n, p.n - kTile};
  if (p.repair) {
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff), one = _mm512_castps_si512(_mm512_set1_ps(1));
    __m512i least = one, most = one;
    for (int v = 0; v < 2 && lanes[v] > 0; ++v) {
      const __mmask16 mask = V::first(lanes[v]);
      for (int64_t i = 0; i < p.m; ++i) {
        const __m512i x = _mm512_and_si512(_mm512_load_si512(whole + i * kTiledNr + v * kTile), magnitude);
        least = _mm512_mask_min_epu32(least, mask, least, x);
        most = _mm512_mask_max_epu32(most, mask, most, x);
      }
    }
    const bool finite = _mm512_cmpge_epu32_mask(most, _mm512_set1_epi32(0x7f800000)) == 0;
    if (!finite || _mm512_cmplt_epu32_mask(least, _mm512_set1_epi32(kDoubtfulBelow)) != 0)
      p.repair(p.repairer, p.tile, p.panel, whole, kTiledNr, finite);
  }
  if (p.c_in)
    for (int v = 0; v < 2 && lanes[v] > 0; ++v)
      for (int64_t i = 0; i < p.m; ++i) {
        float* c = whole + i * kTiledNr + v * kTile;
        V::store(c, V::add(V::load(p.c_in + i * p.ld_in + v * kTile, V::first(lanes[v])), V::load(c)));
      }
}

template <class V>
void finish_pending(void* pending) {
  Pending& p = *static_cast<Pending*>(pending);
  if (!p.sums_are_complete) complete_sums<V>(p);
  if (p.next < p.m) finish_rows(p, kTiledMr);
}

// Makes a tile of the call the pending tile. Its sums are in `whole` and, if has_chain, in `chain`.
template <class V, int PARTS>
inline void wait(Pending& p, const AmxTileArgs& t, int64_t tile, int64_t panel, const float* c_in, bool has_chain) {
  const Epilogue none{}, &e = t.epilogue ? *t.epilogue : none;
  const int64_t row = tile * t.m, column = panel * kTiledNr, size = e.store == Store::kAsIs ? 4 : 2;
  p.current ^= 1;
  p.next = 0;
  p.m = t.m;
  p.n = t.n;
  p.out = static_cast<char*>(t.c_out) + (row * t.ld_out + panel * t.panel_out) * size;
  p.ld_out = t.ld_out;
  p.epilogue = t.epilogue;
  p.bias_m = e.bias_m ? static_cast<const float*>(e.bias_m) + row : nullptr;
  p.bias_n = e.bias_n ? static_cast<const float*>(e.bias_n) + column : nullptr;
  p.residual = e.residual ? static_cast<const char*>(e.residual) + (row * e.ld_residual + column) * size : nullptr;
  p.sums_are_complete = PARTS == 1;
  p.has_chain = has_chain;
  p.c_in = c_in;
  p.ld_in = t.ld_in;
  p.repair = t.repair;
  p.repairer = t.repairer;
  p.tile = tile;
  p.panel = panel;
  p.splits = t.splits != nullptr;
  for (int j = 0; t.splits && j < 2 && j * kTile < t.n; ++j) p.split[j] = t.splits[j];
  if (PARTS > 1 && !has_chain) complete_sums<V>(p);
}

CONV1X1_KERNELS_END
