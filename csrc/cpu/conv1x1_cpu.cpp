// The binding of the CPU kernels: implements the Backend of binding.h by plan.h and avg_pool.h, and turns a Status into
// an exception.
#include <torch/csrc/stable/ops.h>

#include <cstring>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../api/binding.h"
#include "../api/strides.h"
#include "plan/plan_facts.h"
#include "run/avg_pool.h"

namespace conv1x1 {
namespace {

const KernelSet& kernels() {
  std::string error;
  const KernelSet* set = selected_kernels(&error);
  raise_if(error);
  return *set;
}

void raise_if_failed(Status status) { raise_if(status == kOk ? "" : "conv1x1: out of memory for the workspace"); }

class CpuBackend final : public Backend {
 public:
  // The number of threads is read at every call: a new Python thread gets torch's setting only when torch is asked.
  explicit CpuBackend(const ConvArgs&) : threads_(static_cast<int>(torch::stable::get_num_threads())) {}

  bool output_channels_last(const ConvArgs& args) const override { return cpu_output_channels_last(args, threads_); }

  // glibc maps and unmaps blocks over 32 MiB at every call. With 4 KiB pages their page faults take longer than
  // computing them. This asks for huge pages; where the system has them off, nothing changes.
  void prepare_output(void* data, int64_t bytes) const override {
#if defined(__linux__)
    constexpr int64_t kHugePage = 2 << 20;
    if (bytes <= 32 << 20) return;
    char* begin = static_cast<char*>(data);
    begin += -reinterpret_cast<intptr_t>(begin) & (kHugePage - 1);
    const int64_t inside = (static_cast<char*>(data) + bytes - begin) & ~(kHugePage - 1);
    madvise(begin, static_cast<size_t>(inside), MADV_HUGEPAGE);
#else
    (void)data, (void)bytes;
#endif
  }

  void gemm(const GemmProblem& g) const override { raise_if_failed(run_gemm(g, threads_, kernels())); }

  int64_t panel_layout(const GemmProblem& g) const override {
    int64_t hash = 1469598103934665603;  // FNV-1a of the microkernel's name
    for (const char* c = choose_kernel(g, kernels()).name; *c; ++c)
      hash = static_cast<int64_t>((static_cast<uint64_t>(hash) ^ static_cast<uint64_t>(*c)) * 1099511628211u);
    return hash;
  }
  GemmProblem roles_for_packed_weight(const GemmProblem& g) const override {
    return conv1x1::roles_for_packed_weight(g, kernels());
  }
  int64_t packed_weight_bytes(const GemmProblem& g) const override {
    return conv1x1::packed_weight_bytes(g, kernels());
  }
  void pack_weight(const GemmProblem& g, void* panels) const override { conv1x1::pack_weight(g, kernels(), panels); }

  void mask_grad(const Conv1x1Problem& p, const ActivationView& dz) const override {
    conv1x1::mask_grad(p, dz, threads_, kernels());
  }

  void zero_fill(const Conv1x1Problem& p) const override { conv1x1::zero_fill(p, threads_); }

  bool pool_masks() const override { return true; }

  void avg_pool(const Conv1x1Problem& p, void* out) const override {
    raise_if_failed(conv1x1::avg_pool(p, out, threads_, kernels()));
  }

  void avg_pool_backward(const Conv1x1Problem& p) const override {
    const size_t size = static_cast<size_t>(dtype_size(p.dtype)), c_out = static_cast<size_t>(p.c_out);
    if (p.dw.data) std::memset(p.dw.data, 0, c_out * static_cast<size_t>(p.c_in / p.groups) * size);
    if (p.dbias.data) std::memset(p.dbias.data, 0, c_out * size);
    raise_if_failed(conv1x1::avg_pool_backward(p, threads_, kernels()));
  }

  std::string explain(const GemmProblem& problem) const override {
    const GemmProblem g = with_best_roles(problem);
    return describe(g, make_plan(g, threads_, kernels()));
  }

  std::string explain_avg_pool(const Conv1x1Problem& p) const override { return explain(lower_avg_pool(p)); }

 private:
  const int threads_;
};

std::string build_info() {
  const KernelSet& set = kernels();
  std::string text = std::string("isa=") + set.isa + "\nmicrokernels=";
  const KernelTable all = all_microkernels();
  for (size_t i = 0; i < all.count; ++i) text += std::string(i ? ", " : "") + all.kernels[i]->name;
  return text + "\ntorch_target=" + std::to_string(TORCH_FEATURE_VERSION >> 56) + "." +
         std::to_string((TORCH_FEATURE_VERSION >> 48) & 255) + "\ncompiler=" + __VERSION__ + "\n" + cuda_build_info();
}

}  // namespace
}  // namespace conv1x1

STABLE_TORCH_LIBRARY_IMPL(conv1x1_ext, CPU, m) { conv1x1::Operators<conv1x1::CpuBackend>::implement(m); }

STABLE_TORCH_LIBRARY_IMPL(conv1x1_ext, CompositeExplicitAutograd, m) {
  m.impl("_build_info", TORCH_BOX(&conv1x1::build_info));
}
