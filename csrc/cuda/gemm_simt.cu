// CUDA-core kernels for every type.
#include "gemm_simt.cuh"

#include "kernels.h"

namespace conv1x1::cuda {
namespace {

template <class C>
cudaError_t launch_one(const GemmParams& params, uint32_t blocks, cudaStream_t stream) {
  static_assert(C::kSharedBytes <= 48 * 1024, "more would have to be asked for");
  CONV1X1_LAUNCH((gemm_simt<C>), dim3(blocks), dim3(C::kThreads), C::kSharedBytes, stream, params);
  return cudaGetLastError();
}

}  // namespace

template <class T>
cudaError_t launch_simt(const GemmParams& params, const Plan& plan, uint32_t blocks, cudaStream_t stream) {
  if constexpr (sizeof(T) == 4) {
    if (plan.block_m == 128) return launch_one<SimtConfig<T, 128, 8>>(params, blocks, stream);
  }
  return launch_one<SimtConfig<T, 64, 16>>(params, blocks, stream);
}

template cudaError_t launch_simt<float>(const GemmParams&, const Plan&, uint32_t, cudaStream_t);
template cudaError_t launch_simt<double>(const GemmParams&, const Plan&, uint32_t, cudaStream_t);
template cudaError_t launch_simt<__half>(const GemmParams&, const Plan&, uint32_t, cudaStream_t);
template cudaError_t launch_simt<__nv_bfloat16>(const GemmParams&, const Plan&, uint32_t, cudaStream_t);

}  // namespace conv1x1::cuda
