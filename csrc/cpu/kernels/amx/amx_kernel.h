// The contract of AMX's kernels, where it differs from ../microkernel.h.
//
// AMX multiplies matrices: 16 x 16 tiles of C by 16 steps. KS = 16 steps of a row of A lie together in its packed
// panel:
//
//  kCols  A(i, k) = a[(k / KS * lda + i) * KS + k % KS]
//
// Rows in memory lie a constant distance apart. Panels of A and of B are filled with zeros to whole groups of KS steps,
// and `k` counts whole groups. Columns of a panel past n are read, and their results are thrown away. The accumulators
// begin with c_in, so one chain goes on over several calls, and `chain` is ignored. `enter` is called before such calls
// and `leave` after them, once per thread.
//
// Operands in parts: an element of a float32 or float16 operand is the sum of `parts` bfloat16. A group of KS steps
// lies in a panel once for every part, the largest part first; `k`, `chain` and steps count all of them. A step is k
// and k + KS of a group of 2 KS. Chains end after `chain` steps, as in multiply-add kernels, and c_in is added to their
// sum. `repair` handles what parts cannot represent: infinities and the smallest numbers.
#pragma once

#include "../microkernel.h"

namespace conv1x1 {

constexpr uint32_t kDoubtfulBelow = 0x21800000;  // the bits of 2^-60: smaller sums of parts are checked
constexpr uint32_t kSmallBelow = 0x27800000;  // the bits of 2^-48: products of larger numbers keep all of their parts
constexpr int kMaxPending = 13 << 10, kPendingState = 256;

// repair(repairer, tile, panel, sums, ld, finite) corrects the sums of one tile, in rows of `ld`. `tile` and `panel`
// are the tile's row and column in the call. `finite`: no sum is infinite or NaN.
using RepairFn = void (*)(void* repairer, int64_t tile, int64_t panel, float* sums, int64_t ld, bool finite);

// Rows of a tile of A that are contiguous along k and are packed a few pieces at a time between products, because
// products leave memory and the vector units idle. A piece is a group of steps of one row.
struct PackAhead {
  const char *rows[kMaxMr], *aux[kMaxMr];
  void* panel;
  int64_t count, k, groups;      // number of rows; k and groups that are packed of each
  int64_t row, group, left = 0;  // the next piece, and how many are left
  int64_t each = 0;              // pieces after each product
  void (*step)(PackAhead& ahead, int64_t pieces);
};

// Where the columns of one vector lie in a row of B. Lane l lies at element `at` + l if its bit is set in `first`. If
// the columns lie in two runs, the lanes of `second` lie at `then` + l. The next tile's vector begins at `next` and
// will be prefetched. aux_: the same for the tensor that masks B.
struct OnTheFlyVector {
  int64_t at, then, aux_at, aux_then, next, aux_next;
  uint16_t first, second;
};

// A group of steps of one tile, which is split piece by piece. A piece is a row of A, or one step of one vector of B.
struct OnTheFlyGroup {
  const char *src, *aux;  // A: the group in the tile's first row; B: the row of the group's first k
  int64_t k;              // number of k from this group on
  const OnTheFlyVector* vectors;
  char* to;
  int64_t next, count;  // the next piece, and the number of pieces
};

// Several parts: an operand that a call reads in place, because the other operand is a single row or column of tiles,
// so that a panel would be read only once. A group is split into L1 while the group before is multiplied.
struct OnTheFly {
  const char *src, *aux;
  int64_t pitch, aux_pitch;  // bytes from row to row of A, from k to k of B
  int64_t group, aux_group;  // bytes from group to group of k
  int64_t step, aux_step;    // bytes from tile to tile of A
  int64_t k;
  const OnTheFlyVector* vectors;  // B: two for each panel
  void (*split)(const OnTheFly& on_the_fly, OnTheFlyGroup& group, int64_t pieces);
};

struct AmxTileArgs : TileArgs {
  const void* a = nullptr;  // kCols
  int64_t lda = 0;
  // Each tile of the strip stands for `panels` whole tiles side by side. Their panels of B lie b_step bytes apart,
  // their columns of c_in and c_out lie panel_in and panel_out elements apart. The residual and bias_n continue where
  // the tile before ends.
  int64_t panels = 1, b_step = 0, panel_in = 0, panel_out = 0;
  // A tile's epilogue and stores may wait in this memory for the next call or for finish_pending. `epilogue` must live
  // as long. Null: nothing waits.
  void* pending = nullptr;
  // Several parts: called with a tile's sums, before c_in is added and before the epilogue, if a sum is not finite or
  // is smaller than kDoubtfulBelow.
  RepairFn repair = nullptr;
  void* repairer = nullptr;
  bool mirrored = false;  // add the products of parts in the order of a call with A and B exchanged
  // Several parts: packed a little after each product of 2 x 2 tiles, but not while sums may still be repaired from the
  // panel that it overwrites. Null: nothing is packed.
  PackAhead* pack = nullptr;
  // Several parts: the operand that is read in place, which is A if its access is kRows, else B. Null: none.
  const OnTheFly* on_the_fly = nullptr;
  Fetch next_a, next_c;  // this call's share of what the next rows of tiles will read of A and store to C
};
using AmxTileFn = void (*)(const AmxTileArgs&);

struct AmxKernel {
  AmxTileFn fn[2][2][2];  // [access][m > KS][n > KS]
  int products;           // number of products of 2 x 2 tiles for a group of steps
  // Called before a thread's first tile and after its last one.
  void (*enter)();
  void (*leave)();
  // Finishes the tile that waits in `pending`, which is kMaxPending bytes, aligned to 64. The first kPendingState of
  // them must be zero before the first call.
  void (*finish_pending)(void* pending);
  // Only for kernels with several parts; null for others.
  void (*pack_ahead[3])(PackAhead& ahead, int64_t pieces);  // PackAhead::step, by Mask
  void (*on_the_fly[2][3])(const OnTheFly& on_the_fly, OnTheFlyGroup& group,
                           int64_t pieces);  // OnTheFly::split, of [A, B] by Mask
  // Does a panel have a number that is smaller than kSmallBelow and not zero?
  bool (*has_small)(const void* panel, int64_t ld, int64_t steps);

  AmxTileFn tile(AccessA access, int64_t m, int64_t n) const {
    constexpr int64_t kSteps = 16;
    return fn[static_cast<int>(access)][m > kSteps][n > kSteps];
  }
};

}  // namespace conv1x1
