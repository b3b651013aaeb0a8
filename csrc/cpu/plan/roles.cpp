// Which operand of a GEMM is A: D^T = B^T A^T.
#include <algorithm>
#include <utility>

#include "plan_facts.h"

namespace conv1x1 {
namespace {

// D^T = B^T A^T.
GemmProblem transposed(const GemmProblem& p) {
  const auto flip = [](Matrix matrix) {
    std::swap(matrix.row, matrix.col);
    return matrix;
  };
  GemmProblem q = p;
  q.a = flip(p.b);
  q.b = flip(p.a);
  q.d = flip(p.d);
  std::swap(q.m, q.n);
  std::swap(q.m_segment, q.n_segment);
  std::swap(q.a_is_weight, q.b_is_weight);
  q.bias_along_m = !p.bias_along_m;
  return q;
}

}  // namespace

GemmProblem with_best_roles(const GemmProblem& p) {
  if (!p.split_k || p.n == 0) return p;
  // Lines of B's panels are several times as long as lines of A's panels. With channels last the larger operand is
  // therefore B, if there are enough pixels to pay for storing D transposed.
  const bool channels_last = p.a.row.inner_stride() == 1 && p.b.col.inner_stride() == 1;
  if (!channels_last || p.m < std::max<int64_t>(p.n, 32) || p.k < 8 * p.n) return p;
  GemmProblem q = transposed(p);
  q.exchanged = true;
  return q;
}

GemmProblem roles_for_packed_weight(const GemmProblem& p, const KernelSet& kernels) {
  const Microkernel& kernel = choose_kernel(p, kernels);
  const bool lanes_idle =
      static_cast<double>(p.n) < 0.85 * static_cast<double>((p.n + kernel.vector - 1) / kernel.vector * kernel.vector);
  const int64_t least = kernel.kr == 1 ? 128 : 512;  // pays for storing D transposed, and for pairs of narrow panels
  const bool large = p.k >= least && p.m >= least;
  return p.a_is_weight && kernel.ks == 1 && lanes_idle && large ? transposed(p) : p;
}

}  // namespace conv1x1
