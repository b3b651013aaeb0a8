// Prefetches what the next block will read into L2 while this block is computed: a few lines at a time (FetchShare),
// spread over all steps of every tile, because many at once would delay the loads of the tile itself. Hardware
// prefetchers do not predict these reads, which are short pieces of many rows.
#pragma once

#include "../kernels/microkernel.h"

namespace conv1x1 {

class FetchAhead {
 public:
  void clear() { count_ = current_ = 0, left_ = 0; }

  // Adds rows [r0, r0 + nr) by columns [k0, k0 + nk) of a matrix in memory, and the same piece of the tensor that masks
  // it. `near`: into L1.
  void add(const Matrix& matrix, int64_t group, int64_t element, const Axis& r, int64_t r0, int64_t nr, const Axis& k,
           int64_t k0, int64_t nk, bool near) {
    for (int64_t i = 0; i < nr && count_ < kMost;) {
      const Run run_r = run_at(r, r0 + i, nr - i);
      for (int64_t j = 0; j < nk && count_ < kMost;) {
        const Run run_k = run_at(k, k0 + j, nk - j);
        add(matrix.data, group * matrix.group_stride + run_r.offset + run_k.offset, element, run_r.length, run_r.stride,
            run_k.length, run_k.stride, near);
        if (matrix.aux)
          add(matrix.aux, group * matrix.aux_group_stride + run_r.aux_offset + run_k.aux_offset, element, run_r.length,
              run_r.aux_stride, run_k.length, run_k.aux_stride, near);
        j += run_k.length;
      }
      i += run_r.length;
    }
  }

  // The share of a call that computes `here` tiles of `steps_of_tile` steps each. `tiles` tiles are still to be
  // computed, those of this call included.
  FetchShare share(int64_t tiles, int64_t here, int64_t steps_of_tile) {
    FetchShare share;
    while (current_ < count_) {
      Piece& piece = pieces_[current_];
      if (piece.row < piece.rows) {
        const int64_t steps = steps_of_tile * here;
        int64_t rows = (left_ * here + tiles - 1) / tiles, together = 1;
        if (rows > piece.rows - piece.row) rows = piece.rows - piece.row;
        // In a contiguous stretch a step fetches as many lines as needed.
        while (rows > steps * together && piece.pitch == kLine && !piece.near && together < kStrip / kLine) ++together;
        const int64_t fetches = rows / together < steps ? rows / together : steps;
        share.lines = {piece.base + piece.row * piece.pitch, fetches, piece.pitch * together, piece.width * together};
        while (share.every < kMostApart &&
               (fetches + kFetchedTogether - 1) / kFetchedTogether * 2 * share.every <= steps)
          share.every *= 2;
        share.near = piece.near;
        piece.row += fetches * together;
        left_ -= fetches * together;
        return share;
      }
      ++current_;
    }
    return share;
  }

 private:
  struct Piece {  // `rows` times `width` bytes, at most kStrip
    const char* base;
    int64_t pitch, rows, width, row;
    bool near;
  };
  static constexpr int64_t kLine = 64, kStrip = 4 * kLine;
  static constexpr int kMost = 64, kMostApart = 64;

  void add(const void* data, int64_t offset, int64_t element, int64_t nr, int64_t rs, int64_t nk, int64_t ks,
           bool near) {
    if (rs != 1 && ks != 1) return;
    int64_t bytes = (rs == 1 ? nr : nk) * element, rows = rs == 1 ? nk : nr, pitch = (rs == 1 ? ks : rs) * element;
    const char* base = static_cast<const char*>(data) + offset * element;
    if (pitch == bytes) {  // as one stretch of lines
      rows = (rows * bytes + kLine - 1) / kLine;
      pitch = bytes = kLine;
    }
    for (int64_t at = 0; at < bytes && count_ < kMost; at += kStrip) {
      pieces_[count_++] = {
          base + at, pitch, rows, bytes - at < kStrip ? bytes - at : kStrip, 0, near && pitch == kLine};
      left_ += rows;
    }
  }

  Piece pieces_[kMost];
  int count_ = 0, current_ = 0;
  int64_t left_ = 0;
};

}  // namespace conv1x1
