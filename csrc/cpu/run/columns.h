// Where a block's columns of tiles lie in B and in D, computed once for all rows of tiles of the block. T as in
// panels.h.
#pragma once

#include "panels.h"

namespace conv1x1 {

struct Column {
  Tiling::Tile tile;
  const void* b;            // null: split between the products
  int64_t ldb, out, aux;    // where the tile's columns begin in D and in its residual
  bool out_unit, aux_unit;  // whether they have unit stride there, in one run or in `splits`
  bool split;
  Split splits[kMaxNv];
};

template <class T>
class Columns {
 public:
  Columns(const Task& task, const Panels<T>& panels)
      : task_(task), p_(task.p), plan_(task.plan), kernel_(task.kernel), panels_(panels) {
    transcendental_ = !masks_from_output(p_.activation);
    // Can a tile be stored directly to D? Sums of slices, and activations that follow, need the accumulators' type.
    whole_out_ = p_.out_dtype == kernel_.dtype;
    half_out_ = !whole_out_ && kernel_.stores_half && !transcendental_;
    same_strides_ = true;
    for (int d = 0; d < p_.d.col.nd; ++d) same_strides_ = same_strides_ && p_.d.col.aux_stride[d] == p_.d.col.stride[d];
  }

  void prepare(const Range& js, int64_t k0) {
    const Matrix &b = p_.b, &d = p_.d;
    all_unit_ = !p_.pool;
    for (int64_t j = js.begin; j < js.end; ++j) {
      Column& c = columns_[j - js.begin];
      c.tile = plan_.n[j];
      if (plan_.b.source == Source::kSplitBetweenProducts) {
        c.b = nullptr;
        c.ldb = c.tile.padded_size;
      } else if (plan_.b.in_place()) {
        c.ldb = b.row.inner_stride();
        c.b = task_.element(b.data, task_.group * b.group_stride + k0 * c.ldb + run_at(b.col, c.tile.start, 1).offset);
      } else {
        c.ldb = c.tile.padded_size;
        c.b = panels_.packed_b(task_.group, j) + (plan_.b.whole() ? plan_.steps(k0) * c.ldb : 0);
      }
      if (p_.pool) continue;
      const Run run = run_at(d.col, c.tile.start, c.tile.size);
      c.out = run.offset;
      c.aux = run.aux_offset;
      const bool stored = whole_out_ || half_out_, one_run = run.length == c.tile.size;
      c.split = stored && !one_run && split_columns(c);
      c.out_unit = c.split || (stored && one_run && run.stride == 1);
      c.aux_unit = c.split ? same_strides_ : stored && one_run && run.aux_stride == 1;
      all_unit_ = all_unit_ && c.out_unit && (c.aux_unit || !d.aux);
    }
  }

  const Column& operator[](int64_t j) const { return columns_[j]; }
  // True if every column has out_unit and, with a residual, aux_unit. False with pooling.
  bool all_unit() const { return all_unit_; }
  bool whole_out() const { return whole_out_; }
  bool half_out() const { return half_out_; }
  bool transcendental() const { return transcendental_; }

 private:
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

  const Task& task_;
  const GemmProblem& p_;
  const Plan& plan_;
  const Microkernel& kernel_;
  const Panels<T>& panels_;
  Column columns_[kMaxBlockN];
  bool all_unit_ = false, whole_out_, half_out_, transcendental_, same_strides_;
};

}  // namespace conv1x1
