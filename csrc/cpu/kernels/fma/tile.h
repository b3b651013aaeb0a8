// The tile in registers: one template for every instruction set. Its vector type V has T, Reg, Mask, kWidth, first(n),
// zero, set1, load, store (plain and masked), stream, add, fma, and max(limit, x) / min(limit, x) that return x where x
// is NaN. With kStoresHalf V also has load_half, half_of, store_half and stream_half. With kSplits its masks are
// integers, and add also takes a mask. For operands of another type than the accumulators' it has kKr, P and PB
// (elements of A and of B), Op (a vector of operands), broadcast, load_op and multiply_add, as in Plain below.
//
// A tile<V, M, NV> is instantiated for many M and NV, so it holds only what most calls need: the mainloop, and the
// epilogue of a tile that is stored in rows of the accumulators' type. finish_in_memory (tile_epilogue.h) does every
// other epilogue, one function for each V.
#pragma once

#include "../common/activations.h"
#include "../common/packing.h"
#include "tile_epilogue.h"

CONV1X1_KERNELS_BEGIN

// Operands of the accumulators' type. A step is one k.
template <class V>
struct Plain : V {
  static constexpr int kKr = 1;
  using P = typename V::T;
  using PB = P;
  using Op = typename V::Reg;
  static Op broadcast(const P* p) { return V::set1(*p); }
  static Op load_op(const P* p) { return V::load(p); }
  static Op load_op(const P* p, typename V::Mask m) { return V::load(p, m); }
  static Op multiply_add(Op a, Op b, typename V::Reg c) { return V::fma(a, b, c); }
};

// A loop over all accumulators of a tile.
#define CONV1X1_EACH(i, j)                   \
  CONV1X1_UNROLL                             \
  for (int i = 0; i < M; ++i) CONV1X1_UNROLL \
  for (int j = 0; j < NV; ++j)

// Returns x and hides its value from the compiler, which would otherwise compile a second mainloop for strides of one
// element.
inline int64_t opaque(int64_t x) {
  asm("" : "+r"(x));
  return x;
}

// Rows of A: one pointer each, and one offset for all of them. Offsets and steps are in bytes.
template <class V, int M, bool PITCHED>
struct Rows {
  using P = typename V::P;
  const char* row[M];
  int64_t at_k = 0, step_k;
  explicit Rows(const FmaTileArgs& t) : step_k(opaque(t.a_k * static_cast<int64_t>(sizeof(P)))) {
    CONV1X1_UNROLL
    for (int i = 0; i < M; ++i) row[i] = static_cast<const char*>(t.a_rows[i]);
  }
  const P* at(int i) const { return reinterpret_cast<const P*>(row[i] + at_k); }
  void step() { at_k += step_k; }
  // Moves from tile `from` of the strip to tile `to`, and on by `steps` steps.
  void move(const FmaTileArgs& t, int64_t, int64_t to, int64_t steps) {
    const void* const* rows = t.a_rows + to * t.rows_per_tile;
    CONV1X1_UNROLL
    for (int i = 0; i < M; ++i) row[i] = static_cast<const char*>(rows[i]) + to * t.a_step;
    at_k += steps * step_k;
  }
};

// Rows a constant distance apart. There is a pointer to every fourth row, because fourteen pointers would not fit into
// the registers.
template <class V, int M>
struct Rows<V, M, true> {
  using P = typename V::P;
  static constexpr int kFours = (M + 3) / 4;
  const char* four[kFours];
  int64_t pitch, pitch3, step_k;
  explicit Rows(const FmaTileArgs& t)
      : pitch(t.a_pitch), pitch3(3 * t.a_pitch), step_k(opaque(t.a_k * static_cast<int64_t>(sizeof(P)))) {
    CONV1X1_UNROLL
    for (int i = 0; i < kFours; ++i) four[i] = static_cast<const char*>(t.a_rows[0]) + 4 * i * pitch;
  }
  const P* at(int i) const { return reinterpret_cast<const P*>(four[i / 4] + (i % 4 == 3 ? pitch3 : i % 4 * pitch)); }
  void step() {
    CONV1X1_UNROLL
    for (int i = 0; i < kFours; ++i) four[i] += step_k;
  }
  void move(const FmaTileArgs& t, int64_t from, int64_t to, int64_t steps) {
    const int64_t bytes = (to - from) * t.a_step + steps * step_k;
    CONV1X1_UNROLL
    for (int i = 0; i < kFours; ++i) four[i] += bytes;
  }
};

// flatten inlines every function: one that the compiler's budget for inlining left out would keep the accumulators in
// memory.
template <class V, int M, int NV, bool PITCHED>
__attribute__((flatten)) void tile(const FmaTileArgs& t) {
  using T = typename V::T;
  using PB = typename V::PB;
  using Reg = typename V::Reg;
  constexpr int W = V::kWidth;
  const typename V::Mask tail = V::first(t.n - (NV - 1) * W);

  Reg acc[M][NV];
  Rows<V, M, PITCHED> rows(t);
  const int64_t ldb = opaque(t.ldb * static_cast<int64_t>(sizeof(PB))), out_bytes = out_size<V>(t.epilogue);
  char* out = static_cast<char*>(t.c_out);
  const char* fetch = t.fetch.lines.first;
  int64_t fetch_rows = t.fetch.lines.rows;
  const int64_t between_fetches = fetch_rows > 0 ? t.fetch.every : t.k;
  // A masked load takes a turn of a pipe from the multipliers, so a whole last vector is loaded without a mask.
  const bool whole = t.n == NV * W;

  const auto read = [&](const T* p, int j)
                        CONV1X1_INLINE { return j == NV - 1 ? V::load(p + j * W, tail) : V::load(p + j * W); };

  // Computes a piece of k for all tiles of the strip, then the next piece. The last piece finishes one tile after the
  // other.
  for (int64_t from = 0, done = 0;;) {
    const int64_t to = t.k - from <= t.piece ? t.k : from + t.piece;
    if (t.fetch_out && to == t.k && done + 1 < t.tiles) fetch_next_out<V>(t, out, M, NV);
    const char* b = static_cast<const char*>(t.b) + from * ldb;
    T* const partial = static_cast<T*>(t.partial) + (t.k > t.piece ? done * (M * NV * W) : 0);
    const T* in = from > 0 ? partial : static_cast<const T*>(t.c_in);
    int64_t ld_in = from > 0 ? NV * W : t.ld_in;
    int64_t k = from, end = to - from < t.chain ? to : from + t.chain;

    // Computes a chain. The inner loop has only loads and multiply-adds: another branch in every step, for prefetches,
    // would take a tenth of the rate.
    const auto multiply = [&](auto whole_vectors) CONV1X1_INLINE {
      while (k < end) {
        const int64_t together = fetch_rows < kFetchedTogether ? fetch_rows : kFetchedTogether;
        for (int64_t f = 0; f < together; ++f, fetch += t.fetch.lines.pitch) {
          if (opaque(t.fetch.near))  // opaque: no second mainloop for it
            __builtin_prefetch(fetch);
          else
            for (int64_t at = 0; at < t.fetch.lines.width; at += 64) __builtin_prefetch(fetch + at, 0, 2);
        }
        fetch_rows -= together;
        const int64_t stop = end - k < between_fetches ? end : k + between_fetches;
        do {
          const PB* columns = reinterpret_cast<const PB*>(b);
          typename V::Op bv[NV];
          CONV1X1_UNROLL
          for (int j = 0; j < NV - 1; ++j) bv[j] = V::load_op(columns + j * W);
          if constexpr (decltype(whole_vectors)::value)
            bv[NV - 1] = V::load_op(columns + (NV - 1) * W);
          else
            bv[NV - 1] = V::load_op(columns + (NV - 1) * W, tail);
          CONV1X1_UNROLL
          for (int i = 0; i < M; ++i) {
            const typename V::Op av = V::broadcast(rows.at(i));
            CONV1X1_UNROLL
            for (int j = 0; j < NV; ++j) acc[i][j] = V::multiply_add(av, bv[j], acc[i][j]);
          }
          rows.step();
          b += ldb;
        } while (++k < stop);
      }
    };

    for (;;) {
      CONV1X1_EACH(i, j) acc[i][j] = V::zero();
      if (whole)
        multiply(std::true_type());
      else
        multiply(std::false_type());
      if (in) CONV1X1_EACH(i, j) acc[i][j] = V::add(read(in + i * ld_in, j), acc[i][j]);
      if (end == t.k) break;
      CONV1X1_EACH(i, j) V::store(partial + (i * NV + j) * W, acc[i][j]);
      if (end == to) break;
      in = partial;
      ld_in = NV * W;
      end = to - end < t.chain ? to : end + t.chain;
    }
    if (to < t.k) {
      if (++done < t.tiles) {
        rows.move(t, done - 1, done, from - to);
      } else {
        rows.move(t, done - 1, 0, 0);
        from = to;
        done = 0;
      }
      continue;
    }

    const Epilogue* e = t.epilogue;
    if (e && !is_plain<V>(t, *e)) {
      alignas(64) T sums[M * NV * W];
      CONV1X1_EACH(i, j) V::store(sums + (i * NV + j) * W, acc[i][j]);
      finish_in_memory<V>(t, *e, sums, out, done * M, M, NV);
    } else {
      if (e) {
        if (const T* bias = static_cast<const T*>(e->bias_m))
          CONV1X1_EACH(i, j) acc[i][j] = V::add(acc[i][j], V::set1(bias[done * M + i]));
        if (const T* bias = static_cast<const T*>(e->bias_n))
          CONV1X1_EACH(i, j) acc[i][j] = V::add(acc[i][j], read(bias, j));
        const Reg lower = V::set1(static_cast<T>(e->lower)), upper = V::set1(static_cast<T>(e->upper));
        CONV1X1_EACH(i, j) acc[i][j] = V::min(upper, V::max(lower, acc[i][j]));
      }
      const int64_t ld = t.ld_out;
      const bool stream = e && e->stream;
      if constexpr (V::kStoresHalfInRegisters) {
        if (out_bytes == 2) {
          uint16_t* half = reinterpret_cast<uint16_t*>(out);
          if (stream)
            CONV1X1_EACH(i, j) V::stream_half(half + i * ld + j * W, V::half_of(acc[i][j], true));
          else
            CONV1X1_EACH(i, j) {
              const auto lanes = j == NV - 1 ? tail : V::first(W);
              V::store_half(half + i * ld + j * W, V::half_of(acc[i][j], true), lanes);
            }
        }
      }
      if (!V::kStoresHalfInRegisters || out_bytes != 2) {
        T* c = reinterpret_cast<T*>(out);
        if (stream)
          CONV1X1_EACH(i, j) V::stream(c + i * ld + j * W, acc[i][j]);
        else
          CONV1X1_EACH(i, j) {
            if (j == NV - 1)
              V::store(c + i * ld + j * W, acc[i][j], tail);
            else
              V::store(c + i * ld + j * W, acc[i][j]);
          }
      }
    }

    if (++done == t.tiles) return;
    rows.move(t, done - 1, done, from - to);
    out += M * t.ld_out * out_bytes;
  }
}

// fn[m - 1][vectors - 1], for every m <= MR and vectors <= NV. Tiles of at most 8 rows have pointers to every row in
// all kernels, so that kernels of several shapes share them.
template <class V, int M, int NV, bool PITCHED>
constexpr void fill_tiles(FmaKernel& kernel) {
  kernel.fn[M - 1][NV - 1] = tile < V, M, NV, PITCHED && (M > kMaxPanelMr) > ;
  if constexpr (NV > 1) fill_tiles<V, M, NV - 1, PITCHED>(kernel);
}

template <class V, int M, int NV, bool PITCHED>
constexpr void fill_tile_rows(FmaKernel& kernel) {
  fill_tiles<V, M, NV, PITCHED>(kernel);
  if constexpr (M > 1) fill_tile_rows<V, M - 1, NV, PITCHED>(kernel);
}

template <class V, int MR, int NV, bool PITCHED>
constexpr FmaKernel make_fma() {
  FmaKernel kernel;
  kernel.pitched = PITCHED;
  fill_tile_rows<V, MR, NV, PITCHED>(kernel);
  return kernel;
}

// A kernel without its packing functions, for operands that may be of another type than the accumulators.
template <class V, int MR, int NV, bool PITCHED = false>
Microkernel make_tiles(const char* name, const char* isa, DType dtype, DType operand) {
  static_assert((PITCHED || MR <= kMaxPanelMr) && MR <= kMaxMr && NV <= kMaxNv && NV * V::kWidth <= kMaxNr,
                "raise the limits");
  static constexpr FmaKernel fma = make_fma<V, MR, NV, PITCHED>();
  Microkernel kernel{};
  kernel.name = name;
  kernel.isa = isa;
  kernel.dtype = dtype;
  kernel.operand = kernel.b_in_place = operand;
  kernel.kr = V::kKr;
  kernel.parts = 1;
  kernel.mr = MR;
  kernel.nr = NV * V::kWidth;
  kernel.vector = V::kWidth;
  kernel.stores_half = V::kStoresHalf;
  kernel.ks = kernel.m_unit = 1;
  kernel.splits = V::kSplits;
  kernel.fma = &fma;
  kernel.activate = activate_tile<typename V::T>;
  return kernel;
}

template <class V, int MR, int NV, bool PITCHED = false>
Microkernel make_microkernel(const char* name, const char* isa, DType dtype) {
  Microkernel kernel = make_tiles<Plain<V>, MR, NV, PITCHED>(name, isa, dtype, dtype);
  fill_packing(kernel, static_cast<typename V::T*>(nullptr));
  return kernel;
}

CONV1X1_KERNELS_END
