// Computes the tiles of a block by AMX's kernels. A call computes a row of tiles side by side. The stores of its last
// tile wait for the next call's products. What a later row of tiles needs is prefetched, or packed, between products.
#pragma once

#include <algorithm>
#include <cstring>

#include "../kernels/amx/amx_kernel.h"
#include "exact.h"
#include "fetch_ahead.h"
#include "output.h"

namespace conv1x1 {

class AmxBlock {
 public:
  using T = float;

  AmxBlock(const Task& task, const Panels<T>& panels, T* accumulators)
      : task_(task),
        p_(task.p),
        plan_(task.plan),
        kernel_(task.kernel),
        amx_(*task.kernel.amx),
        panels_(panels),
        columns_(task, panels),
        exact_(task.p, task.kernel),
        tile_(task.kernel.mr * task.kernel.nr),
        accumulators_(accumulators),
        partial_(accumulators + task.plan.kept() * tile_),
        output_(task, columns_, partial_ + task.plan.partials_kept * tile_,
                partial_ + (task.plan.partials_kept + task.plan.staged) * tile_) {
    std::memset(pending_, 0, kPendingState);
  }

  Output<T>& output() { return output_; }

  void enter() { amx_.enter(); }
  void leave() { amx_.leave(); }
  // Does FetchAhead prefetch the next blocks? Only packed blocks of A: otherwise rows of tiles prefetch what the next
  // rows read (NextRows).
  static bool fetches_blocks(const GemmProblem& p, const Plan& plan) {
    return !p.split_k && plan.a.by_block() && !plan.b.in_place();
  }
  // Corrects sums of a bias gradient that parts cannot represent.
  void repair_sums(double* sums, bool of_a, const Tiling::Tile& t, int64_t k0, int64_t nk) const {
    if (kernel_.parts > 1) exact_.repair_sums(sums, of_a, task_.group, t, k0, nk);
  }

  void run_block(const Block& block, FetchAhead& ahead) {
    const void* rows[kMaxMr];
    const Range &is = block.is, &js = block.js;
    const int64_t k0 = block.k0, nk = block.nk, columns = js.end - js.begin;
    const bool first = block.first, last = block.last, carried = plan_.k_step < plan_.slice;
    const bool to_d = last && plan_.slices == 1 && !p_.pool;
    columns_.prepare(js, k0);
    if (plan_.b.source == Source::kSplitBetweenProducts) place_columns(js);
    if (columns > 0) join_columns(columns, to_d);
    int64_t tiles_left = (is.end - is.begin) * columns;
    for (int64_t i = is.begin, strip = 0; i < is.end; i += strip) {
      const Tiling::Tile ti = plan_.m[i];
      AmxTileArgs args;
      args.k = plan_.steps(nk);
      args.m = ti.size;
      args.chain = plan_.steps(plan_.kc);
      args.pending = pending_;
      args.a_rows = rows;
      prepare_rows(i, ti, k0, rows, args);
      strip = first && last && columns_.all_unit() ? strip_from(i, is.end, args) : 1;
      args.tiles = strip;
      const Run row = p_.pool ? Run() : run_at(p_.d.row, ti.start, ti.size * strip);
      const bool rows_of_tiles =
          !columns_.transcendental() && (!last || plan_.slices > 1 || p_.pool || row.length == ti.size * strip);
      const int64_t most = p_.pool && last ? plan_.staged : kMaxBlockN;
      const NextRows next = next_rows(is, i, strip, columns, nk, rows);
      const bool packs = plan_.packs_ahead() && i + 1 < is.end;
      if (packs) pack_ahead(i + 1, k0, nk, columns);
      args.pack = packs ? &next_a_ : nullptr;
      args.on_the_fly = on_the_fly(ti, args.a_step, k0, nk);
      for (int64_t j = 0; j < columns; j += args.panels) {
        const Column& c = columns_[j];
        args.panels = rows_of_tiles ? std::min(joined_[j].count, most) : 1;
        args.b_step = args.panels > 1 ? joined_[j].b_step : 0;
        const AmxTileFn fn = amx_.tile(plan_.a_access, ti.size, c.tile.size);
        T* sum = carried ? accumulators_ + ((i - is.begin) * plan_.reach_n + block.first_column + j) * tile_ : partial_;
        args.b = c.b;
        args.ldb = c.ldb;
        args.n = c.tile.size;
        on_the_fly_.vectors = vectors_[j];
        if (kernel_.parts > 1) {
          Repairer& r = repairers_[repairer_ ^= 1];  // the pending tile may still use the other one
          r = {this, {task_.group, k0, nk, ti, c.tile, args.a, c.b, args.lda, c.ldb, args.k}, j, args.a_step};
          args.mirrored = p_.b_is_weight;
          args.repair = repair_tile;
          args.repairer = &r;
        }
        args.fetch = ahead.share(tiles_left, strip * args.panels, args.k);
        tiles_left -= strip * args.panels;
        if (next.rows > 0) fetch_share(next, j, args);
        args.c_in = first ? nullptr : sum;
        args.ld_in = kernel_.nr;
        args.panel_in = tile_;
        args.panel_out = last && !p_.pool ? kernel_.nr : tile_;
        if (!last) {
          args.c_out = sum;
          args.ld_out = kernel_.nr;
          fn(args);
        } else if (plan_.slices > 1) {
          args.c_out = task_.slice_sum<T>(task_.slice, task_.group * p_.m + ti.start) + c.tile.start;
          args.ld_out = p_.n;
          fn(args);
        } else {
          Epilogue& e = epilogues_[epilogue_ ^= 1];  // the pending tile may still use the other one
          const auto place = output_.enter(args, e, ti, row, c, args.panels, args.next_c.rows == 0);
          fn(args);
          if (!place.is_final) amx_.finish_pending(pending_);
          output_.leave(place, ti, strip, args.panels,
                        [&](int64_t side) -> const Column& { return columns_[j + side]; });
        }
      }
      if (packs && next_a_.left > 0) next_a_.step(next_a_, next_a_.left);
    }
    amx_.finish_pending(pending_);
  }

 private:
  // The number of whole tiles, from a column on, that lie side by side in D and whose panels are b_step bytes apart.
  struct Joined {
    int64_t count, b_step;
  };

  // Sets the A of a row of tiles from k0 on: `rows`, or args.a and args.lda.
  void prepare_rows(int64_t i, const Tiling::Tile& t, int64_t k0, const void** rows, AmxTileArgs& args) const {
    if (plan_.a.in_place()) {  // rows have a constant distance: a_suits_tiles()
      const int64_t size = dtype_size(p_.dtype), pitch = p_.a.row.stride[0] * size;
      const void* first =
          task_.element(p_.a.data, task_.group * p_.a.group_stride + k0 + run_at(p_.a.row, t.start, 1).offset);
      for (int64_t r = 0; r < t.size; ++r) rows[r] = static_cast<const char*>(first) + r * pitch;
      return;
    }
    args.lda = panels_.ld_packed_a(t);
    args.a = panels_.packed_a(task_.group, i) + (plan_.a.whole() ? plan_.steps(k0) * args.lda : 0);
  }

  // The number of rows of tiles, from row i on and before `end`, that one call can compute. They must have the same
  // size, be one run of rows in D, and have a constant distance in A. Sets args.a_step.
  int64_t strip_from(int64_t i, int64_t end, AmxTileArgs& args) const {
    const Tiling::Tile t = plan_.m[i];
    const bool even = !plan_.a.in_place() || p_.a.row.linear();
    const int64_t count = plan_.m.same_size(i, even ? std::min(end - i, plan_.strip) : 1);
    if (count == 1 || run_at(p_.d.row, t.start, t.size * count).length < t.size * count) return 1;
    args.a_step = plan_.a.in_place() ? t.size * p_.a.row.stride[0] * dtype_size(p_.dtype)
                                     : (panels_.packed_a(task_.group, i + 1) - panels_.packed_a(task_.group, i)) *
                                           static_cast<int64_t>(sizeof(T));
    return count;
  }

  // Finds the columns that one call can compute: whole tiles, at a constant distance in B and, if `to_d`, side by side
  // in D.
  void join_columns(int64_t count, bool to_d) {
    const int64_t nr = kernel_.nr;
    const auto whole = [&](const Column& c) {
      return c.tile.size == nr && (!to_d || (c.out_unit && !c.split && (c.aux_unit || !p_.d.aux)));
    };
    joined_[count - 1] = {1, 0};
    for (int64_t j = count - 2; j >= 0; --j) {
      const Column &c = columns_[j], &next = columns_[j + 1];
      joined_[j] = {1, 0};
      if (!whole(c) || !whole(next)) continue;
      const int64_t b_step = static_cast<const char*>(next.b) - static_cast<const char*>(c.b);
      joined_[j].b_step = b_step;
      const bool side_by_side = !to_d || (next.out == c.out + nr && (!p_.d.aux || next.aux == c.aux + nr));
      if (side_by_side && (joined_[j + 1].count == 1 || joined_[j + 1].b_step == b_step || !c.b))
        joined_[j].count = joined_[j + 1].count + 1;
    }
  }

  // What the next rows of tiles will read of A and store to D, in the order of memory. Each call of this row prefetches
  // a share of it. Later blocks are left to the hardware, except packed blocks of A (FetchAhead), because products take
  // so few cycles that more prefetches would delay them.
  struct NextRows {
    Fetch a, c;                  // of all its rows
    int64_t rows = 0, each = 0;  // for each call
  };

  NextRows next_rows(const Range& is, int64_t i, int64_t strip, int64_t calls, int64_t nk,
                     const void* const* rows) const {
    NextRows next;
    if (i + strip >= is.end) return next;
    const int64_t strips = is.end - i - strip < strip ? is.end - i - strip : strip;
    const int64_t size_m = plan_.m[i].size, m = size_m * strip;
    next.rows = size_m * strips;
    next.each = (next.rows + calls - 1) / calls;
    if (plan_.a.in_place() && !p_.a_is_weight && kernel_.parts == 1) {
      const int64_t pitch = p_.a.row.stride[0] * dtype_size(p_.dtype);
      next.a = {static_cast<const char*>(rows[0]) + m * pitch, next.rows, pitch, nk * dtype_size(p_.dtype)};
    }
    // Only rows of D that are one contiguous stretch of memory.
    const Column &first = columns_[0], &last = columns_[calls - 1];
    if (!columns_.all_unit() || !p_.d.row.linear() || output_.streams()) return next;
    const int64_t width = last.out + last.tile.size - first.out, size = dtype_size(p_.out_dtype);
    if (p_.d.row.stride[0] != width) return next;
    const int64_t at = task_.group * p_.d.group_stride + (plan_.m[i].start + m) * width + first.out;
    next.c = {static_cast<const char*>(task_.out_element(p_.d.data, at)), next.rows, width * size, width * size};
    return next;
  }

  static void fetch_share(const NextRows& next, int64_t call, AmxTileArgs& args) {
    const int64_t from = call * next.each, left = next.rows - from, each = next.each * args.panels;
    const int64_t count = left < each ? left : each;
    const auto part = [&](const Fetch& all) {
      return all.rows == 0 || count <= 0 ? Fetch() : Fetch{all.first + from * all.pitch, count, all.pitch, all.width};
    };
    args.next_a = part(next.a);
    args.next_c = part(next.c);
  }

  // Prepares tile i of A to be packed while `tiles` tiles are computed.
  void pack_ahead(int64_t i, int64_t k0, int64_t nk, int64_t tiles) {
    PackAhead& pack = next_a_;
    const Tiling::Tile t = plan_.m[i];
    const Run at = run_at(p_.a.col, k0, nk);
    const int64_t size = dtype_size(p_.dtype);
    const char *src = static_cast<const char*>(task_.source(p_.a)), *aux = nullptr;
    if (p_.a.aux) aux = static_cast<const char*>(task_.aux_source(p_.a));
    for (int64_t r = 0; r < t.size;) {
      const Run run = run_at(p_.a.row, t.start + r, t.size - r);
      const char* row = src + (at.offset + run.offset) * size;
      const char* aux_row = aux ? aux + (at.aux_offset + run.aux_offset) * size : nullptr;
      for (const int64_t end = r + run.length; r < end; ++r, row += run.stride * size) {
        pack.rows[r] = row;
        if (!aux) continue;
        pack.aux[r] = aux_row;
        aux_row += run.aux_stride * size;
      }
    }
    pack.panel = panels_.packed_a(task_.group, i);
    pack.count = t.size;
    pack.k = nk;
    pack.groups = plan_.steps(nk) / (kernel_.ks * kernel_.parts);
    pack.row = pack.group = 0;
    pack.left = pack.count * pack.groups;
    const int64_t products = std::max<int64_t>(tiles * pack.groups * amx_.products, 1);
    pack.each = (pack.left + products - 1) / products;
    pack.step = amx_.pack_ahead[static_cast<int>(task_.mask_of(p_.a))];
  }

  // AmxTileArgs::on_the_fly of a row of tiles, or null. For A: of a strip of tiles `step` bytes apart. For B: all but
  // `vectors`.
  const OnTheFly* on_the_fly(const Tiling::Tile& ti, int64_t step, int64_t k0, int64_t nk) {
    const bool of_a = plan_.a.source == Source::kSplitBetweenProducts;
    if (!of_a && plan_.b.source != Source::kSplitBetweenProducts) return nullptr;
    const Matrix& matrix = of_a ? p_.a : p_.b;
    const Axis &k = of_a ? p_.a.col : p_.b.row, &line = of_a ? p_.a.row : k;
    const int64_t size = dtype_size(p_.dtype), group = kernel_.kr * kernel_.ks * size;
    const int64_t first = of_a ? ti.start : 0;
    const auto at = [&](const void* from, int64_t row, int64_t k_stride) {
      return from ? static_cast<const char*>(from) + (first * row + k0 * k_stride) * size : nullptr;
    };
    on_the_fly_.src = at(task_.source(matrix), line.stride[0], k.stride[0]);
    on_the_fly_.aux = at(task_.aux_source(matrix), line.aux_stride[0], k.aux_stride[0]);
    on_the_fly_.pitch = line.stride[0] * size;
    on_the_fly_.aux_pitch = line.aux_stride[0] * size;
    on_the_fly_.group = k.stride[0] * group;
    on_the_fly_.aux_group = k.aux_stride[0] * group;
    on_the_fly_.step = step;
    on_the_fly_.aux_step = ti.size * on_the_fly_.aux_pitch;
    on_the_fly_.k = nk;
    on_the_fly_.split = amx_.on_the_fly[of_a ? 0 : 1][static_cast<int>(task_.mask_of(matrix))];
    return &on_the_fly_;
  }

  // Sets where the columns of a block lie in a row of B that is split between products. Each tile prefetches the tile
  // after it, which may belong to the next block.
  void place_columns(const Range& js) {
    for (int64_t j = js.begin; j < js.end; ++j) place_vectors(plan_.n[j], vectors_[j - js.begin]);
    OnTheFlyVector after[2];
    place_vectors(plan_.n[js.end < plan_.n.count() ? js.end : js.end - 1], after);
    const OnTheFlyVector* next = after;
    for (int64_t j = js.end - js.begin; j-- > 0; next = vectors_[j])
      for (int v = 0; v < 2; ++v) vectors_[j][v].next = next[v].at, vectors_[j][v].aux_next = next[v].aux_at;
  }

  // Sets the two vectors of one tile. A tile of one vector fills in both.
  void place_vectors(const Tiling::Tile& tile, OnTheFlyVector* vectors) const {
    const auto lanes = [](int64_t n) { return (uint32_t{1} << n) - 1; };
    for (int64_t j = 0; j < tile.size; j += kernel_.vector) {
      const int64_t left = tile.size - j < kernel_.vector ? tile.size - j : kernel_.vector;
      const Run run = run_at(p_.b.col, tile.start + j, left);
      OnTheFlyVector v{run.offset, 0, run.aux_offset, 0, 0, 0, static_cast<uint16_t>(lanes(run.length)), 0};
      if (run.length < left) {
        const Run rest = run_at(p_.b.col, tile.start + j + run.length, left - run.length);
        v.then = rest.offset - run.length;
        v.aux_then = rest.aux_offset - run.length;
        v.second = static_cast<uint16_t>(lanes(left) & ~lanes(run.length));
      }
      for (int64_t i = j / kernel_.vector; i < 2; ++i) vectors[i] = v;
    }
  }

  // AmxTileArgs::repairer: what the repair of a tile in parts needs to know.
  struct Repairer {
    AmxBlock* block;
    ExactSums::Sums of;  // of the call's first tile
    int64_t first;       // its column
    int64_t a_step;
  };
  static void repair_tile(void* repairer, int64_t tile, int64_t panel, float* sums, int64_t ld, bool finite) {
    const Repairer& r = *static_cast<const Repairer*>(repairer);
    ExactSums::Sums of = r.of;
    const Column& c = r.block->columns_[r.first + panel];
    of.tj = c.tile;
    of.b = c.b;
    of.ti.start += tile * of.ti.size;
    of.a = static_cast<const char*>(of.a) + tile * r.a_step;
    r.block->pack_for_repair(of);
    r.block->exact_.repair(sums, ld, finite, of);
  }

  // Packs a tile that was read in place, for exact_.
  void pack_for_repair(ExactSums::Sums& of) {
    const bool of_a = plan_.a.source == Source::kSplitBetweenProducts;
    if (!of_a && plan_.b.source != Source::kSplitBetweenProducts) return;
    const Matrix& matrix = of_a ? p_.a : p_.b;
    const int storage = static_cast<int>(p_.dtype);
    const PackFn fn = of_a ? kernel_.pack_a[static_cast<int>(AccessA::kCols)][storage] : kernel_.pack_b[storage];
    T* const panel = of_a ? panels_.block_a() : panels_.block_b();
    const Tiling::Tile& t = of_a ? of.ti : of.tj;
    (of_a ? of.a : of.b) = panel;
    const int64_t ld = (of_a ? of.lda : of.ldb) = of_a ? t.size : t.padded_size;
    fn(panel, ld, task_.source(matrix), task_.aux_source(matrix), of_a ? matrix.row : matrix.col, t.start, t.size,
       of_a ? matrix.col : matrix.row, of.k0, of.nk, task_.mask_of(matrix));
  }

  const Task& task_;
  const GemmProblem& p_;
  const Plan& plan_;
  const Microkernel& kernel_;
  const AmxKernel& amx_;
  const Panels<T>& panels_;
  Columns<T> columns_;
  Joined joined_[kMaxBlockN];
  ExactSums exact_;
  int64_t tile_;
  T *accumulators_, *partial_;
  Output<T> output_;
  Epilogue epilogues_[2];
  Repairer repairers_[2];
  int epilogue_ = 0, repairer_ = 0;
  OnTheFlyVector vectors_[kMaxBlockN][2];
  OnTheFly on_the_fly_;
  PackAhead next_a_;
  alignas(64) char pending_[kMaxPending];  // only its first bytes are zeroed, to keep small calls fast
};

}  // namespace conv1x1
