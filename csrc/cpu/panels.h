// A thread's panels of A and B: where they lie, packing them, and their sums for the bias gradient. T as in worker.h.
#pragma once

#include <algorithm>
#include <cstring>

#include "exact.h"

namespace conv1x1 {

struct Shared {  // what all threads share: workspace, and panels that the caller packed
  char *once_a, *once_b, *partials, *bias;
  double* sums;
};

template <class T>
class Panels {
 public:
  Panels(const GemmProblem& problem, const Plan& plan, const Shared& shared, char* own)
      : exact_(problem, *plan.kernel), p_(problem), plan_(plan), kernel_(*plan.kernel), shared_(shared) {
    block_a_ = reinterpret_cast<T*>(own);
    block_b_ = reinterpret_cast<T*>(own + plan.block_a);
    storage_ = static_cast<int>(p_.dtype);
  }

  void pack_once(int part, int parts) {
    if (plan_.a == Operand::kPackOnce) {
      const Range r = share(p_.groups * plan_.m.count(), parts, part);
      for (int64_t i = r.begin; i < r.end; ++i) pack_a(i / plan_.m.count(), i % plan_.m.count(), 0, p_.k);
    }
    if (plan_.b == Operand::kPackOnce) {
      const Range r = share(p_.groups * plan_.n.count(), parts, part);
      for (int64_t j = r.begin; j < r.end; ++j) pack_b(j / plan_.n.count(), j % plan_.n.count(), 0, p_.k);
    }
  }

 protected:
  void* element(void* base, int64_t offset) const { return static_cast<char*>(base) + offset * dtype_size(p_.dtype); }

  // The address of packed tile i: by its place in the matrix if packed once, by its place in the block if packed by
  // block.
  T* packed_a(int64_t group, int64_t i) const {
    if (plan_.a == Operand::kPackOnce)
      return reinterpret_cast<T*>(shared_.once_a) + (group * p_.m + plan_.m[i].start) * plan_.steps(p_.k);
    return block_a_ + (plan_.packs_ahead ? (i - first_a_) % 2 : i - first_a_) * plan_.panel_a;
  }
  T* packed_b(int64_t group, int64_t j) const {
    return plan_.b == Operand::kPackOnce ? packed_once_b(group, j) : block_b_ + (j - first_b_) * plan_.panel_b;
  }
  T* packed_once_b(int64_t group, int64_t j) const {
    return reinterpret_cast<T*>(shared_.once_b) +
           (group * plan_.n.padded() + plan_.n[j].padded_start) * plan_.steps(p_.k);
  }
  int64_t ld_packed_a(const Tiling::Tile& t) const {
    if (plan_.a_access == AccessA::kCols) return t.size;
    return plan_.steps(plan_.a == Operand::kPackOnce ? p_.k : plan_.k_step);
  }

  const void* source(const Matrix& matrix, int64_t group) const {
    return element(matrix.data, group * matrix.group_stride);
  }
  const void* aux_source(const Matrix& matrix, int64_t group) const {
    return matrix.aux ? element(matrix.aux, group * matrix.aux_group_stride) : nullptr;
  }
  Mask mask_of(const Matrix& matrix) const { return matrix.aux ? p_.mask : Mask::kNone; }

  // Packs k [k0, k0 + nk) of a tile.
  void pack_a(int64_t group, int64_t i, int64_t k0, int64_t nk) {
    const PackFn fn = kernel_.pack_a[static_cast<int>(plan_.a_access)][storage_];
    const Tiling::Tile t = plan_.m[i];
    fn(packed_a(group, i), ld_packed_a(t), source(p_.a, group), aux_source(p_.a, group), p_.a.row, t.start, t.size,
       p_.a.col, k0, nk, mask_of(p_.a));
  }
  void pack_b(int64_t group, int64_t j, int64_t k0, int64_t nk) {
    const Tiling::Tile t = plan_.n[j];
    kernel_.pack_b[storage_](packed_b(group, j), t.padded_size, source(p_.b, group), aux_source(p_.b, group), p_.b.col,
                             t.start, t.size, p_.b.row, k0, nk, mask_of(p_.b));
  }

  // Packs all tiles of a block at once, one row of the source after the other, so that memory is read in its own order.
  // Returns false if the rows of the source do not cross the tiles. `panel(t)` is the address of a tile's panel.
  template <class Panel>
  bool pack_rows(const Range& tiles, const Tiling& tiling, const Matrix& matrix, const Axis& across, const Axis& axis_k,
                 int64_t k0, int64_t nk, const Panel& panel) {
    if (across.inner_stride() != 1 || (matrix.aux && across.aux_stride[across.nd - 1] != 1)) return false;
    if (kernel_.kr > 1 && !axis_k.linear()) return false;
    constexpr int kMost = 64;
    Segment segments[kMost];
    int count = 0;
    const auto flush = [&] {
      kernel_.pack_rows[storage_](segments, count, source(matrix, group_), aux_source(matrix, group_), axis_k, k0, nk,
                                  mask_of(matrix));
      count = 0;
    };
    for (int64_t t = tiles.begin; t < tiles.end; ++t) {
      const Tiling::Tile tile = tiling[t];
      const int64_t ld = &tiling == &plan_.m ? tile.size : tile.padded_size;
      for (int64_t r = 0; r < tile.size;) {
        const Run run = run_at(across, tile.start + r, tile.size - r);
        const int64_t end = r + run.length;
        segments[count++] = {panel(t) + r, ld, run.offset, run.aux_offset, run.length, end < tile.size ? 0 : ld - end};
        r = end;
        if (count == kMost) flush();
      }
    }
    if (count > 0) flush();
    return true;
  }

  // Prepares tile i of A to be packed while `tiles` tiles are computed. finish_packing() packs what is left then.
  void pack_ahead(int64_t i, int64_t k0, int64_t nk, int64_t tiles) {
    PackAhead& pack = next_a_;
    const Tiling::Tile t = plan_.m[i];
    const Run at = run_at(p_.a.col, k0, nk);
    const int64_t size = dtype_size(p_.dtype);
    const char *src = static_cast<const char*>(source(p_.a, group_)), *aux = nullptr;
    if (p_.a.aux) aux = static_cast<const char*>(aux_source(p_.a, group_));
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
    pack.panel = packed_a(group_, i);
    pack.count = t.size;
    pack.k = nk;
    pack.groups = plan_.steps(nk) / (kernel_.ks * kernel_.parts);
    pack.row = pack.group = 0;
    pack.left = pack.count * pack.groups;
    const int64_t products = std::max<int64_t>(tiles * pack.groups * kernel_.products, 1);
    pack.each = (pack.left + products - 1) / products;
    pack.step = kernel_.pack_ahead[static_cast<int>(mask_of(p_.a))];
  }
  void finish_packing() {
    if (next_a_.left > 0) next_a_.step(next_a_, next_a_.left);
  }

  // TileArgs::feed of a row of tiles, or null: for A, a strip of tiles `step` bytes apart; for B, without `vectors`.
  const Feed* feed(const Tiling::Tile& ti, int64_t step, int64_t k0, int64_t nk) {
    const bool of_a = plan_.a == Operand::kDirect;
    if (kernel_.parts == 1 || (!of_a && plan_.b != Operand::kDirect)) return nullptr;
    const Matrix& matrix = of_a ? p_.a : p_.b;
    const Axis &k = of_a ? p_.a.col : p_.b.row, &line = of_a ? p_.a.row : k;
    const int64_t size = dtype_size(p_.dtype), group = kernel_.kr * kernel_.ks * size;
    const int64_t first = of_a ? ti.start : 0;
    const auto at = [&](const void* from, int64_t row, int64_t k_stride) {
      return from ? static_cast<const char*>(from) + (first * row + k0 * k_stride) * size : nullptr;
    };
    feed_.src = at(source(matrix, group_), line.stride[0], k.stride[0]);
    feed_.aux = at(aux_source(matrix, group_), line.aux_stride[0], k.aux_stride[0]);
    feed_.pitch = line.stride[0] * size;
    feed_.aux_pitch = line.aux_stride[0] * size;
    feed_.group = k.stride[0] * group;
    feed_.aux_group = k.aux_stride[0] * group;
    feed_.step = step;
    feed_.aux_step = ti.size * feed_.aux_pitch;
    feed_.k = nk;
    feed_.split = kernel_.feed[of_a ? 0 : 1][static_cast<int>(mask_of(matrix))];
    return &feed_;
  }

  // Packs a tile that was read in place, for exact_.
  void pack_fed(ExactSums::Sums& of) {
    const bool of_a = plan_.a == Operand::kDirect;
    if (!of_a && plan_.b != Operand::kDirect) return;
    const Matrix& matrix = of_a ? p_.a : p_.b;
    const PackFn fn = of_a ? kernel_.pack_a[static_cast<int>(AccessA::kCols)][storage_] : kernel_.pack_b[storage_];
    T* const panel = of_a ? block_a_ : block_b_;
    const Tiling::Tile& t = of_a ? of.ti : of.tj;
    (of_a ? of.a : of.b) = panel;
    const int64_t ld = (of_a ? of.lda : of.ldb) = of_a ? t.size : t.padded_size;
    fn(panel, ld, source(matrix, group_), aux_source(matrix, group_), of_a ? matrix.row : matrix.col, t.start, t.size,
       of_a ? matrix.col : matrix.row, of.k0, of.nk, mask_of(matrix));
  }

  // If `sums`, also adds up the rows of each tile while its panel is in L1.
  void pack_block_a(const Range& is, int64_t k0, int64_t nk, bool sums) {
    const bool packed =
        plan_.a_access == AccessA::kCols && kernel_.ks == 1 &&
        pack_rows(is, plan_.m, p_.a, p_.a.row, p_.a.col, k0, nk, [&](int64_t i) { return packed_a(group_, i); });
    for (int64_t i = is.begin; i < is.end; ++i) {
      if (!packed) pack_a(group_, i, k0, nk);
      if (sums) add_row_sums(i, k0, nk);
    }
  }

  void pack_block_b(const Range& js, int64_t k0, int64_t nk) {
    if (plan_.prepacked && p_.b_is_weight) {  // all of k: see pack_where_used
      for (int64_t j = js.begin; j < js.end; ++j)
        std::memcpy(packed_b(group_, j), packed_once_b(group_, j),
                    static_cast<size_t>(plan_.n[j].padded_size * plan_.steps(nk)) * sizeof(T));
      return;
    }
    if (pack_rows(js, plan_.n, p_.b, p_.b.col, p_.b.row, k0, nk, [&](int64_t j) { return packed_b(group_, j); }))
      return;
    for (int64_t j = js.begin; j < js.end; ++j) pack_b(group_, j, k0, nk);
  }

  // Adds the sums of a packed tile's rows to this slice's row sums.
  void add_row_sums(int64_t i, int64_t k0, int64_t nk) {
    double* sums = shared_.sums + (slice_ * p_.groups + group_) * p_.m;
    const Tiling::Tile t = plan_.m[i];
    double here[kMaxMr] = {};
    kernel_.sum_rows(here, packed_a(group_, i), ld_packed_a(t), t.size, plan_.steps(nk), plan_.a_access);
    if (kernel_.parts > 1) exact_.repair_sums(here, true, group_, t, k0, nk);
    for (int64_t r = 0; r < t.size; ++r) sums[t.start + r] += here[r];
  }

  void add_column_sums(const Range& js, int64_t k0, int64_t nk) {
    double* sums = shared_.sums + (slice_ * p_.groups + group_) * p_.n;
    for (int64_t j = js.begin; j < js.end; ++j) {
      const Tiling::Tile t = plan_.n[j];
      double here[kMaxNr] = {};
      kernel_.sum_columns(here, packed_b(group_, j), t.padded_size, t.size, plan_.steps(nk));
      if (kernel_.parts > 1) exact_.repair_sums(here, false, group_, t, k0, nk);
      for (int64_t c = 0; c < t.size; ++c) sums[t.start + c] += here[c];
    }
  }

  ExactSums exact_;
  const GemmProblem& p_;
  const Plan& plan_;
  const Microkernel& kernel_;
  const Shared& shared_;
  T *block_a_, *block_b_;
  Feed feed_;                                                  // the operand in parts that is read in place
  PackAhead next_a_;                                           // the tile that is packed between products
  int64_t group_ = 0, slice_ = 0, first_a_ = 0, first_b_ = 0;  // first_: the first tile of a packed block
  int storage_;
};

}  // namespace conv1x1
