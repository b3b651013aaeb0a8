// Where a block's columns of tiles lie in B and in D, for the loop nest of a thread. T as in worker.h.
#pragma once

#include "panels.h"

namespace conv1x1 {

template <class T>
class Columns : protected Panels<T> {
 public:
  Columns(const GemmProblem& problem, const Plan& plan, const Shared& shared, char* own)
      : Panels<T>(problem, plan, shared, own) {
    out_storage_ = static_cast<int>(p_.out_dtype);
    transcendental_ = !masks_from_output(p_.activation);
    // Can a tile be stored directly to D? Sums of slices, and activations that follow, need the accumulators' type.
    whole_out_ = p_.out_dtype == kernel_.dtype;
    half_out_ = !whole_out_ && kernel_.stores_half && !transcendental_;
    aux_alike_ = true;
    for (int d = 0; d < p_.d.col.nd; ++d) aux_alike_ = aux_alike_ && p_.d.col.aux_stride[d] == p_.d.col.stride[d];
  }

 protected:
  using Base = Panels<T>;
  using Base::element, Base::packed_b, Base::p_, Base::plan_, Base::kernel_, Base::group_;

  // What every row of tiles needs to know of a column of tiles, computed once for a block.
  struct Column {
    Tiling::Tile tile;
    const void* b;
    int64_t ldb, out, aux;    // where the tile's columns begin in D and in its residual
    bool out_unit, aux_unit;  // and whether one unit stride walks them, or those in `splits` do
    bool split;
    int64_t alike;  // number of whole tiles from here on that are side by side in D, with panels b_step bytes apart
    int64_t b_step;
    Split splits[kMaxNv];
  };

  // For columns in several runs of D: where the columns of each vector lie, relative to the first column. False if a
  // vector needs three runs.
  bool split_columns(Column& c) const {
    const int width = kernel_.vector;
    const Axis& axis = p_.d.col;
    if (!kernel_.splits || transcendental_ || axis.inner_stride() != 1) return false;
    for (int64_t j = 0; j < c.tile.size; j += width) {
      const int64_t left = c.tile.size - j < width ? c.tile.size - j : width;
      const Run run = run_at(axis, c.tile.start + j, left);
      Split& s = c.splits[j / width];
      s = {width, run.offset - c.out, run.offset - c.out};
      if (run.length == left) continue;
      const Run rest = run_at(axis, c.tile.start + j + run.length, left - run.length);
      if (run.length + rest.length < left) return false;
      s.lanes = run.length;
      s.then = rest.offset - c.out - run.length;
    }
    return true;
  }

  void prepare_columns(const Range& js, int64_t k0, bool last) {
    const Matrix &b = p_.b, &d = p_.d;
    all_unit_ = !p_.pool;
    for (int64_t j = js.begin; j < js.end; ++j) {
      Column& c = columns_[j - js.begin];
      c.tile = plan_.n[j];
      if (plan_.b == Operand::kDirect && kernel_.parts > 1) {
        c.b = nullptr;
        c.ldb = c.tile.padded_size;
        feed_columns(c.tile, fed_[j - js.begin]);
      } else if (plan_.b == Operand::kDirect) {
        c.ldb = b.row.inner_stride();
        c.b = element(b.data, group_ * b.group_stride + k0 * c.ldb + run_at(b.col, c.tile.start, 1).offset);
      } else {
        c.ldb = c.tile.padded_size;
        c.b = packed_b(group_, j) + (plan_.b == Operand::kPackOnce ? plan_.steps(k0) * c.ldb : 0);
      }
      if (p_.pool) continue;
      const Run run = run_at(d.col, c.tile.start, c.tile.size);
      c.out = run.offset;
      c.aux = run.aux_offset;
      const bool stored = whole_out_ || half_out_, one_run = run.length == c.tile.size;
      c.split = stored && !one_run && split_columns(c);
      c.out_unit = c.split || (stored && one_run && run.stride == 1);
      c.aux_unit = c.split ? aux_alike_ : stored && one_run && run.aux_stride == 1;
      all_unit_ = all_unit_ && c.out_unit && (c.aux_unit || !d.aux);
    }
    if (kernel_.ks == 1 || js.begin == js.end) return;
    if (plan_.b == Operand::kDirect && kernel_.parts > 1) fetch_next_columns(js);
    join_columns(js.end - js.begin, last && plan_.slices == 1 && !p_.pool);
  }

  // Where a tile's two vectors lie in a row of B that is split between products. A tile of one vector fills in both.
  void feed_columns(const Tiling::Tile& tile, FedVector* vectors) const {
    const auto lanes = [](int64_t n) { return (uint32_t{1} << n) - 1; };
    for (int64_t j = 0; j < tile.size; j += kernel_.vector) {
      const int64_t left = tile.size - j < kernel_.vector ? tile.size - j : kernel_.vector;
      const Run run = run_at(p_.b.col, tile.start + j, left);
      FedVector v{run.offset, 0, run.aux_offset, 0, 0, 0, static_cast<uint16_t>(lanes(run.length)), 0};
      if (run.length < left) {
        const Run rest = run_at(p_.b.col, tile.start + j + run.length, left - run.length);
        v.then = rest.offset - run.length;
        v.aux_then = rest.aux_offset - run.length;
        v.second = static_cast<uint16_t>(lanes(left) & ~lanes(run.length));
      }
      for (int64_t i = j / kernel_.vector; i < 2; ++i) vectors[i] = v;
    }
  }

  // Each tile prefetches the tile after it, which may belong to the next block.
  void fetch_next_columns(const Range& js) {
    FedVector after[2];
    feed_columns(plan_.n[js.end < plan_.n.count() ? js.end : js.end - 1], after);
    const FedVector* next = after;
    for (int64_t j = js.end - js.begin; j-- > 0; next = fed_[j])
      for (int v = 0; v < 2; ++v) fed_[j][v].next = next[v].at, fed_[j][v].aux_next = next[v].aux_at;
  }

  // Finds the columns that one call of the microkernel can compute: whole tiles, at a constant distance in B and, if
  // `to_d`, side by side in D.
  void join_columns(int64_t count, bool to_d) {
    const int64_t nr = kernel_.nr;
    const auto whole = [&](const Column& c) {
      return c.tile.size == nr && (!to_d || (c.out_unit && !c.split && (c.aux_unit || !p_.d.aux)));
    };
    columns_[count - 1].alike = 1;
    for (int64_t j = count - 2; j >= 0; --j) {
      Column &c = columns_[j], &next = columns_[j + 1];
      c.alike = 1;
      if (!whole(c) || !whole(next)) continue;
      c.b_step = static_cast<const char*>(next.b) - static_cast<const char*>(c.b);
      const bool side_by_side = !to_d || (next.out == c.out + nr && (!p_.d.aux || next.aux == c.aux + nr));
      if (side_by_side && (next.alike == 1 || next.b_step == c.b_step || !c.b)) c.alike = next.alike + 1;
    }
  }

  Column columns_[kMaxBlockN];
  FedVector fed_[kMaxBlockN][2];
  int out_storage_;
  bool all_unit_ = false;  // every column has out_unit, and aux_unit where there is a residual
  bool whole_out_, half_out_, transcendental_;

 private:
  bool aux_alike_;
};

}  // namespace conv1x1
