// The macrokernel: a thread's share of a GEMM, one loop nest for all of the library.
//
//   for jo in reaches of n (one, but where accumulators are carried over very many columns)
//     for ic in m blocks
//       for pc in k steps         A's block packed, or read in place
//         for jc in n blocks      B's block packed, or read in place, resident in L2
//           for ir in m tiles
//             for jr in n tiles   microkernel over chains of kc, then the epilogue
//
// Nothing here throws or allocates. T: the accumulators' type; an element of a panel is as wide (microkernel.h).
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>

#include "columns.h"
#include "fetch_ahead.h"

namespace conv1x1 {

template <class T>
class Worker : private Columns<T> {
 public:
  Worker(const GemmProblem& problem, const Plan& plan, const Shared& shared, char* own)
      : Columns<T>(problem, plan, shared, own) {
    if (kernel_.finish_pending) std::memset(pending_, 0, kPendingState);
    accumulators_ = reinterpret_cast<T*>(own + plan.block_a + plan.block_b);
    tile_ = kernel_.mr * kernel_.nr;
    carried_ = plan.k_step < plan.slice;
    partial_ = accumulators_ + plan.kept() * tile_;
    staged_ = partial_ + plan.partials_kept * tile_;
    residual_ = staged_ + plan.staged * tile_;
    streams_ = plan.streams && !transcendental_;
    if (half_out_) half_store_ = p_.out_dtype == DType::kBFloat16 ? Store::kBFloat16 : Store::kFloat16;
    constexpr double inf = std::numeric_limits<double>::infinity();
    epilogue_.lower = p_.activation == Activation::kReLU || p_.activation == Activation::kReLU6 ? 0 : -inf;
    epilogue_.upper = p_.activation == Activation::kReLU6 ? 6 : inf;
    // The limits for the bits of a pooled output: below or above them the output would be 0 or 6 after rounding to its
    // half type.
    if (p_.dtype == DType::kFloat16) mask_low_ = 0x1p-25;
    if (p_.activation == Activation::kReLU6)
      mask_high_ = p_.dtype == DType::kFloat16 ? 6 - 0x1p-9 : (p_.dtype == DType::kBFloat16 ? 6 - 0x1p-6 : 6);
  }

  void compute(int part) {
    const Range n = tiles(plan_.n, plan_.part_n, part % plan_.part_n, p_.pool && p_.pool_along_n);
    bool sums_here = part % plan_.part_n == 0;
    part /= plan_.part_n;
    const Range m = tiles(plan_.m, plan_.part_m, part % plan_.part_m, p_.pool && !p_.pool_along_n);
    if (p_.exchanged) sums_here = part % plan_.part_m == 0;
    sums_here_ = p_.row_sums.data && sums_here;
    part /= plan_.part_m;
    const Range s = share(plan_.slices, plan_.part_k, part % plan_.part_k);
    const Range g = share(p_.groups, plan_.part_g, part / plan_.part_k);
    if (kernel_.enter) kernel_.enter();
    end_m_ = m.end;
    const bool turns = plan_.groups_take_turns;
    const int64_t turn = turns && !p_.split_k ? plan_.block_m : std::max<int64_t>(m.end - m.begin, 1);
    const Range outer = turns ? s : g, inner = turns ? g : s;
    for (int64_t i = m.begin; i == m.begin || i < m.end; i += turn)
      for (int64_t o = outer.begin; o < outer.end; ++o)
        for (int64_t j = inner.begin; j < inner.end; ++j) {
          group_ = turns ? j : o;
          slice_ = turns ? o : j;
          rectangle(next(i, turn, m.end), n);
        }
    if (kernel_.leave) kernel_.leave();
  }

  // Adds the k-slices of this part's rows of groups * m, in the order of the slices.
  void join_slices(int part, int parts) {
    const Range rows = share(p_.groups * p_.m, parts, part);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      T* sum = slice_sum(0, row);
      for (int64_t s = 1; s < plan_.slices; ++s) {
        const T* next = slice_sum(s, row);
        for (int64_t j = 0; j < p_.n; ++j) sum[j] += next[j];
      }
      const int64_t group = row / p_.m, i = row % p_.m;
      if (p_.d.aux) {
        for (int64_t j = 0; j < p_.n; j += kernel_.nr) {
          const int64_t width = p_.n - j < kernel_.nr ? p_.n - j : kernel_.nr;
          gather_residual(group, i, 1, j, width);
          for (int64_t c = 0; c < width; ++c) sum[j + c] += residual_[c];
        }
      }
      kernel_.unpack[out_storage_](out_element(p_.d.data, group * p_.d.group_stride), p_.d.row, i, 1, p_.d.col, 0, p_.n,
                                   sum, p_.n);
    }
  }

  void write_row_sums() {
    const int64_t rows = p_.groups * (p_.exchanged ? p_.n : p_.m);
    for (int64_t row = 0; row < rows; ++row) {
      double sum = 0;
      for (int64_t s = 0; s < plan_.slices; ++s) sum += shared_.sums[s * rows + row];
      Axis one;
      one.size[0] = one.count = 1;
      void* to = out_element(p_.row_sums.data, row * p_.row_sums.stride);
      T value = static_cast<T>(sum);
      if (p_.row_sums_accumulate) {
        T before;
        kernel_.gather[out_storage_](&before, 1, to, nullptr, one, 0, 1, one, 0, 1, Mask::kNone);
        value += before;
      }
      kernel_.unpack[out_storage_](to, one, 0, 1, one, 0, 1, &value, 1);
    }
  }

 private:
  using Base = Columns<T>;
  using Base::add_column_sums;
  using Base::element, Base::packed_a, Base::packed_b, Base::ld_packed_a, Base::pack_block_a, Base::pack_block_b;
  using Base::exact_, Base::p_, Base::plan_, Base::kernel_, Base::shared_, Base::group_, Base::slice_, Base::first_a_,
      Base::first_b_, Base::columns_, Base::prepare_columns, Base::all_unit_, Base::whole_out_, Base::half_out_,
      Base::transcendental_, Base::out_storage_;
  using Base::fed_, Base::feed, Base::feed_, Base::pack_fed;
  using Base::finish_packing, Base::next_a_, Base::pack_ahead;
  using typename Base::Column;

  void* out_element(void* base, int64_t offset) const {
    return static_cast<char*>(base) + offset * dtype_size(p_.out_dtype);
  }

  static Range tiles(const Tiling& t, int parts, int part, bool whole_segments) {
    if (!whole_segments) return share(t.count(), parts, part);
    const Range r = share(t.segments, parts, part);
    return {r.begin * t.per_segment, r.end * t.per_segment};
  }

  T* slice_sum(int64_t slice, int64_t row) const {
    return reinterpret_cast<T*>(shared_.partials) + (slice * p_.groups * p_.m + row) * p_.n;
  }

  static Range next(int64_t begin, int64_t step, int64_t end) {
    return {begin, begin + step < end ? begin + step : end};
  }

  void rectangle(const Range& m, const Range& n) {
    const int64_t begin = slice_ * plan_.slice, end = begin + plan_.slice < p_.k ? begin + plan_.slice : p_.k;
    for (int64_t jo = n.begin; jo == n.begin || jo < n.end; jo += plan_.reach_n) {  // once for n = 0: row sums alone
      reach_ = next(jo, plan_.reach_n, n.end);
      const bool one_block = reach_.end - reach_.begin <= plan_.block_n;
      for (int64_t ic = m.begin; ic < m.end; ic += plan_.block_m) {
        const Range is = next(ic, plan_.block_m, m.end);
        first_a_ = is.begin;
        int64_t k0 = begin;
        do {  // once for k = 0: the epilogue of an empty sum
          const int64_t nk = k0 + plan_.k_step < end ? plan_.k_step : end - k0;
          const bool sums_rows = sums_here_ && !p_.exchanged && jo == n.begin;
          if (plan_.a == Operand::kPackBlock)
            pack_block_a(plan_.packs_ahead ? next(is.begin, 1, is.end) : is, k0, nk, sums_rows);
          for (int64_t jc = reach_.begin; jc < reach_.end; jc += plan_.block_n) {
            const Range js = next(jc, plan_.block_n, reach_.end);
            first_b_ = js.begin;
            if (plan_.b == Operand::kPackBlock && (carried_ || ic == m.begin || !one_block)) pack_block_b(js, k0, nk);
            if (sums_here_ && p_.exchanged && ic == m.begin) add_column_sums(js, k0, nk);
            look_ahead(is, next(ic + plan_.block_m, plan_.block_m, end_m_), js, k0, nk, begin, end);
            block(is, js, k0, nk, k0 == begin, k0 + nk == end);
          }
          k0 += plan_.k_step;
        } while (k0 < end);
      }
    }
  }

  void fetch_a(const Range& is, int64_t k0, int64_t nk, bool near = false) {
    if (p_.a_is_weight || is.begin >= is.end) return;
    const int64_t begin = plan_.m[is.begin].start, end = plan_.m[is.end - 1].start + plan_.m[is.end - 1].size;
    ahead_.add(p_.a, group_, dtype_size(p_.dtype), p_.a.row, begin, end - begin, p_.a.col, k0, nk, near);
  }
  void fetch_b(const Range& js, int64_t k0, int64_t nk) {
    if (p_.b_is_weight || js.begin >= js.end) return;
    const int64_t begin = plan_.n[js.begin].start, end = plan_.n[js.end - 1].start + plan_.n[js.end - 1].size;
    ahead_.add(p_.b, group_, dtype_size(p_.dtype), p_.b.col, begin, end - begin, p_.b.row, k0, nk, false);
  }

  // Sets up the prefetches of block (is, js, k0): the rows of A that its own later tiles read in place, and the blocks
  // that come next in rectangle()'s loops.
  void look_ahead(const Range& is, const Range& next_is, const Range& js, int64_t k0, int64_t nk, int64_t begin,
                  int64_t end) {
    ahead_.clear();
    if (kernel_.ks > 1 && (p_.split_k || plan_.a != Operand::kPackBlock || plan_.b == Operand::kDirect))
      return;  // see next_rows
    const bool a_rows = plan_.a == Operand::kDirect && plan_.a_access == AccessA::kRows;
    if (a_rows && plan_.fetches_rows) fetch_a({is.begin + plan_.strip + 1, is.end}, k0, nk, plan_.partials_kept == 1);
    if (js.end < reach_.end) return fetch_b(next(js.end, plan_.block_n, reach_.end), k0, nk);
    if (k0 + nk < end) {
      const int64_t then = k0 + nk, size = end - then < plan_.k_step ? end - then : plan_.k_step;
      if (!a_rows) fetch_a(is, then, size);
      return fetch_b(next(reach_.begin, plan_.block_n, reach_.end), then, size);
    }
    fetch_a(next_is, begin, end - begin < plan_.k_step ? end - begin : plan_.k_step);
  }

  // Sets the A of a row of tiles from k0 on: args.a_rows or args.a, and args.lda.
  void prepare_row(int64_t i, const Tiling::Tile& t, int64_t k0, const void** rows, TileArgs& args) const {
    const bool direct = plan_.a == Operand::kDirect;
    const int64_t step = plan_.a == Operand::kPackOnce ? plan_.steps(k0) : 0;
    args.lda = direct ? p_.a.col.inner_stride() : ld_packed_a(t);
    if (direct && plan_.a_access == AccessA::kRows) {
      args.a_pitch = p_.a.row.stride[0] * dtype_size(p_.dtype);
      place_rows(t.start, t.size, k0, rows);
    } else if (plan_.a_access == AccessA::kRows) {
      const T* a = packed_a(group_, i) + step;
      args.a_pitch = args.lda * static_cast<int64_t>(sizeof(T));
      for (int64_t r = 0; r < t.size; ++r) rows[r] = a + r * args.lda;
    } else {
      // What is read in place along m is not converted, so its elements are as wide as those of a panel.
      args.a = direct ? element(p_.a.data, group_ * p_.a.group_stride + k0 * args.lda + t.start)
                      : packed_a(group_, i) + step * args.lda;
      args.a_pitch = sizeof(T);
      args.a_k = args.lda;
      for (int64_t r = 0; r < t.size && kernel_.ks == 1; ++r) rows[r] = static_cast<const T*>(args.a) + r;
    }
    args.a_rows = rows;
  }

  // Sets the pointers to rows of A in place, from k0 on.
  void place_rows(int64_t first, int64_t count, int64_t k0, const void** rows) const {
    const int64_t from = group_ * p_.a.group_stride + k0, size = dtype_size(p_.dtype);
    for (int64_t r = 0; r < count;) {
      const Run run = run_at(p_.a.row, first + r, count - r);
      const char* row = static_cast<const char*>(element(p_.a.data, from + run.offset));
      for (int64_t end = r + run.length; r < end; ++r, row += run.stride * size) rows[r] = row;
    }
  }

  // The number of rows of tiles, from row i on and before `end`, that one call can compute. They must have the same
  // size and be one run of rows in D. In A they must have a constant distance, unless the kernel takes a pointer for
  // each row.
  int64_t strip_from(int64_t i, int64_t end, int64_t k0, const void** rows, TileArgs& args) const {
    const Tiling::Tile t = plan_.m[i];
    const bool own_rows = plan_.a == Operand::kDirect && !p_.a.row.linear();
    int64_t most = end - i < plan_.strip ? end - i : plan_.strip;
    if (own_rows) {  // not together with pieces of k, which is slower
      const bool one = kernel_.pitched || kernel_.ks > 1 || plan_.partials_kept > 1;
      most = one ? 1 : std::min(most, kMaxStripRows / t.size);
    }
    const int64_t count = plan_.m.alike(i, most);
    if (count == 1 || run_at(p_.d.row, t.start, t.size * count).length < t.size * count) return 1;
    if (own_rows) {
      args.own_rows = t.size;
      place_rows(t.start, t.size * count, k0, rows);
    } else if (plan_.a == Operand::kDirect) {
      args.a_step = t.size * p_.a.row.stride[0] * dtype_size(p_.dtype);
    } else {
      args.a_step = (packed_a(group_, i + 1) - packed_a(group_, i)) * static_cast<int64_t>(sizeof(T));
    }
    return count;
  }

  // With AMX: what the next rows of tiles will read of A and store to D, in the order of memory. Each call of this row
  // prefetches a share of it. Later blocks are left to the hardware, except packed blocks of A (look_ahead), because
  // products take so few cycles that more prefetches would delay them.
  struct NextRows {
    Fetch a, c;                  // of all its rows
    int64_t rows = 0, each = 0;  // for each call
  };

  NextRows next_rows(const Range& is, int64_t i, int64_t strip, const Range& js, int64_t nk,
                     const void* const* rows) const {
    NextRows next;
    if (kernel_.ks == 1 || i + strip >= is.end) return next;
    const int64_t strips = is.end - i - strip < strip ? is.end - i - strip : strip;
    const int64_t size_m = plan_.m[i].size, m = size_m * strip, calls = js.end - js.begin;
    next.rows = size_m * strips;
    next.each = (next.rows + calls - 1) / calls;
    if (plan_.a == Operand::kDirect && !p_.a_is_weight && kernel_.parts == 1) {
      const int64_t pitch = p_.a.row.stride[0] * dtype_size(p_.dtype);
      next.a = {static_cast<const char*>(rows[0]) + m * pitch, next.rows, pitch, nk * dtype_size(p_.dtype)};
    }
    // Only rows of D that are one contiguous stretch of memory.
    const Column &first = columns_[0], &last = columns_[calls - 1];
    if (!all_unit_ || !p_.d.row.linear() || streams_) return next;
    const int64_t width = last.out + last.tile.size - first.out, size = dtype_size(p_.out_dtype);
    if (p_.d.row.stride[0] != width) return next;
    const void* out = out_element(p_.d.data, group_ * p_.d.group_stride + (plan_.m[i].start + m) * width + first.out);
    next.c = {static_cast<const char*>(out), next.rows, width * size, width * size};
    return next;
  }

  static void fetch_share(const NextRows& next, int64_t call, TileArgs& args) {
    const int64_t from = call * next.each, left = next.rows - from, each = next.each * args.panels;
    const int64_t count = left < each ? left : each;
    const auto part = [&](const Fetch& all) {
      return all.rows == 0 || count <= 0 ? Fetch() : Fetch{all.first + from * all.pitch, count, all.pitch, all.width};
    };
    args.next_a = part(next.a);
    args.next_c = part(next.c);
  }

  // TileArgs::repair, of a tile in parts.
  struct Repairer {
    Worker* worker;
    ExactSums::Sums of;  // of the call's first tile
    const Column* first;
    int64_t a_step;
  };
  static void repair_tile(void* repairer, int64_t tile, int64_t panel, float* sums, int64_t ld, bool finite) {
    const Repairer& r = *static_cast<const Repairer*>(repairer);
    ExactSums::Sums of = r.of;
    const Column& c = r.first[panel];
    of.tj = c.tile;
    of.b = c.b;
    of.ti.start += tile * of.ti.size;
    of.a = static_cast<const char*>(of.a) + tile * r.a_step;
    r.worker->pack_fed(of);
    r.worker->exact_.repair(sums, ld, finite, of);
  }

  void block(const Range& is, const Range& js, int64_t k0, int64_t nk, bool first, bool last) {
    const void* rows[kMaxStripRows];
    prepare_columns(js, k0, last);
    int64_t tiles_left = (is.end - is.begin) * (js.end - js.begin);
    for (int64_t i = is.begin, strip = 0; i < is.end; i += strip) {
      const Tiling::Tile ti = plan_.m[i];
      TileArgs args;
      args.k = plan_.steps(nk);
      args.m = ti.size;
      args.chain = plan_.steps(plan_.kc);
      args.piece = plan_.piece;
      args.partial = partial_;
      if (kernel_.finish_pending) args.pending = pending_;
      prepare_row(i, ti, k0, rows, args);
      const TileFn* fns = kernel_.fn[static_cast<int>(plan_.a_access)][ti.size - 1];
      strip = first && last && all_unit_ ? strip_from(i, is.end, k0, rows, args) : 1;
      const Run row = p_.pool ? Run() : run_at(p_.d.row, ti.start, ti.size * strip);
      const bool rows_of_tiles =
          kernel_.ks > 1 && !transcendental_ && (!last || plan_.slices > 1 || p_.pool || row.length == ti.size * strip);
      const int64_t most = p_.pool && last ? plan_.staged : kMaxBlockN;
      const NextRows next = next_rows(is, i, strip, js, nk, rows);
      const bool packs = plan_.packs_ahead && i + 1 < is.end;
      if (packs) pack_ahead(i + 1, k0, nk, js.end - js.begin);
      args.pack = packs ? &next_a_ : nullptr;
      args.feed = feed(ti, args.a_step, k0, nk);
      for (int64_t j = 0; j < js.end - js.begin; j += args.panels) {
        const Column& c = columns_[j];
        args.panels = rows_of_tiles ? std::min(c.alike, most) : 1;
        args.b_step = args.panels > 1 ? c.b_step : 0;
        T* sum = carried_ ? accumulators_ + ((i - is.begin) * plan_.reach_n + js.begin - reach_.begin + j) * tile_
                          : partial_;
        const TileFn fn = fns[c.tile.padded_size / kernel_.vector - 1];
        args.b = c.b;
        args.ldb = c.ldb;
        feed_.vectors = fed_[j];
        args.n = c.tile.size;
        if (kernel_.parts > 1) {
          Repairer& r = repairers_[repairer_ ^= 1];  // the repairer of the pending tile is still in use
          r = {this, {group_, k0, nk, ti, c.tile, args.a, c.b, args.lda, c.ldb, args.k}, &c, args.a_step};
          args.mirrored = p_.b_is_weight;
          args.repair = repair_tile;
          args.repairer = &r;
        }
        args.tiles = strip;
        ahead_.share(tiles_left, args);
        tiles_left -= strip * args.panels;
        if (next.rows > 0) fetch_share(next, j, args);
        args.c_in = first ? nullptr : sum;
        args.ld_in = kernel_.nr;
        args.panel_in = tile_;
        args.panel_out = last && !p_.pool ? kernel_.nr : tile_;
        if (last) {
          finish(fn, args, ti, row, c);
        } else {
          args.c_out = sum;
          args.ld_out = kernel_.nr;
          fn(args);
        }
      }
      if (packs) finish_packing();
    }
    if (kernel_.finish_pending) kernel_.finish_pending(pending_);
  }

  // Prefetches for writing the lines to which a tile will be stored. Stores leave the core in order, so a store that
  // waits for its line delays all later stores.
  void prefetch_out(const void* out, int64_t ld, int64_t rows, int64_t cols) const {
    const int64_t size = dtype_size(p_.out_dtype), bytes = cols * size;
    for (int64_t i = 0; i < rows; ++i) {
      const char* row = static_cast<const char*>(out) + i * ld * size;
      for (int64_t j = 0; j < bytes; j += 64) __builtin_prefetch(row + j, 1);
      __builtin_prefetch(row + bytes - 1, 1);
    }
  }

  void prefetch_split(const void* out, int64_t ld, int64_t rows, const Split& s) const {
    const int64_t size = dtype_size(p_.out_dtype), last = s.then + kernel_.vector - 1;
    for (int64_t i = 0; i < rows; ++i) {
      const char* row = static_cast<const char*>(out) + i * ld * size;
      __builtin_prefetch(row + s.at * size, 1);
      __builtin_prefetch(row + last * size, 1);
    }
  }

  void gather_residual(int64_t group, int64_t r0, int64_t nr, int64_t c0, int64_t nc) {
    kernel_.gather[out_storage_](residual_, kernel_.nr, out_element(p_.d.aux, group * p_.d.aux_group_stride), nullptr,
                                 aux_axis(p_.d.row), r0, nr, aux_axis(p_.d.col), c0, nc, Mask::kNone);
  }

  // Computes a tile to its end: the sum of a k-slice, or epilogue and store. `args` is filled in place. A copy of it
  // would read what was just written, in wider pieces, and so wait until all stores of the tile before have left the
  // core.
  void finish(TileFn fn, TileArgs& args, const Tiling::Tile& ti, const Run& row, const Column& c) {
    const Tiling::Tile& tj = c.tile;
    if (plan_.slices > 1) {
      args.c_out = slice_sum(slice_, group_ * p_.m + ti.start) + tj.start;
      args.ld_out = p_.n;
      fn(args);
      return;
    }
    Epilogue& e = epilogues_[turn_ ^= 1];  // the pending tile may still use the other one
    e = epilogue_;
    if (p_.bias.data) {
      const T* bias = reinterpret_cast<const T*>(shared_.bias);
      if (p_.bias_along_m)
        e.bias_m = bias + group_ * p_.m + ti.start;
      else
        e.bias_n = bias + group_ * p_.n + tj.start;
    }
    args.epilogue = &e;
    const Matrix& d = p_.d;
    void* out = staged_;
    int64_t ld = kernel_.nr;
    const bool one_run = row.length == ti.size * args.tiles, aux_in_place = d.aux && one_run && c.aux_unit;
    // A tile that is stored as a half type reads its residual as that type.
    const bool direct = !p_.pool && one_run && c.out_unit && ((whole_out_ && !c.split) || !d.aux || aux_in_place);
    args.splits = direct && c.split ? c.splits : nullptr;
    args.fetch_out = false;
    if (direct) {
      out = out_element(d.data, group_ * d.group_stride + row.offset + c.out);
      ld = row.stride;
      e.store = half_store_;
      const int64_t size = dtype_size(p_.out_dtype);
      const bool whole_lines = ((reinterpret_cast<uintptr_t>(out) | static_cast<uintptr_t>(ld * size)) & 63) == 0 &&
                               tj.size * size % 64 == 0;
      e.stream = streams_ && whole_lines && !c.split;
      args.fetch_out = !e.stream;
      const bool fetches = !e.stream && args.next_c.rows == 0;
      if (fetches && c.split)
        for (int64_t j = 0; j < tj.padded_size / kernel_.vector; ++j) prefetch_split(out, ld, ti.size, c.splits[j]);
      else if (fetches)
        prefetch_out(out, ld, ti.size, tj.size * args.panels);
    }
    if (aux_in_place && ((whole_out_ && !c.split) || direct)) {
      e.residual = out_element(d.aux, group_ * d.aux_group_stride + row.aux_offset + c.aux);
      e.ld_residual = row.aux_stride;
    } else if (d.aux) {
      gather_residual(group_, ti.start, ti.size, tj.start, tj.size);
      e.residual = residual_;
      e.ld_residual = kernel_.nr;
    }
    args.c_out = out;
    args.ld_out = ld;
    fn(args);
    if (kernel_.finish_pending && (transcendental_ || !direct || e.residual == residual_))
      kernel_.finish_pending(pending_);
    if (transcendental_) kernel_.activate(out, ld, ti.size * args.tiles, tj.size, p_.activation);
    if (p_.pool)
      for (int64_t i = 0; i < args.panels; ++i) pool(staged_ + i * tile_, ti, (&c)[i].tile);
    else if (!direct)
      kernel_.unpack[out_storage_](out_element(d.data, group_ * d.group_stride), d.row, ti.start, ti.size, d.col,
                                   tj.start, tj.size, out, ld);
  }

  // Adds a finished tile's pixels to the sums of the images that they belong to.
  void pool(const T* out, const Tiling::Tile& ti, const Tiling::Tile& tj) {
    const bool columns = p_.pool_along_n;
    const int64_t channels = p_.groups * (columns ? p_.m : p_.n), pixels = columns ? p_.n_segment : p_.m_segment;
    const Tiling::Tile &at = columns ? tj : ti, &of = columns ? ti : tj;
    if (p_.pool_mask)
      kernel_.put_bits(p_.pool_mask, (group_ * p_.m + ti.start) * p_.n + tj.start, p_.n, out, kernel_.nr, ti.size,
                       tj.size, mask_low_, mask_high_);
    double* sums = p_.pool + group_ * (columns ? p_.m : p_.n) + of.start;
    for (int64_t i = 0; i < at.size;) {
      const int64_t image = (at.start + i) / pixels, left = (image + 1) * pixels - at.start;
      const int64_t end = left < at.size ? left : at.size;
      kernel_.pool(sums + image * channels, out + i * (columns ? 1 : kernel_.nr), kernel_.nr, end - i, of.size,
                   columns);
      i = end;
    }
  }

  Epilogue epilogue_, epilogues_[2];
  int turn_ = 0, repairer_ = 0;
  Repairer repairers_[2];
  alignas(64) char pending_[kMaxPending];  // zeroed only for kernels that use it, to keep small calls fast
  T *accumulators_, *partial_, *staged_, *residual_;
  Range reach_{0, 0};
  int64_t end_m_ = 0;  // of all that this part computes
  FetchAhead ahead_;
  int64_t tile_;
  Store half_store_ = Store::kAsIs;
  double mask_low_ = 0, mask_high_ = std::numeric_limits<double>::quiet_NaN();  // NaN: no value is >= NaN
  bool carried_, streams_, sums_here_ = false;
};

}  // namespace conv1x1
