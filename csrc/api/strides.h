// The strides of a convolution's results, by torch's rules. Free of torch. Strides are in elements. Results are always
// dense.
#pragma once

#include <cstdint>

#include "checks.h"

namespace conv1x1 {

constexpr int kMaxDims = 5;

bool is_contiguous(const TensorInfo& t);
// torch's is_channels_last_strides_2d and 3d, which suggest_memory_format() uses, for (N, C, spatial...).
bool is_channels_last(const TensorInfo& t);

// The strides of (N, C, spatial...) without gaps.
void dense_strides(const int64_t* size, int64_t ndim, bool channels_last, int64_t* stride);
// The weight's own strides where they are dense, so that grad.stride() == weight.stride(); contiguous otherwise.
void weight_grad_strides(const TensorInfo& weight, int64_t* stride);

// Does nn.Conv{1,2,3}d give its output channels-last strides? It does where input or weight are channels last and the
// convolution that torch chooses supports the format. On the CPU that choice depends on the number of threads; on CUDA
// it is cuDNN's. For half types in 3d torch's choice depends on the CPU; here it is always the choice for float32.
bool cpu_output_channels_last(const ConvArgs& args, int threads);
bool cuda_output_channels_last(const ConvArgs& args);

}  // namespace conv1x1
