// The contract of a microkernel and of the packed panels. Torch-free; no intrinsics here.
//
// A microkernel computes one tile, acc(i, j) = sum_k A(i, k) * B(k, j), i < m <= MR, j < n <= NR, in chains of `chain`
// steps. A chain is summed in a single accumulator per output, k ascending, one multiply-add a step. Then the chain's
// sum is added to the sum of the chains before, which is kept in `partial`. Nothing else decides a result's bits, so
// tiles of any shape agree.
//
//   kCols  A(i, k) = a[k * lda + i]          kRows  A(i, k) = a_rows[i][k]      one function: a_rows[i][k * a_k]
//          k=0  a00 a10 a20 .. a(MR-1)0             a_rows[0] -> a00 a01 a02 a03 ..      (k contiguous)
//          k=1  a01 a11 a21 ..                      a_rows[1] -> a10 a11 a12 a13 ..
//
//   B(k, j) = b[k * ldb + j]                 C(i, j) = c[i * ld + j]
//          k=0  b00 b01 b02 .. b0(NR-1)             a packed panel is this with ldb = the tile's whole vectors,
//          k=1  b10 b11 b12 ..                      columns past n filled with zeros
//
// A step is KR consecutive k. Where KR > 1, each element of A or B in the drawings above is KR values, lowest k first.
// With KR = 2:
//
//   step 0  (b00 b10) (b01 b11) (b02 b12) ..
//   step 1  (b20 b30) (b21 b31) ..
//
// An odd last k is followed by zero, in A and in B. `k`, `chain`, lda and ldb count these elements. In rows in memory
// an element is KR neighbours.
//
// Then c_out = epilogue(c_in + acc). c_in == nullptr means zero, epilogue == nullptr means no epilogue. The microkernel
// touches nothing outside the m x n tile of c_out and nothing past column n of b.
//
// AMX multiplies matrices: 16 x 16 tiles of C by 16 steps. KS = 16 steps of a row of A lie together in its packed
// panel:
//
//   kCols  A(i, k) = a[(k / KS * lda + i) * KS + k % KS]
//
// Rows in memory lie a constant distance apart. Panels of A and of B are filled with zeros to whole groups of KS steps,
// and `k` counts whole groups. Columns of a panel past n are read, and their results are thrown away. The accumulators
// begin with c_in, so one chain goes on over several calls, and `chain` and `partial` are ignored. `enter` is called
// before such calls and `leave` after them, once per thread.
//
// With several `parts`, an element of A or B is the sum of that many of the kernel's operands. A group of KS steps lies
// in a panel once for every part, the largest part first; `k`, `chain` and steps count all of them. A step is k and k +
// KS of a group of 2 KS. Chains end after `chain` steps, as above, and c_in is added to their sum. `repair` handles
// what parts cannot represent: infinities and the smallest numbers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "../gemm.h"

namespace conv1x1 {

constexpr int64_t kChannelsForParts = 64, kPixelsForParts = 32;  // in and out; of an image: a tile of rows
constexpr int64_t kLeastOfTile = 16, kTileOfWeights = 32;        // channels out that are one tile of a weight
constexpr uint32_t kDoubtfulBelow = 0x21800000;                  // the bits of 2^-60
constexpr uint32_t kSmallBelow = 0x27800000;  // the bits of 2^-48: products of larger numbers keep all of their parts
constexpr int kMaxMr = 32, kMaxNv = 4, kMaxNr = 64, kMaxPending = 13 << 10, kPendingState = 256, kFetchedTogether = 4,
              kMaxStripRows = 256;

enum class AccessA : int { kRows = 0, kCols = 1 };

// The dtype of C and of the residual under an epilogue: the accumulators', or a half type where `stores_half`.
enum class Store : int { kAsIs, kBFloat16, kFloat16 };

// min(max(c + bias + residual, lower), upper). [lower, upper] is [-inf, inf] for no activation, [0, inf] for ReLU, [0,
// 6] for ReLU6. NaN passes.
struct Epilogue {
  const void* bias_m = nullptr;  // one per row of the tile
  const void* bias_n = nullptr;  // one per column
  const void* residual = nullptr;
  int64_t ld_residual = 0;
  double lower = 0, upper = 0;
  Store store = Store::kAsIs;
  bool stream = false;  // past the caches, for a C whose rows are whole aligned lines of 64 bytes; the driver fences
};

// Where a vector of columns lies in C and in the residual, for tiles that span images in NCHW. The first `lanes`
// columns begin at element `at` of a row; lane l of the others is element `then` + l.
struct Split {
  int64_t lanes, at, then;
};

// Rows of lines to fetch into L2, `pitch` bytes apart, `width` bytes each.
struct Fetch {
  const char* first = nullptr;
  int64_t rows = 0, pitch = 0, width = 0;
};

using RepairFn = void (*)(void* repairer, int64_t tile, int64_t panel, float* sums, int64_t ld, bool finite);

// Rows of a tile of A that are contiguous along k and are packed a few pieces at a time between products, because
// products leave memory and the vector units idle. A piece is a group of steps of one row.
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
struct FedVector {
  int64_t at, then, aux_at, aux_then, next, aux_next;
  uint16_t first, second;
};

// A group of steps of one tile, split piece by piece: a row of A, or a step of a vector of B.
struct FedGroup {
  const char *src, *aux;  // of the tile's first row, or all columns' first k, from this group on
  int64_t k;              // what is left from there
  const FedVector* vectors;
  char* to;
  int64_t next, count;  // pieces
};

// Several parts: an operand that a call reads in place, because the other operand is a single row or column of tiles,
// so that a panel would be read only once. A group is split into L1 while the group before is multiplied.
struct Feed {
  const char *src, *aux;
  int64_t pitch, aux_pitch;  // bytes from row to row of A, from k to k of B
  int64_t group, aux_group;  // ... from group to group of k
  int64_t step, aux_step;    // ... from tile to tile of A
  int64_t k;
  const FedVector* vectors;  // B: two of each panel
  void (*split)(const Feed& feed, FedGroup& group, int64_t pieces);
};

struct TileArgs {
  int64_t k = 0, m = 0, n = 0, chain = 0;
  // A strip of `tiles` tiles of m rows, below each other. A (or each row of A) of the next tile lies a_step bytes
  // further. C, the residual and bias_m continue where the rows of the tile before end. c_in is null. KS = 1: `piece`
  // steps, whole chains, are computed for all tiles before the next steps, so that rows of B are read from L1.
  int64_t tiles = 1, a_step = 0, piece = INT64_MAX;
  // Kernels that are not `pitched`: m, and a_step zero, where a_rows has every tile's rows in turn; else 0.
  int64_t own_rows = 0;
  // KS > 1: each tile of the strip stands for `panels` whole tiles side by side. Their panels of B lie b_step bytes
  // apart, their columns of c_in and c_out lie panel_in and panel_out elements apart. The residual and bias_n continue
  // where the tile before ends.
  int64_t panels = 1, b_step = 0, panel_in = 0, panel_out = 0;
  bool fetch_out = false;  // prefetch for writing the lines to which the next tile of the strip is stored
  const void* const* a_rows = nullptr;
  int64_t a_pitch = 0;      // bytes from row to row, for kernels that want rows a constant distance apart (`pitched`)
  int64_t a_k = 1;          // KS = 1: elements from step to step of a row
  const void* a = nullptr;  // KS > 1, kCols
  int64_t lda = 0;
  const void* b = nullptr;
  int64_t ldb = 0;
  const void* c_in = nullptr;
  int64_t ld_in = 0;
  // MR * NR elements, for each tile of a strip where k > piece; may be c_in. Not read before it is written, unused
  // where k <= chain.
  void* partial = nullptr;
  void* c_out = nullptr;
  int64_t ld_out = 0;
  const Split* splits = nullptr;  // of each vector, for kernels with `splits`; null: columns follow each other
  const Epilogue* epilogue = nullptr;
  // KS > 1: a tile's epilogue and stores may wait in this memory for the next call or for finish_pending. `epilogue`
  // must live as long. Null: nothing waits.
  void* pending = nullptr;
  // Several parts: called with the tile's sums, before c_in and the epilogue, where one of them is not finite, or
  // smaller than kDoubtfulBelow.
  RepairFn repair = nullptr;
  void* repairer = nullptr;
  bool mirrored = false;  // add the products of parts in the order of a call with A and B exchanged
  // Several parts: packed a little after each product of 2 x 2 tiles, but not while sums may still be repaired from the
  // panel that it overwrites. Null: nothing is packed.
  PackAhead* pack = nullptr;
  const Feed* feed = nullptr;  // several parts: of A where its access is kRows, else of B, where there is one
  Fetch next_a, next_c;        // KS > 1: of what the next rows of tiles will read and be stored to, this call's share
  // Every fetch_every steps of each tile (a power of two), the next kFetchedTogether rows of `fetch` are fetched, until
  // none are left; where `fetch_near`, a line of each into L1.
  Fetch fetch;
  int64_t fetch_every = 1;
  bool fetch_near = false;
};

using TileFn = void (*)(const TileArgs&);

// Packs rows [r0, r0 + nr) of `axis_r` and [k0, k0 + nk) of `axis_k`, converting and masking.
// k-major: dst[k * ld + r], zeros for r in [nr, ld). r-major: dst[r * ld + k]. In panels, k stands for a step of KR; in
// those of A with KS > 1, the groups of KS steps are k-major and the steps in them r-major.
using PackFn = void (*)(void* dst, int64_t ld, const void* src, const void* aux, const Axis& axis_r, int64_t r0,
                        int64_t nr, const Axis& axis_k, int64_t k0, int64_t nk, Mask mask);
// The same for several k-major panels at once, one row of the source (one k) at a time. A segment says where `length`
// neighbouring elements of the row go: step 0 to dst, step s to dst + s * ld, followed by `zeros` zeros.
struct Segment {
  void* dst;
  int64_t ld, offset, aux_offset, length, zeros;
};
using PackRowsFn = void (*)(const Segment* segments, int count, const void* src, const void* aux, const Axis& axis_k,
                            int64_t k0, int64_t nk, Mask mask);
// dst(row r0 + i, col c0 + j) = tile[i * ld + j], converting.
using UnpackFn = void (*)(void* dst, const Axis& row, int64_t r0, int64_t nr, const Axis& col, int64_t c0, int64_t nc,
                          const void* tile, int64_t ld);
// sums[r] += the sum of row r of a panel of A, `rows` <= MR rows by `steps`.
using SumRowsFn = void (*)(double* sums, const void* panel, int64_t ld, int64_t rows, int64_t steps, AccessA access);
// sums[j] += the sum of column j of a panel of B, steps by `columns`.
using SumColumnsFn = void (*)(double* sums, const void* panel, int64_t ld, int64_t columns, int64_t steps);
// sums[channel] += a tile's pixels, one after the other, so that the result does not depend on the cut into tiles.
// Pixels are the tile's columns or, if not, its rows.
using PoolFn = void (*)(double* sums, const void* tile, int64_t ld, int64_t pixels, int64_t channels, bool columns);
// PutBits: bits of a finished tile, set where it is neither <= low nor >= high; those of row i begin at bit `at` + i *
// pitch. TakeBits: z[j] = grads[j] * scale (or grads[0] * scale) where bit `at` + j is set, else zero.
using PutBitsFn = void (*)(uint8_t* bits, int64_t at, int64_t pitch, const void* tile, int64_t ld, int64_t m, int64_t n,
                           double low, double high);
using TakeBitsFn = void (*)(void* z, const uint8_t* bits, int64_t at, int64_t n, const void* grads, bool one_grad,
                            double scale);
// In place on a tile: SiLU, Hardswish, GELU.
using ActivateFn = void (*)(void* tile, int64_t ld, int64_t m, int64_t n, Activation activation);

struct Microkernel {
  const char* name;
  const char* isa;
  DType dtype;       // of the accumulators, and of C: float32 or float64
  DType operand;     // of A and B, in panels and in place
  DType b_in_place;  // of B where it is read in place; converted as it is loaded
  int kr, mr, nr, vector;
  int parts;  // an operand is the sum of that many; a panel has each group of KS steps once for every part
  bool stores_half;
  int ks;                        // steps of a row of A that lie together in a panel; panels are filled up to whole KS
  int m_unit;                    // tiles of m begin at multiples of it
  TileFn fn[2][kMaxMr][kMaxNv];  // [access][m - 1][vectors - 1]
  // Indexed by the dtype in memory; null where the pair makes no sense.
  PackFn pack_a[2][4];  // panels, [access]: r-major, k-major
  PackFn pack_b[4];     // k-major
  PackRowsFn pack_rows[4];
  PackFn gather[4];  // r-major, to the accumulators' dtype: bias, residual
  UnpackFn unpack[4];
  SumRowsFn sum_rows;
  SumColumnsFn sum_columns;
  PoolFn pool;
  PutBitsFn put_bits;
  TakeBitsFn take_bits;
  ActivateFn activate;
  bool pitched;  // rows of A by their first one and a_pitch
  bool splits;   // stores columns by TileArgs::splits
  // The same kernel with tiles of other shapes; null: none. `wide`: fewer rows, more vectors. `narrow`: one vector and
  // more rows. `tall`: two vectors and more rows. The last two are pitched. wgrad does not use them, because they
  // cannot add up the rows of its panels.
  const Microkernel *wide, *narrow, *tall;
  const Microkernel* float16_b;                             // the same for a B in place in float16; null: none
  void (*pack_ahead[3])(PackAhead& ahead, int64_t pieces);  // PackAhead::step, by Mask; null: none
  // Feed::split, of [A, B] by Mask, from the dtype that is packed; null: none.
  void (*feed[2][3])(const Feed& feed, FedGroup& group, int64_t pieces);
  int products;  // of 2 x 2 tiles, for a group of steps
  // Several parts: has a panel, of A or of B, a number below kSmallBelow that is not zero?
  bool (*has_small)(const void* panel, int64_t ld, int64_t steps);
  // Before a thread's first tile and after its last one; null: nothing to do.
  void (*enter)();
  void (*leave)();
  // kMaxPending bytes, aligned to 64, the first kPendingState of them zero before the first call; may be null.
  void (*finish_pending)(void* pending);
};

// dispatch.cpp
struct KernelSet {
  const char* isa;
  const Microkernel* float32;  // also for float16, which is converted as it is packed
  const Microkernel* float64;
  const Microkernel* bfloat16;                 // float32's where the instruction set multiplies no bfloat16
  const Microkernel* float32_parts = nullptr;  // for layers of enough channels; null: none
  const Microkernel* float16_parts = nullptr;
  const Microkernel& for_dtype(DType t) const {
    return t == DType::kFloat64 ? *float64 : (t == DType::kBFloat16 ? *bfloat16 : *float32);
  }
  // Chooses by dtype, channels and the pixels of an image. Neither the batch nor the threads may decide a result's
  // bits.
  const Microkernel& for_problem(const GemmProblem& p) const {
    const Microkernel* parts =
        p.dtype == DType::kFloat32 ? float32_parts : (p.dtype == DType::kFloat16 ? float16_parts : nullptr);
    const int64_t out = p.a_is_weight ? p.m : p.n, in = p.split_k ? p.m : p.k;
    const int64_t pixels = p.split_k ? p.k : (p.a_is_weight ? p.n_segment : p.m_segment);
    const bool pays = in >= kChannelsForParts && out >= kChannelsForParts && pixels >= kPixelsForParts;
    // If the weight is a single tile, activations are read in place. float16 must be converted in any case. (wgrad is
    // left out: its layout decides which side is which.)
    const bool half = p.dtype == DType::kFloat16 && in >= 2 * kChannelsForParts && out >= kChannelsForParts / 2 &&
                      pixels >= 2 * kPixelsForParts;
    const bool fed =
        in >= kChannelsForParts && out >= kLeastOfTile && out <= kTileOfWeights && pixels >= 2 * kPixelsForParts;
    const bool narrow = !p.split_k && (half || fed);
    return parts && (pays || narrow) ? *parts : for_dtype(p.dtype);
  }
};

struct KernelTable {
  const Microkernel* const* kernels;
  size_t count;
};
KernelTable all_microkernels();              // whatever this library was built with, best last
bool isa_supported(const std::string& isa);  // by this CPU and operating system
// The set that CONV1X1_ISA names, or the best set that this CPU runs. Null, with the reason in `error`, if this CPU
// cannot run the named set.
const KernelSet* selected_kernels(std::string* error);

}  // namespace conv1x1
