// A plan in words, for explain(): what is chosen, and why.
#include <cstdlib>
#include <string>

#include "plan_facts.h"

namespace conv1x1 {
namespace {

std::string number(int64_t n) { return std::to_string(n); }

const char* name_of(Operand o) {
  return o == Operand::kDirect ? "read in place" : (o == Operand::kPackOnce ? "packed once" : "packed by block");
}

std::string parts_of(const Plan& plan) {
  return "as the sum of " + number(plan.kernel->parts) + " " + dtype_name(plan.kernel->operand) + ", exactly";
}

std::string fed(const Plan& plan) {
  return plan.kernel->parts > 1 ? "; " + parts_of(plan) + ", split between the products" : "";
}

std::string reason_a(const GemmProblem& p, const Plan& plan) {
  if (plan.a == Operand::kDirect)
    return (plan.a_access == AccessA::kRows ? "k is contiguous" : "m is contiguous") + fed(plan);
  if (plan.prepacked && p.a_is_weight) return "by the caller, beforehand";
  if (plan.kernel->parts > 1) return parts_of(plan);
  if (p.dtype != plan.kernel->operand) return "converted to float32";
  if (p.a.aux) return "masked by the saved output";
  if (p.row_sums.data && !p.exchanged) return "the bias gradient is summed from the panels";
  if (plan.kernel->kr > 1) return "pairs along k interleaved";
  return plan.a_access == AccessA::kCols && p.a.row.inner_stride() == 1 ? "its columns fall into few cache sets"
                                                                        : "its strides do not suit the microkernel";
}

std::string reason_b(const GemmProblem& p, const Plan& plan) {
  if (plan.b == Operand::kDirect && plan.kernel->parts > 1) return "n is contiguous" + fed(plan);
  if (plan.b == Operand::kDirect && p.dtype != plan.kernel->operand)
    return "n is contiguous; converted to float32 as it is loaded";
  if (plan.b == Operand::kDirect) return "n is contiguous";
  if (plan.prepacked && p.b_is_weight) return "by the caller, beforehand";
  if (plan.kernel->parts > 1) return parts_of(plan);
  if (p.dtype != plan.kernel->operand) return "converted to float32";
  if (p.b.aux) return "masked by the saved output";
  if (p.exchanged && p.row_sums.data) return "the bias gradient is summed from the panels";
  if (plan.kernel->kr > 1) return "pairs along k interleaved";
  if (p.b.col.inner_stride() != 1) return "n is not contiguous";
  if (plan.n.segment != p.n_segment) return "tiles span images to keep vectors full";
  return b_readable(p, *plan.kernel) ? "its rows fall into few cache sets, or many pages"
                                     : "its strides do not suit the microkernel";
}

}  // namespace

std::string describe(const GemmProblem& p, const Plan& plan) {
  const int64_t work = p.groups * p.m * p.n * p.k;
  std::string text =
      std::string("kernel=") + plan.kernel->name + ": for " + dtype_name(p.dtype) + " in " + plan.isa + plan.shape;
  text += "\nisa=" + std::string(plan.isa) +
          (std::getenv("CONV1X1_ISA") ? ": CONV1X1_ISA asks for it" : ": the fastest this CPU runs");
  text += std::string("\ndtype=") + dtype_name(p.dtype) + ", accumulated in " + dtype_name(plan.kernel->dtype);
  text += "\ngemm=m " + number(p.m) + ", n " + number(p.n) + ", k " + number(p.k) + ", groups " + number(p.groups);
  if (p.exchanged) text += ": A is x and B dz, the larger one packed in the longer lines";
  text += std::string("\nA=") + name_of(plan.a) + ": " + reason_a(p, plan);
  if (plan.packs_ahead) text += ", a row of tiles between the products of the one before";
  text += std::string("\nB=") + name_of(plan.b) + ": " + reason_b(p, plan);
  text += "\ntiles=" + number(plan.m.count()) + " x " + number(plan.n.count()) + " of at most " +
          number(plan.kernel->mr) + " x " + number(plan.kernel->nr);
  text += "\nblock=" + number(plan.block_m) + " x " + number(plan.block_n) + " tiles, k " + number(plan.k_step) +
          (plan.kernel->ks > 1 && plan.kernel->parts == 1 ? " in one chain" : " by chains of " + number(plan.kc)) +
          ": B's block stays in an L2 of " + number(l2_bytes() >> 10) + " KiB";
  if (plan.groups_take_turns)
    text += p.split_k ? ", groups take turns at k-slices" : ", groups take turns at blocks of m";
  if (plan.strip > 1) text += "\nstrip=" + number(plan.strip) + " tiles of m in a call, where they can be one";
  if (plan.partials_kept > 1) text += ", for k " + number(plan.piece * plan.kernel->kr) + " at a time";
  text += "\nk_slices=" + number(plan.slices);
  text += std::string("\nstores=") + (plan.streams ? "past the caches, where whole lines are" : "through the caches");
  text += "\nthreads=" + number(plan.threads) + " (groups " + number(plan.part_g) + ", k " + number(plan.part_k) +
          ", m " + number(plan.part_m) + ", n " + number(plan.part_n) + "): " + number(work) +
          " multiply-adds, a thread is worth " + number(static_cast<int64_t>(kWorkPerThread));
  return text + "\nworkspace_bytes=" + number(plan.total());
}

}  // namespace conv1x1
