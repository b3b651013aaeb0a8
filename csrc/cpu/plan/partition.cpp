// Divides a plan's work over threads. Called by plan.cpp.
#include <algorithm>

#include "../kernels/amx/amx_kernel.h"
#include "plan_facts.h"

namespace conv1x1 {

// Cuts tiles of pixels into more and smaller ones, if their number does not divide evenly over the threads and the
// busiest thread then has fewer vectors. (Tiles of a weight stay, because panels made beforehand must not depend on the
// number of threads.)
Tiling evened(const GemmProblem& p, const Tiling& n, int64_t parts) {
  const int64_t count = n.count();
  if (p.b_is_weight || p.pools || n.segments != 1 || count % parts == 0) return n;
  Tiling finer = n;
  finer.per_segment = round_up(count, parts);
  const bool better =
      finer.per_segment <= finer.vectors && finer.most(finer.per_segment / parts) < n.most(ceil_div(count, parts));
  return better ? finer : n;
}

// Chooses the split of groups x k-slices x m tiles x n tiles that leaves the busiest thread least to do. The cost is in
// cycles per k: two vectors multiplied a cycle (AMX: 32), and the time to read and to pack the operands.
void choose_partition(const GemmProblem& p, Plan& plan, int max_threads) {
  const double work = static_cast<double>(p.groups) * p.m * std::max<int64_t>(p.n, 1) * p.k;
  const int threads = static_cast<int>(clamp(static_cast<int64_t>(work / kWorkPerThread), 1, max_threads));
  plan.part_g = plan.part_k = plan.part_m = plan.part_n = plan.threads = 1;
  if (threads == 1) return;
  // Pooled pixels of one image stay with one thread: their sum has one order.
  const bool images_m = p.pools && !p.pool_along_n, images_n = p.pools && p.pool_along_n;
  const int64_t units_m = images_m ? plan.m.segments : plan.m.count();
  const int64_t units_n = images_n ? plan.n.segments : std::max<int64_t>(plan.n.count(), 1);
  const double multiply = plan.kernel->amx ? plan.kernel->amx->products / 32.0 : 0.5;
  // Cycles to read and, if it is packed, to pack an element. Small weights come from L2, all other operands from
  // farther away.
  const bool weight_is_near = (p.a_is_weight ? p.m : p.n) * p.k * dtype_size(p.dtype) <= l2_bytes();
  const auto cost_of = [&](const OperandPlan& how, bool weight, bool transposes, const void* aux) {
    const double read = (weight && weight_is_near ? 0.1 : 0.5) * (aux ? 2 : 1);
    return how.in_place() ? read : read + (transposes ? 1 : 0.5);
  };
  const double cost_a = cost_of(plan.a, p.a_is_weight, false, p.a.aux);
  const double cost_b = cost_of(plan.b, p.b_is_weight, p.b.col.inner_stride() != 1, p.b.aux);
  // The cost of an operand. Packed by block: every thread that uses it packs it. Packed once: by the one thread that
  // uses it, or by all threads, which then read it from L3.
  const auto bring = [&](const OperandPlan& how, double cost, int64_t all, int64_t own, int others, int64_t times) {
    if (!how.whole()) return static_cast<double>(own * times) * cost;
    return others == 1 ? static_cast<double>(own) * cost : 2 * static_cast<double>(all) * cost / threads;
  };
  double best = 1e300;
  const int most_g = static_cast<int>(std::min<int64_t>(p.groups, threads));
  for (int g = 1; g <= most_g; g = g == most_g ? most_g + 1 : most_g) {
    const int most_k = static_cast<int>(std::min<int64_t>(plan.slices, threads / g));
    for (int k = 1; k <= most_k; ++k) {
      const int most_m = static_cast<int>(std::min<int64_t>(units_m, threads / (g * k)));
      for (int m = 1; m <= most_m; ++m) {
        const int n = static_cast<int>(std::min<int64_t>(units_n, threads / (g * k * m)));
        const int64_t tm = ceil_div(units_m, m) * (images_m ? plan.m.per_segment : 1);
        const Tiling cut = evened(p, plan.n, n);
        const int64_t tn = images_n ? ceil_div(units_n, n) * plan.n.per_segment : ceil_div(cut.count(), n);
        const int64_t rows = plan.m.most(tm) * plan.m.unit, vectors = std::max<int64_t>(cut.most(tn), 1);
        const double cost =
            static_cast<double>(ceil_div(p.groups, g) * ceil_div(plan.slices, k)) *
            (static_cast<double>(rows * vectors) * multiply +
             bring(plan.a, cost_a, p.m, rows, n, ceil_div(tn, plan.a.in_place() ? plan.block_n : plan.reach_n)) +
             bring(plan.b, cost_b, p.n, vectors * plan.n.unit, m, ceil_div(tm, plan.block_m)));
        if (cost < best * 0.999) {
          best = cost;
          plan.part_g = g;
          plan.part_k = k;
          plan.part_m = m;
          plan.part_n = n;
        }
      }
    }
  }
  plan.threads = plan.part_g * plan.part_k * plan.part_m * plan.part_n;
}

}  // namespace conv1x1
