// A thread's panels of A and B: their addresses, and packing them. T is the type of the accumulators; an element of a
// panel has the same width (microkernel.h).
#pragma once

#include <cstring>

#include "task.h"

namespace conv1x1 {

template <class T>
class Panels {
 public:
  Panels(const Task& task, char* memory)
      : task_(task),
        p_(task.p),
        plan_(task.plan),
        kernel_(task.kernel),
        block_a_(reinterpret_cast<T*>(memory)),
        block_b_(reinterpret_cast<T*>(memory + task.plan.block_a)),
        storage_(static_cast<int>(task.p.dtype)) {}

  // Packs this part's share of the panels of a whole matrix.
  void pack_whole(int part, int parts) {
    if (plan_.a.whole()) {
      const Range r = share(p_.groups * plan_.m.count(), parts, part);
      for (int64_t i = r.begin; i < r.end; ++i) pack_a(i / plan_.m.count(), i % plan_.m.count(), 0, p_.k);
    }
    if (plan_.b.whole()) {
      const Range r = share(p_.groups * plan_.n.count(), parts, part);
      for (int64_t j = r.begin; j < r.end; ++j) pack_b(j / plan_.n.count(), j % plan_.n.count(), 0, p_.k);
    }
  }

  // The address of packed tile i: by its place in the matrix if the whole matrix is packed, by its place in the block
  // otherwise.
  T* packed_a(int64_t group, int64_t i) const {
    if (plan_.a.whole())
      return reinterpret_cast<T*>(task_.shared.once_a) + (group * p_.m + plan_.m[i].start) * plan_.steps(p_.k);
    return block_a_ + (plan_.packs_ahead() ? (i - first_a_) % 2 : i - first_a_) * plan_.panel_a;
  }
  T* packed_b(int64_t group, int64_t j) const {
    return plan_.b.whole() ? packed_once_b(group, j) : block_b_ + (j - first_b_) * plan_.panel_b;
  }
  int64_t ld_packed_a(const Tiling::Tile& t) const {
    if (plan_.a_access == AccessA::kCols) return t.size;
    return plan_.steps(plan_.a.whole() ? p_.k : plan_.k_step);
  }
  // The block's memory, for a family that makes panels of its own.
  T* block_a() const { return block_a_; }
  T* block_b() const { return block_b_; }

  // Sets the first tile of the packed block.
  void begin_a(int64_t tile) { first_a_ = tile; }
  void begin_b(int64_t tile) { first_b_ = tile; }

  // Packs a block of A. Calls after(i) while tile i's panel is in L1.
  template <class After>
  void pack_block_a(const Range& is, int64_t k0, int64_t nk, const After& after) {
    const bool packed =
        plan_.a_access == AccessA::kCols && kernel_.ks == 1 &&
        pack_rows(is, plan_.m, p_.a, p_.a.row, p_.a.col, k0, nk, [&](int64_t i) { return packed_a(task_.group, i); });
    for (int64_t i = is.begin; i < is.end; ++i) {
      if (!packed) pack_a(task_.group, i, k0, nk);
      after(i);
    }
  }

  void pack_block_b(const Range& js, int64_t k0, int64_t nk) {
    if (plan_.prepacked && p_.b_is_weight) {  // all of k: see pack_where_used
      for (int64_t j = js.begin; j < js.end; ++j)
        std::memcpy(packed_b(task_.group, j), packed_once_b(task_.group, j),
                    static_cast<size_t>(plan_.n[j].padded_size * plan_.steps(nk)) * sizeof(T));
      return;
    }
    if (pack_rows(js, plan_.n, p_.b, p_.b.col, p_.b.row, k0, nk, [&](int64_t j) { return packed_b(task_.group, j); }))
      return;
    for (int64_t j = js.begin; j < js.end; ++j) pack_b(task_.group, j, k0, nk);
  }

 private:
  T* packed_once_b(int64_t group, int64_t j) const {
    return reinterpret_cast<T*>(task_.shared.once_b) +
           (group * plan_.n.padded() + plan_.n[j].padded_start) * plan_.steps(p_.k);
  }

  const void* source(const Matrix& matrix, int64_t group) const {
    return task_.element(matrix.data, group * matrix.group_stride);
  }
  const void* aux_source(const Matrix& matrix, int64_t group) const {
    return matrix.aux ? task_.element(matrix.aux, group * matrix.aux_group_stride) : nullptr;
  }

  // Packs k [k0, k0 + nk) of a tile.
  void pack_a(int64_t group, int64_t i, int64_t k0, int64_t nk) {
    const PackFn fn = kernel_.pack_a[static_cast<int>(plan_.a_access)][storage_];
    const Tiling::Tile t = plan_.m[i];
    fn(packed_a(group, i), ld_packed_a(t), source(p_.a, group), aux_source(p_.a, group), p_.a.row, t.start, t.size,
       p_.a.col, k0, nk, task_.mask_of(p_.a));
  }
  void pack_b(int64_t group, int64_t j, int64_t k0, int64_t nk) {
    const Tiling::Tile t = plan_.n[j];
    kernel_.pack_b[storage_](packed_b(group, j), t.padded_size, source(p_.b, group), aux_source(p_.b, group), p_.b.col,
                             t.start, t.size, p_.b.row, k0, nk, task_.mask_of(p_.b));
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
      kernel_.pack_rows[storage_](segments, count, task_.source(matrix), task_.aux_source(matrix), axis_k, k0, nk,
                                  task_.mask_of(matrix));
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

  const Task& task_;
  const GemmProblem& p_;
  const Plan& plan_;
  const Microkernel& kernel_;
  T *block_a_, *block_b_;
  int64_t first_a_ = 0, first_b_ = 0;  // the first tile of a packed block
  int storage_;
};

}  // namespace conv1x1
