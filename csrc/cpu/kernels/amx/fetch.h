// The prefetches of a call: a few lines in each group of steps, because many at once would delay the loads of the tile.
// A step here is such a group.
#pragma once

#include "instructions.h"

CONV1X1_KERNELS_BEGIN

// Prefetches a contiguous stretch of memory, the same number of lines in every step, so that a step only advances a
// pointer.
struct Stretch {
  const char *line, *end;
  int64_t each = 0;

  Stretch(const Fetch& f, int64_t steps) : line(f.first), end(line) {
    if (f.rows == 0 || steps == 0) return;
    const int64_t lines = f.rows * lines_of_row(f);
    end = line + lines * kTileBytes;
    each = (static_cast<int64_t>(static_cast<float>(lines - 1) / static_cast<float>(steps)) + 1) * kTileBytes;
  }
  static int64_t lines_of_row(const Fetch& f) { return (f.width + kTileBytes - 1) / kTileBytes; }
  static bool is(const Fetch& f) { return f.rows == 0 || f.pitch == lines_of_row(f) * kTileBytes; }

  CONV1X1_INLINE void step() {
    if (line >= end) return;
    for (const char* const to = line + each; line != to; line += kTileBytes) __builtin_prefetch(line, 0, 2);
  }
};

// Prefetches rows of lines. Rows without gaps between them are one stretch.
class Fetching {
 public:
  Fetching(const Fetch& f, int64_t steps) : whole_(Stretch::is(f)), stretch_(whole_ ? f : Fetch(), steps) {
    if (whole_ || steps == 0) return;
    line_ = f.first;
    width_ = row_ = Stretch::lines_of_row(f);
    left_ = f.rows * width_;
    each_ = static_cast<int64_t>(static_cast<float>(left_ - 1) / static_cast<float>(steps)) + 1;
    skip_ = f.pitch - width_ * kTileBytes;
  }

  void step() {
    if (whole_) return stretch_.step();
    for (int64_t n = each_ < left_ ? each_ : left_; n > 0; --n, --left_) {
      __builtin_prefetch(line_, 0, 2);
      line_ += kTileBytes;
      if (--row_ == 0) line_ += skip_, row_ = width_;
    }
  }

 private:
  bool whole_;
  Stretch stretch_;
  const char* line_ = nullptr;
  // Lines: left in all, in a step, in a row, left of this row. skip_: bytes from the end of a row to the next row.
  int64_t left_ = 0, each_ = 0, width_ = 0, row_ = 0, skip_ = 0;
};

CONV1X1_KERNELS_END
