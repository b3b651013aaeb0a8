// The contract of AMX's kernels, as far as it goes beyond ../microkernel.h.
//
// AMX multiplies matrices: 16 x 16 tiles of C by 16 steps. KS = 16 steps of a row of A lie together in its packed
// panel,
//
//   kCols  A(i, k) = a[(k / KS * lda + i) * KS + k % KS]
//
// rows in memory lie an even distance apart, panels of A and of B are filled up with zeros to whole KS, `k` counts
// whole KS, columns of a panel past n are read (and their results thrown away), and the accumulators begin with c_in:
// the chain goes on, wherever calls cut it, and `chain` is ignored. Around such calls stand `enter` and `leave`, once
// per thread.
//
// Operands in parts: float32 and float16 operands are the sums of `parts` bfloat16 numbers each. The panel of an
// operand holds the largest part of a group of KS steps, then the others, each laid out as a group; `k`, `chain` and
// steps count them all. Steps are k and k + KS of a group of 2 KS. Chains end, as they do for multiply-add kernels, and
// c_in is added to their sum. What an operand's parts cannot show, infinities and the smallest numbers, is left to
// `repair`.
#pragma once

#include "../microkernel.h"

namespace conv1x1 {

constexpr uint32_t kDoubtfulBelow = 0x21800000;  // the bits of 2^-60: smaller sums of parts are checked
constexpr uint32_t kSmallBelow = 0x27800000;     // of 2^-48: products of larger numbers keep all their parts
constexpr int kMaxPending = 13 << 10, kPendingState = 256;

// repair(repairer, tile, panel, sums, ld, finite): the sums of one tile of a call, in rows of `ld`.
using RepairFn = void (*)(void* repairer, int64_t tile, int64_t panel, float* sums, int64_t ld, bool finite);

// Rows of a tile of A that are contiguous along k, packed some pieces at a time between products, which leave memory
// and the vector units idle. A piece: a group of steps of one row.
struct PackAhead {
  const char *rows[kMaxMr], *aux[kMaxMr];
  void* panel;
  int64_t count, k, groups;      // rows, and what is packed of each
  int64_t row, group, left = 0;  // the next piece, and how many are left
  int64_t each = 0;              // so many after a product
  void (*step)(PackAhead& ahead, int64_t pieces);
};

// Where a vector's columns lie in a row of B: lane l of `first` at `at` + l; where they lie in two runs, the lanes of
// `second` likewise from `then` on. The next tile's begins at `next` and will be fetched.
struct OnTheFlyVector {
  int64_t at, then, aux_at, aux_then, next, aux_next;
  uint16_t first, second;
};

// A group of steps of one tile, split piece by piece: a row of A, or a step of a vector of B.
struct OnTheFlyGroup {
  const char *src, *aux;  // of the tile's first row, or all columns' first k, from this group on
  int64_t k;              // what is left from there
  const OnTheFlyVector* vectors;
  char* to;
  int64_t next, count;  // pieces
};

// Several parts: an operand that a call reads in place, because the other one's tiles are one row or one column and a
// panel would be read but once. A group is split into L1 while the one before is multiplied.
struct OnTheFly {
  const char *src, *aux;
  int64_t pitch, aux_pitch;  // bytes from row to row of A, from k to k of B
  int64_t group, aux_group;  // ... from group to group of k
  int64_t step, aux_step;    // ... from tile to tile of A
  int64_t k;
  const OnTheFlyVector* vectors;  // B: two of each panel
  void (*split)(const OnTheFly& on_the_fly, OnTheFlyGroup& group, int64_t pieces);
};

struct AmxTileArgs : TileArgs {
  const void* a = nullptr;  // kCols
  int64_t lda = 0;
  // For each tile of the strip, so many whole tiles side by side. Their panels of B lie b_step bytes apart, their
  // columns of c_in and c_out so many elements; the residual and bias_n go on where the tile before ends.
  int64_t panels = 1, b_step = 0, panel_in = 0, panel_out = 0;
  // The stores may wait in here for the next call, or for finish_pending, and `epilogue` must last as long; null:
  // nothing waits.
  void* pending = nullptr;
  // Several parts: called with the tile's sums, before c_in and the epilogue, where one of them is not finite, or
  // smaller than kDoubtfulBelow.
  RepairFn repair = nullptr;
  void* repairer = nullptr;
  // Several parts: packed after each product of 2 x 2 tiles, while no tile's sums may still be repaired from what it
  // overwrites; null: nothing.
  PackAhead* pack = nullptr;
  const OnTheFly* on_the_fly = nullptr;  // several parts: of A where its access is kRows, else of B, where there is one
  Fetch next_a, next_c;                  // of what the next rows of tiles will read and be stored to, this call's share
};
using AmxTileFn = void (*)(const AmxTileArgs&);

struct AmxKernel {
  AmxTileFn fn[2][2][2];  // [access][m > KS][n > KS]
  int products;           // of 2 x 2 tiles, for a group of steps
  // Before a thread's first tile and after its last one.
  void (*enter)();
  void (*leave)();
  // kMaxPending bytes, aligned to 64, the first kPendingState of them zero before the first call.
  void (*finish_pending)(void* pending);
  // Several parts; null: one part.
  void (*pack_ahead[3])(PackAhead& ahead, int64_t pieces);  // PackAhead::step, by Mask
  void (*on_the_fly[2][3])(const OnTheFly& on_the_fly, OnTheFlyGroup& group,
                           int64_t pieces);                         // OnTheFly::split, of [A, B] by Mask
  bool (*has_small)(const void* panel, int64_t ld, int64_t steps);  // has a panel a number below kSmallBelow, not zero?

  AmxTileFn tile(AccessA access, int64_t m, int64_t n) const {
    constexpr int64_t kSteps = 16;
    return fn[static_cast<int>(access)][m > kSteps][n > kSteps];
  }
};

}  // namespace conv1x1
