// The strides that torch gives the results of a convolution, which are the ones ours have. Torch-free.
// Strides are in elements; a result's are always dense.
#pragma once

#include <cstdint>

#include "checks.h"

namespace conv1x1 {

constexpr int kMaxDims = 5;

bool is_contiguous(const TensorInfo& t);
// torch's is_channels_last_strides_2d and 3d, what suggest_memory_format() goes by, for (N, C, spatial...).
bool is_channels_last(const TensorInfo& t);

// (N, C, spatial...) without gaps.
void dense_strides(const int64_t* size, int64_t ndim, bool channels_last, int64_t* stride);
// The weight's own strides where they are dense, so that grad.stride() == weight.stride(); contiguous otherwise.
void weight_grad_strides(const TensorInfo& weight, int64_t* stride);

// Does nn.Conv{1,2,3}d give its output channels-last strides? Where input or weight are channels last, as far as the
// convolution that torch chooses knows the format: its own on the CPU, which depends on the number of threads, and
// cuDNN's on CUDA. For half types in 3d torch's choice on the CPU depends on the CPU; ours is that of float32.
bool cpu_output_channels_last(const ConvArgs& args, int threads);
bool cuda_output_channels_last(const ConvArgs& args);

}  // namespace conv1x1
