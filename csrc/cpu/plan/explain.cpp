// A plan in words, for explain(): what is chosen, and why.
#include <cstdlib>
#include <string>

#include "plan_facts.h"

namespace conv1x1 {
namespace {

std::string number(int64_t n) { return std::to_string(n); }

std::string origin(const OperandPlan& operand) {
  static const char* const names[] = {"read in place",
                                      "read in place, converted to float32 as it is loaded",
                                      "read in place, split between the products",
                                      "packed once",
                                      "packed by block",
                                      "packed by block, a row of tiles between the products of the one before",
                                      "packed by the caller"};
  return std::string(names[static_cast<int>(operand.source)]) + ": " + operand.reason;
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
  text += "\nA=" + origin(plan.a);
  text += "\nB=" + origin(plan.b);
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
