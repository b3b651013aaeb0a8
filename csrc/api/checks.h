// Every check of an operator's arguments, with its message. Free of torch, so that eager calls (tensor_checks.h), fake
// tensors under tracing (conv1x1_ext_check in ops.cpp) and tests get the same messages. A message names the argument,
// what was expected and what came. An empty message means that the arguments are good.
#pragma once

#include <cstdint>
#include <string>

#include "../problem/problem.h"

namespace conv1x1 {

struct TensorInfo {
  bool defined = false;
  int dtype = 0;  // torch.headeronly.ScalarType
  int device_type = 0, device_index = 0;
  int64_t ndim = 0;
  const int64_t* size = nullptr;
  const int64_t* stride = nullptr;  // not read by the checks
};

struct ConvArgs {
  TensorInfo input, weight, bias, residual;
  int64_t stride[3] = {1, 1, 1};
  int64_t stride_count = 1;  // 1 (the same stride for all spatial dimensions), or one for each dimension
  int64_t groups = 1;
  Activation activation = Activation::kNone;
  bool allow_tf32 = false;  // may float32 CUDA kernels round their operands to TF32?

  int64_t spatial() const { return weight.ndim - 2; }
  bool batched() const { return input.ndim == weight.ndim; }
  int64_t stride_of(int64_t spatial_dim) const { return stride[stride_count == 1 ? 0 : spatial_dim]; }
};

constexpr int kUInt8 = 0, kHalf = 5, kFloat = 6, kDouble = 7, kBFloat16 = 15;  // values of ScalarType
bool to_dtype(int scalar_type, DType* dtype);
bool to_activation(const std::string& name, Activation* activation);

std::string check_activation_name(const std::string& name);
std::string check_stride_count(int64_t count);
std::string check_conv(const ConvArgs& args);
// grad_output must have the output's shape and the input's dtype and device; so must `output`, if it is given.
std::string check_backward(const ConvArgs& args, const TensorInfo& grad_output, const TensorInfo& output);
std::string check_avg_pool_backward(const ConvArgs& args, const TensorInfo& grad_output);

inline int64_t output_size(int64_t in, int64_t stride) { return in == 0 ? 0 : (in - 1) / stride + 1; }

}  // namespace conv1x1
