// The CUDA operators of a library that was built without CUDA. Each raises an error that says so; torch's own error
// would list backends.
#include "../binding.h"

namespace conv1x1 {
namespace {

void raise_no_cuda(StableIValue*, uint64_t, uint64_t) {
  raise_if(
      "conv1x1: input: expected CPU tensors, got CUDA tensors: this conv1x1_ext was built without CUDA kernels. "
      "Reinstall it where nvcc is (CUDA_HOME says where); FORCE_CUDA=1 pip install makes sure of them");
}

}  // namespace

std::string cuda_build_info() { return "cuda_archs=none: built without CUDA\nnvcc=none"; }

}  // namespace conv1x1

STABLE_TORCH_LIBRARY_IMPL(conv1x1_ext, CUDA, m) {
  for (const char* op :
       {"conv1x1", "conv1x1_backward", "conv1x1_avg_pool", "conv1x1_avg_pool_backward", "_fprop", "_pack_weight",
        "_fprop_packed", "_backward", "_avg_pool", "_avg_pool_masked", "_avg_pool_backward", "_explain"})
    m.impl(op, &conv1x1::raise_no_cuda);
}
