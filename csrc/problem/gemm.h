// One GEMM for fprop, dgrad and wgrad:  D(m, n) = epilogue(sum_k A(m, k) * B(k, n)), per group.
//
// A is the broadcast operand, B the vector operand; n is the index along which D is contiguous. A matrix is a base
// pointer and two axes. An axis turns an index into an element offset and may be nested (image, depth, row, column),
// so strided, sliced and expanded tensors, and tiles that span images, need no copy outside the packed panels.
//
// Made by lower.cpp from a Conv1x1Problem; run by cpu/run/driver.cpp and cuda/launch.cu, each after a plan of its own.
#pragma once

#include <cstdint>

#include "problem.h"

namespace conv1x1 {

// dz = dy where the mask lets it pass, else zero. A NaN in the saved output passes the gradient, as in torch.
enum class Mask : int { kNone, kReLU, kReLU6 };

// One GEMM index as up to four nested dimensions, outermost first. Neighbouring dimensions that one stride connects are
// merged when the axis is made. `aux` strides are those of a second tensor of the same shape: the saved output that
// masks A or B, or the residual beside D.
struct Axis {
  int nd = 1;
  int64_t count = 0;
  int64_t size[4] = {0, 1, 1, 1}, stride[4] = {0, 0, 0, 0}, aux_stride[4] = {0, 0, 0, 0};

  bool linear() const { return nd == 1; }
  int64_t inner_size() const { return size[nd - 1]; }
  int64_t inner_stride() const { return stride[nd - 1]; }
};

// Consecutive indices of an axis that one stride connects.
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

// The axis of the aux tensor alone.
inline Axis aux_axis(const Axis& axis) {
  Axis aux = axis;
  for (int d = 0; d < axis.nd; ++d) aux.stride[d] = axis.aux_stride[d];
  return aux;
}

struct Matrix {
  void* data = nullptr;
  void* aux = nullptr;
  Axis row, col;
  int64_t group_stride = 0, aux_group_stride = 0;
};

struct GemmProblem {
  DType dtype = DType::kFloat32;      // of A, B, bias and mask in memory; half types accumulate in float32
  DType out_dtype = DType::kFloat32;  // of D (and the residual) and row_sums: dtype, or float32 for half types
  int64_t groups = 1, m = 0, n = 0, k = 0;
  Matrix a, b, d;                                 // a: m x k, b: k x n, d: m x n
  int64_t m_segment = 0, n_segment = 0;           // length of natural pieces of m and n: the pixels of an image, or all
  bool a_is_weight = false, b_is_weight = false;  // the weight is packed once for all threads

  Mask mask = Mask::kNone;  // applied to the operand that has an aux tensor, as it is packed
  Activation activation = Activation::kNone;
  VectorView bias;  // groups * (m or n) elements
  bool bias_along_m = false;

  // dbias: sum of A's rows (after the mask), taken from the packed panels. groups * m elements.
  VectorView row_sums;
  bool row_sums_accumulate = false;
  bool exchanged = false;  // wgrad with A and B exchanged: row_sums are sums of B's columns, groups * n

  // Average pooling: instead of D, the sum over the pixels (n if pool_along_n, else m) of every image is wanted.
  bool pools = false, pool_along_n = false;
  double* pool = nullptr;        // CPU: the result, (images, groups * channels), zeroed by the caller
  uint8_t* pool_mask = nullptr;  // Conv1x1Problem's

  // The weight's panels, made by pack_weight() (cpu/plan/plan.h) of the same weight, for a forward or dgrad of the same
  // activation layout; null: the weight is packed at every call, if the kernel needs panels.
  const void* packed_weight = nullptr;

  bool split_k = false;  // wgrad: cut k into slices whose number depends on the shape alone
  bool narrow = false;   // few channels on one side of the weight: shorter chains along k
};

GemmProblem lower_fprop(const Conv1x1Problem& p);
GemmProblem lower_dgrad(const Conv1x1Problem& p);
GemmProblem lower_wgrad(const Conv1x1Problem& p);
GemmProblem lower_avg_pool(const Conv1x1Problem& p);

// to(channel, pixel) = from(channel, pixel) under the mask of from.aux. `col` is the index with unit stride in `to`.
struct MaskedCopy {
  Matrix from, to;
  Mask mask;
};
MaskedCopy lower_mask(const Conv1x1Problem& p, const ActivationView& dz);

}  // namespace conv1x1
