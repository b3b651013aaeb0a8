// Tensor-core kernels for tf32.
#include "gemm_mma_table.cuh"

namespace conv1x1::cuda {

template cudaError_t launch_mma<float>(const GemmParams&, const Plan&, uint32_t, cudaStream_t);

}  // namespace conv1x1::cuda
