// Tensor-core kernels for float16.
#include "gemm_mma_table.cuh"

namespace conv1x1::cuda {

template cudaError_t launch_mma<__half>(const GemmParams&, const Plan&, uint32_t, cudaStream_t);

}  // namespace conv1x1::cuda
