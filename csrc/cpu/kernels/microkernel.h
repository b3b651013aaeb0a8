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
// AMX's kernels have a contract of their own: amx/amx_kernel.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "../../problem/gemm.h"

namespace conv1x1 {

constexpr int kMaxMr = 32, kMaxNv = 4, kMaxNr = 64;
constexpr int kFetchedTogether = 4;  // rows of lines that a tile prefetches at once

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
  bool stream = false;  // past the caches: C's rows are whole aligned lines of 64 bytes, the driver fences
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

// What a call prefetches for later blocks while it computes. In every `every` steps (a power of two) of each of its
// tiles, a multiply-add kernel prefetches the next kFetchedTogether rows of `lines`, until all of them are fetched: all
// lines of a row into L2 or, if `near`, one line of each row into L1. AMX's kernels spread `lines` over their groups of
// steps and ignore `every` and `near`.
struct FetchShare {
  Fetch lines;
  int64_t every = 1;
  bool near = false;
};

// The arguments that kernels of all families have.
struct TileArgs {
  int64_t k = 0, m = 0, n = 0, chain = 0;
  // A strip of `tiles` tiles of m rows, below each other. A (or each row of A) of the next tile lies a_step bytes
  // further. C, the residual and bias_m continue where the rows of the tile before end. c_in is null.
  int64_t tiles = 1, a_step = 0;
  const void* const* a_rows = nullptr;
  const void* b = nullptr;
  int64_t ldb = 0;
  const void* c_in = nullptr;
  int64_t ld_in = 0;
  void* c_out = nullptr;
  int64_t ld_out = 0;
  const Split* splits = nullptr;  // one for each vector, for kernels with `splits`; null: columns are contiguous
  const Epilogue* epilogue = nullptr;
  FetchShare fetch;
};

// The arguments of multiply-add kernels. One function serves kRows and kCols.
struct FmaTileArgs : TileArgs {
  int64_t a_k = 1;      // elements from step to step of a row
  int64_t a_pitch = 0;  // bytes from row to row, for kernels that want rows a constant distance apart (`pitched`)
  // Only for kernels that are not `pitched`. If m: a_rows has the rows of every tile of the strip, one tile after the
  // other, and a_step is zero. If 0: a_rows has the rows of the first tile.
  int64_t rows_per_tile = 0;
  // A number of steps, whole chains. A strip computes this many steps for all of its tiles before the next steps, so
  // that the rows of B are read from L1.
  int64_t piece = INT64_MAX;
  // Memory for the sums of earlier chains: MR * NR elements, or that many for each tile of a strip where k > piece. May
  // be c_in. It is not read before it is written, and not used where k <= chain.
  void* partial = nullptr;
  bool fetch_out = false;  // prefetch for writing the lines to which the strip's next tile is stored
};
using FmaTileFn = void (*)(const FmaTileArgs&);

// Packs rows [r0, r0 + nr) of `axis_r` and [k0, k0 + nk) of `axis_k`, converting and masking.
// k-major: dst[k * ld + r], zeros for r in [nr, ld). r-major: dst[r * ld + k]. In panels, k counts steps of KR. In
// panels of A with KS > 1, groups of KS steps are k-major, and the steps within a group are r-major.
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

struct AmxKernel;  // amx/amx_kernel.h

struct Microkernel;

// The part of a Microkernel that only multiply-add kernels have.
struct FmaKernel {
  FmaTileFn fn[kMaxMr][kMaxNv] = {};  // [m - 1][vectors - 1]
  bool pitched = false;               // takes the first row of A and a_pitch, not a pointer to each row
};

struct Microkernel {
  const char* name;
  const char* isa;
  DType dtype;       // of the accumulators, and of C: float32 or float64
  DType operand;     // of A and B, in panels and in place
  DType b_in_place;  // of B where it is read in place; converted as it is loaded
  int kr, mr, nr, vector;
  int parts;  // an operand is the sum of that many; a panel has each group of KS steps once for every part
  bool stores_half;
  bool splits;  // stores columns by TileArgs::splits
  int ks;       // steps of a row of A that lie together in a panel; panels are filled up to whole KS
  int m_unit;   // tiles of m begin at multiples of it
  // The part of the kernel's family. The other pointer is null.
  const FmaKernel* fma;
  const AmxKernel* amx;
  // Indexed by the dtype in memory. Null: the kernel has no function for this dtype.
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
  // The same kernel with tiles of other shapes; null: none. `wide`: fewer rows, more vectors. `narrow`: one vector and
  // more rows. `tall`: two vectors and more rows. The last two are pitched. wgrad does not use them, because sum_rows
  // cannot add up that many rows.
  const Microkernel *wide, *narrow, *tall;
  const Microkernel* float16_b;  // the same for a B in place in float16; null: none
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
