// The macrokernel: a thread's share of a GEMM, one loop nest for all of the library.
//
//   for jo in reaches of n        (one, but where accumulators are carried over very many columns)
//     for ic in m blocks
//       for pc in k steps         A's block packed, or read in place
//         for jc in n blocks      B's block packed, or read in place, resident in L2
//           Family::run_block     tiles: fma_block.h, amx_block.h
//
// Nothing here throws or allocates.
#pragma once

#include <algorithm>

#include "fetch_ahead.h"
#include "panels.h"

namespace conv1x1 {

template <class Family>
class Worker {
  using T = typename Family::T;

 public:
  // memory: the thread's part of the workspace.
  Worker(const GemmProblem& problem, const Plan& plan, const Shared& shared, char* memory)
      : task_(problem, plan, shared),
        p_(problem),
        plan_(plan),
        panels_(task_, memory),
        family_(task_, panels_, reinterpret_cast<T*>(memory + plan.block_a + plan.block_b)) {}

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
    family_.enter();
    end_m_ = m.end;
    const bool turns = plan_.groups_take_turns;
    const int64_t turn = turns && !p_.split_k ? plan_.block_m : std::max<int64_t>(m.end - m.begin, 1);
    const Range outer = turns ? s : g, inner = turns ? g : s;
    for (int64_t i = m.begin; i == m.begin || i < m.end; i += turn)
      for (int64_t o = outer.begin; o < outer.end; ++o)
        for (int64_t j = inner.begin; j < inner.end; ++j) {
          task_.group = turns ? j : o;
          task_.slice = turns ? o : j;
          rectangle(next(i, turn, m.end), n);
        }
    family_.leave();
  }

  void join_slices(int part, int parts) { family_.output().join_slices(part, parts); }
  void write_row_sums() { family_.output().write_row_sums(); }

 private:
  static Range tiles(const Tiling& t, int parts, int part, bool whole_segments) {
    if (!whole_segments) return share(t.count(), parts, part);
    const Range r = share(t.segments, parts, part);
    return {r.begin * t.per_segment, r.end * t.per_segment};
  }

  static Range next(int64_t begin, int64_t step, int64_t end) {
    return {begin, begin + step < end ? begin + step : end};
  }

  void rectangle(const Range& m, const Range& n) {
    const bool carried = plan_.k_step < plan_.slice;
    const int64_t begin = task_.slice * plan_.slice;
    const int64_t end = begin + plan_.slice < p_.k ? begin + plan_.slice : p_.k;
    for (int64_t jo = n.begin; jo == n.begin || jo < n.end; jo += plan_.reach_n) {  // once for n = 0: row sums alone
      reach_ = next(jo, plan_.reach_n, n.end);
      const bool one_block = reach_.end - reach_.begin <= plan_.block_n;
      for (int64_t ic = m.begin; ic < m.end; ic += plan_.block_m) {
        const Range is = next(ic, plan_.block_m, m.end);
        panels_.begin_a(is.begin);
        int64_t k0 = begin;
        do {  // once for k = 0: the epilogue of an empty sum
          const int64_t nk = k0 + plan_.k_step < end ? plan_.k_step : end - k0;
          const bool sums_rows = sums_here_ && !p_.exchanged && jo == n.begin;
          if (plan_.a.by_block())
            panels_.pack_block_a(plan_.packs_ahead() ? next(is.begin, 1, is.end) : is, k0, nk, [&](int64_t i) {
              if (sums_rows) add_row_sums(i, k0, nk);
            });
          for (int64_t jc = reach_.begin; jc < reach_.end; jc += plan_.block_n) {
            const Range js = next(jc, plan_.block_n, reach_.end);
            panels_.begin_b(js.begin);
            if (plan_.b.by_block() && (carried || ic == m.begin || !one_block)) panels_.pack_block_b(js, k0, nk);
            if (sums_here_ && p_.exchanged && ic == m.begin) add_column_sums(js, k0, nk);
            look_ahead(is, next(ic + plan_.block_m, plan_.block_m, end_m_), js, k0, nk, begin, end);
            family_.run_block({is, js, k0, nk, k0 == begin, k0 + nk == end, js.begin - reach_.begin}, ahead_);
          }
          k0 += plan_.k_step;
        } while (k0 < end);
      }
    }
  }

  // Adds the sums of a packed tile's rows to the sums of this slice.
  void add_row_sums(int64_t i, int64_t k0, int64_t nk) {
    double* sums = task_.shared.sums + (task_.slice * p_.groups + task_.group) * p_.m;
    const Tiling::Tile t = plan_.m[i];
    double here[kMaxMr] = {};
    task_.kernel.sum_rows(here, panels_.packed_a(task_.group, i), panels_.ld_packed_a(t), t.size, plan_.steps(nk),
                          plan_.a_access);
    family_.repair_sums(here, true, t, k0, nk);
    for (int64_t r = 0; r < t.size; ++r) sums[t.start + r] += here[r];
  }

  void add_column_sums(const Range& js, int64_t k0, int64_t nk) {
    double* sums = task_.shared.sums + (task_.slice * p_.groups + task_.group) * p_.n;
    for (int64_t j = js.begin; j < js.end; ++j) {
      const Tiling::Tile t = plan_.n[j];
      double here[kMaxNr] = {};
      task_.kernel.sum_columns(here, panels_.packed_b(task_.group, j), t.padded_size, t.size, plan_.steps(nk));
      family_.repair_sums(here, false, t, k0, nk);
      for (int64_t c = 0; c < t.size; ++c) sums[t.start + c] += here[c];
    }
  }

  void fetch_a(const Range& is, int64_t k0, int64_t nk, bool near = false) {
    if (p_.a_is_weight || is.begin >= is.end) return;
    const int64_t begin = plan_.m[is.begin].start, end = plan_.m[is.end - 1].start + plan_.m[is.end - 1].size;
    ahead_.add(p_.a, task_.group, dtype_size(p_.dtype), p_.a.row, begin, end - begin, p_.a.col, k0, nk, near);
  }
  void fetch_b(const Range& js, int64_t k0, int64_t nk) {
    if (p_.b_is_weight || js.begin >= js.end) return;
    const int64_t begin = plan_.n[js.begin].start, end = plan_.n[js.end - 1].start + plan_.n[js.end - 1].size;
    ahead_.add(p_.b, task_.group, dtype_size(p_.dtype), p_.b.col, begin, end - begin, p_.b.row, k0, nk, false);
  }

  // Sets up the prefetches of block (is, js, k0): the rows of A that its own later tiles read in place, and the blocks
  // that come next in rectangle()'s loops.
  void look_ahead(const Range& is, const Range& next_is, const Range& js, int64_t k0, int64_t nk, int64_t begin,
                  int64_t end) {
    ahead_.clear();
    if (!Family::fetches_blocks(p_, plan_)) return;
    const bool a_rows = plan_.a.in_place() && plan_.a_access == AccessA::kRows;
    if (a_rows && plan_.fetches_rows) fetch_a({is.begin + plan_.strip + 1, is.end}, k0, nk, plan_.partials_kept == 1);
    if (js.end < reach_.end) return fetch_b(next(js.end, plan_.block_n, reach_.end), k0, nk);
    if (k0 + nk < end) {
      const int64_t then = k0 + nk, size = end - then < plan_.k_step ? end - then : plan_.k_step;
      if (!a_rows) fetch_a(is, then, size);
      return fetch_b(next(reach_.begin, plan_.block_n, reach_.end), then, size);
    }
    fetch_a(next_is, begin, end - begin < plan_.k_step ? end - begin : plan_.k_step);
  }

  Task task_;
  const GemmProblem& p_;
  const Plan& plan_;
  Panels<T> panels_;
  Family family_;
  FetchAhead ahead_;
  Range reach_{0, 0};
  int64_t end_m_ = 0;  // the end of this part's tiles of m
  bool sums_here_ = false;
};

}  // namespace conv1x1
