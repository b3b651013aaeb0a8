// Computes the tiles of a block by the multiply-add kernels. T as in panels.h.
#pragma once

#include <algorithm>

#include "fetch_ahead.h"
#include "output.h"

namespace conv1x1 {

template <class Accumulator>
class FmaBlock {
 public:
  using T = Accumulator;

  // accumulators: memory for plan.kept() tiles, then for plan.partials_kept tiles, then what Output takes.
  FmaBlock(const Task& task, const Panels<T>& panels, T* accumulators)
      : task_(task),
        p_(task.p),
        plan_(task.plan),
        kernel_(task.kernel),
        fma_(*task.kernel.fma),
        panels_(panels),
        columns_(task, panels),
        tile_(task.kernel.mr * task.kernel.nr),
        accumulators_(accumulators),
        partial_(accumulators + task.plan.kept() * tile_),
        output_(task, columns_, partial_ + task.plan.partials_kept * tile_,
                partial_ + (task.plan.partials_kept + task.plan.staged) * tile_) {}

  Output<T>& output() { return output_; }

  void enter() {}
  void leave() {}
  // Does FetchAhead prefetch the next blocks?
  static bool fetches_blocks(const GemmProblem&, const Plan&) { return true; }
  void repair_sums(double*, bool, const Tiling::Tile&, int64_t, int64_t) const {}

  void run_block(const Block& block, FetchAhead& ahead) {
    const void* rows[kMaxStripRows];
    const Range &is = block.is, &js = block.js;
    columns_.prepare(js, block.k0);
    const bool carried = plan_.k_step < plan_.slice, strips = block.first && block.last && columns_.all_unit();
    int64_t tiles_left = (is.end - is.begin) * (js.end - js.begin);
    for (int64_t i = is.begin, strip = 0; i < is.end; i += strip) {
      const Tiling::Tile ti = plan_.m[i];
      FmaTileArgs args;
      args.k = plan_.steps(block.nk);
      args.m = ti.size;
      args.chain = plan_.steps(plan_.kc);
      args.piece = plan_.piece;
      args.partial = partial_;
      args.a_rows = rows;
      prepare_rows(i, ti, block.k0, rows, args);
      strip = strips ? strip_from(i, is.end, block.k0, rows, args) : 1;
      args.tiles = strip;
      const Run row = p_.pool ? Run() : run_at(p_.d.row, ti.start, ti.size * strip);
      const FmaTileFn* fns = fma_.fn[ti.size - 1];
      for (int64_t j = 0; j < js.end - js.begin; ++j) {
        const Column& c = columns_[j];
        const FmaTileFn fn = fns[c.tile.padded_size / kernel_.vector - 1];
        T* sum = carried ? accumulators_ + ((i - is.begin) * plan_.reach_n + block.first_column + j) * tile_ : partial_;
        args.b = c.b;
        args.ldb = c.ldb;
        args.n = c.tile.size;
        args.fetch = ahead.share(tiles_left, strip, args.k);
        tiles_left -= strip;
        args.c_in = block.first ? nullptr : sum;
        args.ld_in = kernel_.nr;
        if (!block.last) {
          args.c_out = sum;
          args.ld_out = kernel_.nr;
          fn(args);
        } else if (plan_.slices > 1) {
          args.c_out = task_.slice_sum<T>(task_.slice, task_.group * p_.m + ti.start) + c.tile.start;
          args.ld_out = p_.n;
          fn(args);
        } else {
          const auto place = output_.enter(args, epilogue_, ti, row, c, 1, true);
          args.fetch_out = place.in_d && !epilogue_.stream;
          fn(args);
          output_.leave(place, ti, strip, 1, [&](int64_t) -> const Column& { return c; });
        }
      }
    }
  }

 private:
  static constexpr int64_t kMaxStripRows = 256;

  // Sets the A of a row of tiles from k0 on. strip_from() decides later how many rows of tiles are one call.
  void prepare_rows(int64_t i, const Tiling::Tile& t, int64_t k0, const void** rows, FmaTileArgs& args) const {
    const int64_t step = plan_.a.whole() ? plan_.steps(k0) : 0;
    const bool in_place = plan_.a.in_place();
    if (in_place && plan_.a_access == AccessA::kRows) {
      args.a_pitch = p_.a.row.stride[0] * dtype_size(p_.dtype);
      place_rows(t.start, t.size, k0, rows);
      return;
    }
    const int64_t ld = in_place ? p_.a.col.inner_stride() : panels_.ld_packed_a(t);
    int64_t pitch = 1;  // from row to row, in elements
    const T* a;
    if (plan_.a_access == AccessA::kRows) {
      a = panels_.packed_a(task_.group, i) + step;
      pitch = ld;
    } else {
      // What is read in place along m is not converted, so its elements are as wide as those of a panel.
      a = in_place
              ? static_cast<const T*>(task_.element(p_.a.data, task_.group * p_.a.group_stride + k0 * ld + t.start))
              : panels_.packed_a(task_.group, i) + step * ld;
      args.a_k = ld;
    }
    args.a_pitch = pitch * static_cast<int64_t>(sizeof(T));
    for (int64_t r = 0; r < t.size; ++r) rows[r] = a + r * pitch;
  }

  // Sets the pointers to rows of A in place, from k0 on.
  void place_rows(int64_t first, int64_t count, int64_t k0, const void** rows) const {
    const int64_t from = task_.group * p_.a.group_stride + k0, size = dtype_size(p_.dtype);
    for (int64_t r = 0; r < count;) {
      const Run run = run_at(p_.a.row, first + r, count - r);
      const char* row = static_cast<const char*>(task_.element(p_.a.data, from + run.offset));
      for (int64_t end = r + run.length; r < end; ++r, row += run.stride * size) rows[r] = row;
    }
  }

  // The number of rows of tiles, from row i on and before `end`, that one call can compute. They must have the same
  // size and be one run of rows in D. In A they must have a constant distance, unless the kernel takes a pointer for
  // each row. Sets args.a_step or args.rows_per_tile.
  int64_t strip_from(int64_t i, int64_t end, int64_t k0, const void** rows, FmaTileArgs& args) const {
    const Tiling::Tile t = plan_.m[i];
    const bool rows_anywhere = plan_.a.in_place() && !p_.a.row.linear();
    int64_t most = end - i < plan_.strip ? end - i : plan_.strip;
    // Rows without a constant distance are not computed in pieces of k, which would be slower.
    if (rows_anywhere) most = fma_.pitched || plan_.partials_kept > 1 ? 1 : std::min(most, kMaxStripRows / t.size);
    const int64_t count = plan_.m.same_size(i, most);
    if (count == 1 || run_at(p_.d.row, t.start, t.size * count).length < t.size * count) return 1;
    if (rows_anywhere) {
      args.rows_per_tile = t.size;
      place_rows(t.start, t.size * count, k0, rows);
    } else if (plan_.a.in_place()) {
      args.a_step = t.size * p_.a.row.stride[0] * dtype_size(p_.dtype);
    } else {
      args.a_step =
          (panels_.packed_a(task_.group, i + 1) - panels_.packed_a(task_.group, i)) * static_cast<int64_t>(sizeof(T));
    }
    return count;
  }

  const Task& task_;
  const GemmProblem& p_;
  const Plan& plan_;
  const Microkernel& kernel_;
  const FmaKernel& fma_;
  const Panels<T>& panels_;
  Columns<T> columns_;
  int64_t tile_;
  T *accumulators_, *partial_;
  Output<T> output_;
  Epilogue epilogue_;
};

}  // namespace conv1x1
