// What follows the sums of a tile: epilogue, store to D, pooling. Also the sums of k-slices, and the bias gradient.
#pragma once

#include <limits>

#include "columns.h"

namespace conv1x1 {

template <class T>
class Output {
 public:
  // staged: memory for plan.staged tiles. residual: memory for one tile.
  Output(const Task& task, const Columns<T>& columns, T* staged, T* residual)
      : task_(task),
        p_(task.p),
        plan_(task.plan),
        kernel_(task.kernel),
        columns_(columns),
        staged_(staged),
        residual_(residual),
        tile_(task.kernel.mr * task.kernel.nr),
        out_storage_(static_cast<int>(task.p.out_dtype)) {
    streams_ = plan_.streams && !columns.transcendental();
    if (columns.half_out()) half_store_ = p_.out_dtype == DType::kBFloat16 ? Store::kBFloat16 : Store::kFloat16;
    constexpr double inf = std::numeric_limits<double>::infinity();
    epilogue_.lower = p_.activation == Activation::kReLU || p_.activation == Activation::kReLU6 ? 0 : -inf;
    epilogue_.upper = p_.activation == Activation::kReLU6 ? 6 : inf;
    // The limits for the bits of a pooled output: below or above them the output would be 0 or 6 after rounding to its
    // half type.
    if (p_.dtype == DType::kFloat16) mask_low_ = 0x1p-25;
    if (p_.activation == Activation::kReLU6)
      mask_high_ = p_.dtype == DType::kFloat16 ? 6 - 0x1p-9 : (p_.dtype == DType::kBFloat16 ? 6 - 0x1p-6 : 6);
  }

  bool streams() const { return streams_; }

  // Where a call's tiles go.
  struct Place {
    void* out;
    int64_t ld;
    bool in_d;      // to D itself; else to the workspace, from where leave() takes them
    bool is_final;  // the kernel's own stores are the last step
  };

  // Sets the epilogue `e` of a call and returns where its tiles go. They begin at row of tiles ti and column c. `row`:
  // their run of rows in D. `panels`: tiles side by side in the call. `fetch`: prefetch for writing the lines to which
  // the call stores. args.tiles is set before. `args` is filled in place. A copy of it would read what was just
  // written, in wider pieces, and so wait until all stores of the tile before have left the core.
  Place enter(TileArgs& args, Epilogue& e, const Tiling::Tile& ti, const Run& row, const Column& c, int64_t panels,
              bool fetch) {
    const Tiling::Tile& tj = c.tile;
    e = epilogue_;
    if (p_.bias.data) {
      const T* bias = reinterpret_cast<const T*>(task_.shared.bias);
      if (p_.bias_along_m)
        e.bias_m = bias + task_.group * p_.m + ti.start;
      else
        e.bias_n = bias + task_.group * p_.n + tj.start;
    }
    args.epilogue = &e;
    const Matrix& d = p_.d;
    Place place{staged_, kernel_.nr, false, false};
    const bool one_run = row.length == ti.size * args.tiles, aux_in_place = d.aux && one_run && c.aux_unit;
    const bool as_it_is = columns_.whole_out() && !c.split;
    // A tile that is stored as a half type reads its residual as that type.
    place.in_d = !p_.pool && one_run && c.out_unit && (as_it_is || !d.aux || aux_in_place);
    args.splits = place.in_d && c.split ? c.splits : nullptr;
    if (place.in_d) {
      place.out = task_.out_element(d.data, task_.group * d.group_stride + row.offset + c.out);
      place.ld = row.stride;
      e.store = half_store_;
      const int64_t size = dtype_size(p_.out_dtype);
      const bool whole_lines =
          ((reinterpret_cast<uintptr_t>(place.out) | static_cast<uintptr_t>(place.ld * size)) & 63) == 0 &&
          tj.size * size % 64 == 0;
      e.stream = streams_ && whole_lines && !c.split;
      if (fetch && !e.stream) fetch_lines(place, ti.size, tj.size * panels, c);
    }
    bool gathered = false;
    if (aux_in_place && (as_it_is || place.in_d)) {
      e.residual = task_.out_element(d.aux, task_.group * d.aux_group_stride + row.aux_offset + c.aux);
      e.ld_residual = row.aux_stride;
    } else if (d.aux) {
      gather_residual(task_.group, ti.start, ti.size, tj.start, tj.size);
      e.residual = residual_;
      e.ld_residual = kernel_.nr;
      gathered = true;
    }
    place.is_final = place.in_d && !gathered && !columns_.transcendental();
    args.c_out = place.out;
    args.ld_out = place.ld;
    return place;
  }

  // Called after the call: applies an activation that is no range, pools, or copies the tile from the workspace to D.
  // column(i) is the column of the call's tile i from the left.
  template <class ColumnOf>
  void leave(const Place& place, const Tiling::Tile& ti, int64_t tiles, int64_t panels, const ColumnOf& column) {
    const Tiling::Tile& tj = column(0).tile;
    if (columns_.transcendental()) kernel_.activate(place.out, place.ld, ti.size * tiles, tj.size, p_.activation);
    if (p_.pool)
      for (int64_t i = 0; i < panels; ++i) pool(staged_ + i * tile_, ti, column(i).tile);
    else if (!place.in_d)
      kernel_.unpack[out_storage_](task_.out_element(p_.d.data, task_.group * p_.d.group_stride), p_.d.row, ti.start,
                                   ti.size, p_.d.col, tj.start, tj.size, place.out, place.ld);
  }

  // Adds the k-slices of this part's rows of groups * m, in the order of the slices.
  void join_slices(int part, int parts) {
    const Range rows = share(p_.groups * p_.m, parts, part);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      T* sum = task_.slice_sum<T>(0, row);
      for (int64_t s = 1; s < plan_.slices; ++s) {
        const T* next = task_.slice_sum<T>(s, row);
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
      kernel_.unpack[out_storage_](task_.out_element(p_.d.data, group * p_.d.group_stride), p_.d.row, i, 1, p_.d.col, 0,
                                   p_.n, sum, p_.n);
    }
  }

  void write_row_sums() {
    const int64_t rows = p_.groups * (p_.exchanged ? p_.n : p_.m);
    for (int64_t row = 0; row < rows; ++row) {
      double sum = 0;
      for (int64_t s = 0; s < plan_.slices; ++s) sum += task_.shared.sums[s * rows + row];
      Axis one;
      one.size[0] = one.count = 1;
      void* to = task_.out_element(p_.row_sums.data, row * p_.row_sums.stride);
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
  // Prefetches for writing the lines to which a tile will be stored. Stores leave the core in order, so a store that
  // waits for its line delays all later stores.
  void fetch_lines(const Place& place, int64_t rows, int64_t cols, const Column& c) const {
    const int64_t size = dtype_size(p_.out_dtype), bytes = cols * size;
    for (int64_t i = 0; i < rows; ++i) {
      const char* row = static_cast<const char*>(place.out) + i * place.ld * size;
      if (c.split) {
        for (int64_t v = 0; v < c.tile.padded_size / kernel_.vector; ++v) {
          __builtin_prefetch(row + c.splits[v].at * size, 1);
          __builtin_prefetch(row + (c.splits[v].then + kernel_.vector - 1) * size, 1);
        }
        continue;
      }
      for (int64_t j = 0; j < bytes; j += 64) __builtin_prefetch(row + j, 1);
      __builtin_prefetch(row + bytes - 1, 1);
    }
  }

  void gather_residual(int64_t group, int64_t r0, int64_t nr, int64_t c0, int64_t nc) {
    kernel_.gather[out_storage_](residual_, kernel_.nr, task_.out_element(p_.d.aux, group * p_.d.aux_group_stride),
                                 nullptr, aux_axis(p_.d.row), r0, nr, aux_axis(p_.d.col), c0, nc, Mask::kNone);
  }

  // Adds a finished tile's pixels to the sums of the images that they belong to.
  void pool(const T* out, const Tiling::Tile& ti, const Tiling::Tile& tj) {
    const bool columns = p_.pool_along_n;
    const int64_t channels = p_.groups * (columns ? p_.m : p_.n), pixels = columns ? p_.n_segment : p_.m_segment;
    const Tiling::Tile &at = columns ? tj : ti, &of = columns ? ti : tj;
    if (p_.pool_mask)
      kernel_.put_bits(p_.pool_mask, (task_.group * p_.m + ti.start) * p_.n + tj.start, p_.n, out, kernel_.nr, ti.size,
                       tj.size, mask_low_, mask_high_);
    double* sums = p_.pool + task_.group * (columns ? p_.m : p_.n) + of.start;
    for (int64_t i = 0; i < at.size;) {
      const int64_t image = (at.start + i) / pixels, left = (image + 1) * pixels - at.start;
      const int64_t end = left < at.size ? left : at.size;
      kernel_.pool(sums + image * channels, out + i * (columns ? 1 : kernel_.nr), kernel_.nr, end - i, of.size,
                   columns);
      i = end;
    }
  }

  const Task& task_;
  const GemmProblem& p_;
  const Plan& plan_;
  const Microkernel& kernel_;
  const Columns<T>& columns_;
  T *staged_, *residual_;
  Epilogue epilogue_;
  int64_t tile_;
  Store half_store_ = Store::kAsIs;
  double mask_low_ = 0, mask_high_ = std::numeric_limits<double>::quiet_NaN();  // NaN: no value is >= NaN
  int out_storage_;
  bool streams_;
};

}  // namespace conv1x1
