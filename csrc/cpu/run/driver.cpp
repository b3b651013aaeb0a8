// Runs a plan: the workspace, the team of threads, and the phases.
//
//   phase 1   weights that are packed once: panels shared out over the threads
//   phase 2   each thread: its groups, k-slices, and rectangle of tiles (worker.h)
//   phase 3   k-slices joined in their order; row sums written out
//
// Nothing here throws, and all memory is taken before the parallel region.
#include <cstdlib>
#include <cstring>

#include "amx_block.h"
#include "fma_block.h"
#include "parallel.h"
#include "worker.h"

namespace conv1x1 {
namespace {

// The workspace of a small call is on the stack: aligned memory from malloc would cost 0.2 us of about 2 us.
constexpr int64_t kSmallWorkspace = 16 << 10;

template <class Family>
Status run(const GemmProblem& p, const Plan& plan) {
  alignas(64) char small[kSmallWorkspace];
  const int64_t bytes = plan.total();
  void* allocated = nullptr;
  if (bytes > kSmallWorkspace && posix_memalign(&allocated, 64, static_cast<size_t>(bytes)) != 0) return kOutOfMemory;
  char* memory = allocated ? static_cast<char*>(allocated) : small;
  Shared shared;
  char* panels = static_cast<char*>(const_cast<void*>(p.packed_weight));  // only read
  shared.once_a = plan.prepacked ? panels : memory;
  shared.once_b = plan.prepacked ? panels : memory + plan.once_a;
  shared.partials = memory + plan.once_a + plan.once_b;
  shared.sums = reinterpret_cast<double*>(shared.partials + plan.partials);
  shared.bias = shared.partials + plan.partials + plan.sums;
  char* first_thread = shared.bias + plan.bias;
  if (plan.sums) std::memset(shared.sums, 0, static_cast<size_t>(plan.sums));
  if (plan.bias) {
    Axis from, one;
    from.size[0] = from.count = p.groups * (p.bias_along_m ? p.m : p.n);
    from.stride[0] = p.bias.stride;
    one.size[0] = one.count = 1;
    plan.kernel->gather[static_cast<int>(p.dtype)](shared.bias, from.count, p.bias.data, nullptr, one, 0, 1, from, 0,
                                                   from.count, Mask::kNone);
  } else {
    shared.bias = static_cast<char*>(p.bias.data);
  }

  const bool packs_once = plan.once_a + plan.once_b > 0;
  // `id` goes over the plan's threads: OpenMP may start fewer threads, and the result must be the same.
  run_team(plan.threads, [&](int thread, int threads, auto barrier) {
    if (packs_once) {
      const Task task(p, plan, shared);
      for (int id = thread; id < plan.threads; id += threads)
        Panels<typename Family::T>(task, first_thread).pack_whole(id, plan.threads);
      barrier();
    }
    for (int id = thread; id < plan.threads; id += threads)
      Worker<Family>(p, plan, shared, first_thread + id * plan.per_thread()).compute(id);
    if (plan.slices > 1 && p.n > 0) {
      barrier();
      for (int id = thread; id < plan.threads; id += threads)
        Worker<Family>(p, plan, shared, first_thread + id * plan.per_thread()).join_slices(id, plan.threads);
    }
    if (plan.streams) finish_streaming();
  });
  if (p.row_sums.data) Worker<Family>(p, plan, shared, first_thread).write_row_sums();
  std::free(allocated);
  return kOk;
}

template <class T>
void pack(const GemmProblem& p, const Plan& plan, void* panels) {
  Shared shared{};
  shared.once_a = shared.once_b = static_cast<char*>(panels);
  const Task task(p, plan, shared);
  Panels<T>(task, nullptr).pack_whole(0, 1);
}

}  // namespace

void pack_weight(const GemmProblem& problem, const KernelSet& kernels, void* panels) {
  GemmProblem p = problem;
  p.packed_weight = panels;
  const Plan plan = make_plan(p, 1, kernels);
  if (plan.kernel->dtype == DType::kFloat64)
    pack<double>(p, plan, panels);
  else
    pack<float>(p, plan, panels);
}

Status run_gemm(const GemmProblem& p, const Plan& plan) {
  if (p.m == 0 || (p.n == 0 && !p.row_sums.data)) return kOk;
  if (plan.kernel->amx) return run<AmxBlock>(p, plan);
  return plan.kernel->dtype == DType::kFloat64 ? run<FmaBlock<double>>(p, plan) : run<FmaBlock<float>>(p, plan);
}

Status run_gemm(const GemmProblem& problem, int max_threads, const KernelSet& kernels) {
  const GemmProblem p = with_best_roles(problem);
  return run_gemm(p, make_plan(p, max_threads, kernels));
}

}  // namespace conv1x1
