// One GEMM for fprop, dgrad and wgrad:  D(m, n) = epilogue(sum_k A(m, k) * B(k, n)), per group.
//
// A is the broadcast operand, B the vector operand; n is the index along which D is contiguous. A matrix is a base
// pointer and two axes. An axis turns an index into an element offset and may be nested (image, depth, row, column),
// so strided, sliced and expanded tensors, and tiles that span images, need no copy outside the packed panels.
//
//   lower.cpp    Conv1x1Problem -> GemmProblem        plan.cpp    GemmProblem -> Plan (a pure function)
//   driver.cpp   GemmProblem + Plan -> the loops      microkernel.h   what runs inside a tile
#pragma once

#include <string>

#include "../problem.h"
#include "microkernel.h"

namespace conv1x1 {

// One GEMM index as up to four nested dimensions, outermost first. Neighbours that can be walked with one stride are
// merged when the axis is made. `aux` belongs to a second tensor of the same shape: the saved output that masks A or
// B, or the residual beside D.
struct Axis {
  int nd = 1;
  int64_t count = 0;
  int64_t size[4] = {0, 1, 1, 1}, stride[4] = {0, 0, 0, 0}, aux_stride[4] = {0, 0, 0, 0};

  bool linear() const { return nd == 1; }
  int64_t inner_size() const { return size[nd - 1]; }
  int64_t inner_stride() const { return stride[nd - 1]; }
};

// A stretch of an axis that one stride walks.
struct Run {
  int64_t offset, aux_offset, length, stride, aux_stride;
};

inline Run run_at(const Axis& axis, int64_t index, int64_t limit) {
  const int last = axis.nd - 1;
  Run run{0, 0, 0, axis.stride[last], axis.aux_stride[last]};
  for (int d = last; d > 0; --d) {
    const int64_t outer = index / axis.size[d], i = index - outer * axis.size[d];
    if (d == last) run.length = axis.size[d] - i;
    run.offset += i * axis.stride[d];
    run.aux_offset += i * axis.aux_stride[d];
    index = outer;
  }
  if (last == 0) run.length = axis.size[0] - index;
  run.offset += index * axis.stride[0];
  run.aux_offset += index * axis.aux_stride[0];
  if (run.length > limit) run.length = limit;
  return run;
}

struct Matrix {
  void* data = nullptr;
  void* aux = nullptr;
  Axis row, col;
  int64_t group_stride = 0, aux_group_stride = 0;
};

struct GemmProblem {
  DType dtype = DType::kFloat32;      // of A, B, bias and mask in memory; half types accumulate in float32
  DType out_dtype = DType::kFloat32;  // of D and row_sums
  int64_t groups = 1, m = 0, n = 0, k = 0;
  Matrix a, b, d;                                 // a: m x k, b: k x n, d: m x n
  int64_t m_segment = 0, n_segment = 0;           // natural pieces of m and n: the pixels of one image, or all of it
  bool a_is_weight = false, b_is_weight = false;  // pack once for all threads, not once per block

  Mask mask = Mask::kNone;  // applied to the operand that has an aux tensor, as it is packed
  Activation activation = Activation::kNone;
  VectorView bias;  // groups * (m or n) elements
  bool bias_along_m = false;

  // dbias: sum of A's rows (after the mask), taken from the packed panels. groups * m elements.
  VectorView row_sums;
  bool row_sums_accumulate = false;

  // Average pooling: instead of D, the sum over the pixels (n if pool_along_n, else m) of every image goes to `pool`,
  // (images, groups * channels) doubles, zeroed by the caller.
  double* pool = nullptr;
  bool pool_along_n = false;

  bool split_k = false;  // k is the long one (wgrad): cut it into slices that depend on the shape alone
  bool narrow = false;   // few channels on one side of the weight: shorter chains along k
};

enum class Operand : int { kDirect, kPackOnce, kPackBlock };

// m or n cut into segments, and each segment into tiles of nearly equal numbers of vectors.
struct Tiling {
  int64_t segment = 0, segments = 0, unit = 1, vectors = 0, per_segment = 0;
  int64_t least = 0, longer = 0;  // vectors of a tile, and how many tiles have one more

  Tiling() = default;
  Tiling(int64_t total, int64_t segment_length, int64_t unit_, int64_t max_units);
  int64_t count() const { return segments * per_segment; }
  int64_t padded() const { return segments * vectors * unit; }  // with every segment rounded up to whole vectors

  struct Tile {
    int64_t start, size, padded_start, padded_size, segment;
  };
  Tile operator[](int64_t t) const {
    const int64_t s = segments == 1 ? 0 : t / per_segment, j = t - s * per_segment;
    const int64_t first = j * least + (j < longer ? j : longer), units = least + (j < longer ? 1 : 0);
    const int64_t at = first * unit, left = segment - at;
    return {s * segment + at, units * unit < left ? units * unit : left, (s * vectors + first) * unit, units * unit, s};
  }
};

constexpr int kMaxBlockN = 32;  // tiles of n in a block at most

struct Plan {
  const Microkernel* kernel = nullptr;
  Tiling m, n;
  Operand a = Operand::kDirect, b = Operand::kDirect;
  AccessA a_access = AccessA::kRows;
  int64_t block_m = 1, block_n = 1;  // tiles of m and n in a block
  int64_t kc = 0;                    // length of a k-block: one accumulator chain. A constant: numerics depend on it
  int64_t k_step = 0;                // k packed at a time, a multiple of kc, or all of a slice
  int64_t slices = 1, slice = 0;     // k-slices and their length
  int threads = 1, part_g = 1, part_k = 1, part_m = 1, part_n = 1;
  // workspace, in bytes
  int64_t once_a = 0, once_b = 0, block_a = 0, block_b = 0, accumulators = 0, partials = 0, sums = 0, bias = 0;
  int64_t per_thread() const;
  int64_t total() const;
};

// Pure: the same problem, thread count and table always give the same plan.
Plan make_plan(const GemmProblem& problem, int max_threads, const KernelSet& kernels);
std::string describe(const GemmProblem& problem, const Plan& plan);

enum Status : int { kOk = 0, kOutOfMemory = 1 };
Status run_gemm(const GemmProblem& problem, const Plan& plan);

// lower.cpp
GemmProblem lower_fprop(const Conv1x1Problem& p);
GemmProblem lower_dgrad(const Conv1x1Problem& p);
GemmProblem lower_wgrad(const Conv1x1Problem& p);
GemmProblem lower_avg_pool(const Conv1x1Problem& p, double* pool);

// to(channel, pixel) = from(channel, pixel) under the mask of from.aux; the vectors along `to`'s unit stride (col).
struct MaskedCopy {
  Matrix from, to;
  Mask mask;
};
MaskedCopy lower_mask(const Conv1x1Problem& p, const ActivationView& dz);

}  // namespace conv1x1
