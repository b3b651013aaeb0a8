// Between launch.cu and passes.cu: axes for the device, the pooled GEMM, and type dispatch.
#pragma once

#include "device.cuh"

namespace conv1x1::cuda {

DeviceAxis device_axis(const Axis& axis);

struct Pooling {
  void* out = nullptr;  // (images, channels) contiguous, of the problem's dtype
  int64_t images = 0, image_stride = 0, pixels = 0;
};

// Partial sums of every channel of an image: (images, slots, groups * channels) accumulators are the workspace.
int64_t pool_slots(const GemmProblem& problem, const Plan& plan);
cudaError_t run_pooled_gemm(const GemmProblem& problem, const Plan& plan, const Pooling& pooling, void* workspace,
                            cudaStream_t stream);

// function(T()) for the storage type.
template <class Function>
cudaError_t for_dtype(DType dtype, Function function) {
  switch (dtype) {
    case DType::kFloat32: return function(float());
    case DType::kFloat64: return function(double());
    case DType::kBFloat16: return function(__nv_bfloat16());
    case DType::kFloat16: return function(__half());
  }
  return cudaErrorInvalidValue;
}

}  // namespace conv1x1::cuda
