// The instantiations of the GEMM kernels, one .cu file a type, so that they compile side by side.
#pragma once

#include "device.cuh"

namespace conv1x1::cuda {

// T: __half, __nv_bfloat16, float (as TF32). `plan` names the kind and the tile (heuristics.h).
template <class T>
cudaError_t launch_mma(const GemmParams& params, const Plan& plan, uint32_t blocks, cudaStream_t stream);

// T: float, double, __half, __nv_bfloat16.
template <class T>
cudaError_t launch_simt(const GemmParams& params, const Plan& plan, uint32_t blocks, cudaStream_t stream);

}  // namespace conv1x1::cuda
