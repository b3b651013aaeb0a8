// Plan -> instantiation of gemm_mma, from the tables in heuristics.h.
#pragma once

#include <utility>

#include "gemm_mma_sm80.cuh"
#include "kernels.h"

namespace conv1x1::cuda {

template <class T, int kKind, int kTile>
cudaError_t launch_one(const GemmParams& params, uint32_t blocks, cudaStream_t stream) {
  constexpr MmaKind kind = kMmaKinds[kKind];
  if constexpr (!has_tile(kind, kTile, sizeof(T))) {
    return cudaErrorInvalidConfiguration;
  } else {
    using Config = MmaConfig<T, kKind, kTile>;
    if (Config::kSharedBytes > 48 * 1024) {  // what a kernel may have without asking
      const cudaError_t error =
          cudaFuncSetAttribute(gemm_mma<Config>, cudaFuncAttributeMaxDynamicSharedMemorySize, Config::kSharedBytes);
      if (error != cudaSuccess) return error;
    }
    CONV1X1_LAUNCH((gemm_mma<Config>), dim3(blocks), dim3(Config::kThreads), Config::kSharedBytes, stream, params);
    return cudaGetLastError();
  }
}

template <class T, int... kIndex>
cudaError_t launch_indexed(const GemmParams& params, int index, uint32_t blocks, cudaStream_t stream,
                           std::integer_sequence<int, kIndex...>) {
  cudaError_t error = cudaErrorInvalidConfiguration;
  const auto try_one = [&](auto at) {
    constexpr int i = decltype(at)::value;
    if (i == index) error = launch_one<T, i / kMmaTileCount, i % kMmaTileCount>(params, blocks, stream);
  };
  (try_one(std::integral_constant<int, kIndex>()), ...);
  return error;
}

template <class T>
cudaError_t launch_mma(const GemmParams& params, const Plan& plan, uint32_t blocks, cudaStream_t stream) {
  return launch_indexed<T>(params, plan.kind * kMmaTileCount + plan.tile, blocks, stream,
                           std::make_integer_sequence<int, kMmaKindCount * kMmaTileCount>());
}

}  // namespace conv1x1::cuda
