// What all parts of a thread's work share: the problem, its plan, the workspace, and the group and slice that are being
// computed.
#pragma once

#include "../plan/plan.h"

namespace conv1x1 {

struct Shared {  // what all threads share: workspace, and panels that the caller packed
  char *once_a, *once_b, *partials, *bias;
  double* sums;
};

struct Task {
  const GemmProblem& p;
  const Plan& plan;
  const Microkernel& kernel;
  const Shared& shared;
  int64_t group = 0, slice = 0;

  Task(const GemmProblem& problem, const Plan& the_plan, const Shared& the_shared)
      : p(problem), plan(the_plan), kernel(*the_plan.kernel), shared(the_shared) {}

  // element: an address in A, in B, or in the tensor that masks them. out_element: an address in D, in its residual, or
  // in the bias gradient.
  void* element(void* base, int64_t offset) const { return static_cast<char*>(base) + offset * dtype_size(p.dtype); }
  void* out_element(void* base, int64_t offset) const {
    return static_cast<char*>(base) + offset * dtype_size(p.out_dtype);
  }
  const void* source(const Matrix& matrix) const { return element(matrix.data, group * matrix.group_stride); }
  const void* aux_source(const Matrix& matrix) const {
    return matrix.aux ? element(matrix.aux, group * matrix.aux_group_stride) : nullptr;
  }
  Mask mask_of(const Matrix& matrix) const { return matrix.aux ? p.mask : Mask::kNone; }

  // A row of a k-slice's partial results. T: the accumulators' type.
  template <class T>
  T* slice_sum(int64_t of_slice, int64_t row) const {
    return reinterpret_cast<T*>(shared.partials) + (of_slice * p.groups * p.m + row) * p.n;
  }
};

// A block: rows of tiles `is` by columns of tiles `js`, over k [k0, k0 + nk). A family computes one block at a time.
struct Block {
  Range is, js;
  int64_t k0, nk;
  bool first, last;      // is it the first, the last piece of the slice's k?
  int64_t first_column;  // its place in accumulators that are carried from one piece of k to the next
};

}  // namespace conv1x1
