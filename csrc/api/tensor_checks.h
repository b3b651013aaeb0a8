// Tensors -> TensorInfo, and a failed check -> the exception that torch raises. The checks are in checks.h.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "checks.h"

namespace conv1x1 {

// A result that the dispatcher takes over. (A bare handle would convert to torch::stable::Tensor.)
struct Result {
  AtenTensorHandle handle;
};
using MaybeResult = std::optional<Result>;

// An owned tensor handle, or none. torch::stable::Tensor is a shared pointer to such a handle. It would allocate once
// for every argument and twice for every result, which small calls would notice.
class Tensor {
 public:
  Tensor() = default;
  explicit Tensor(AtenTensorHandle handle) : handle_(handle) {}
  explicit Tensor(const std::optional<AtenTensorHandle>& handle) : handle_(handle.value_or(nullptr)) {}
  Tensor(Tensor&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  Tensor& operator=(Tensor&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Tensor() {
    if (handle_) aoti_torch_delete_tensor_object(handle_);
  }

  explicit operator bool() const { return handle_ != nullptr; }
  AtenTensorHandle get() const { return handle_; }
  Result release() { return {std::exchange(handle_, nullptr)}; }
  MaybeResult release_if_any() { return handle_ ? MaybeResult(release()) : std::nullopt; }

  int64_t numel() const {
    int64_t count;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_numel(handle_, &count));
    return count;
  }
  const void* const_data_ptr() const {
    const void* data;
    TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(handle_, &data));
    return data;
  }
  void* mutable_data_ptr() const {
    void* data;
    TORCH_ERROR_CODE_CHECK(torch_get_mutable_data_ptr(handle_, &data));
    return data;
  }

 private:
  AtenTensorHandle handle_ = nullptr;
};

// Reads sizes and strides once, through pointers: each call of the shim costs time in a small operator call.
inline TensorInfo info_of(const Tensor& tensor) {
  TensorInfo t;
  AtenTensorHandle handle = tensor.get();
  if (!handle) return t;
  int64_t *size, *stride;
  int32_t dtype, type, index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle, &t.ndim));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle, &size));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(handle, &stride));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle, &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(handle, &type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(handle, &index));
  t.defined = true;
  t.size = size;
  t.stride = stride;
  t.dtype = dtype;
  t.device_type = type;
  t.device_index = index;
  return t;
}

// Not STD_TORCH_CHECK: it puts the source file and line of the build machine before the message.
inline void raise_if(const std::string& error) {
  if (!error.empty()) throw std::runtime_error(error);
}

inline void set_stride(ConvArgs& args, const std::vector<int64_t>& stride) {
  args.stride_count = static_cast<int64_t>(stride.size());
  raise_if(check_stride_count(args.stride_count));
  for (size_t d = 0; d < stride.size(); ++d) args.stride[d] = stride[d];
}

inline void set_activation(ConvArgs& args, const std::string& name) {
  raise_if(check_activation_name(name));
  to_activation(name, &args.activation);
}

// The private operators' one integer: activation in bits 0-2, TF32 allowed in bit 3, strides of D, H and W in 10 bits
// each, groups above. Made by make_config() in conv1x1_ext/_eager.py. args.weight must be set.
inline void decode_config(ConvArgs& args, int64_t config) {
  if (config <= 0 || (config & 7) >= kActivationCount) raise_if("conv1x1: config: expected one made by conv1x1_ext");
  args.activation = static_cast<Activation>(config & 7);
  args.allow_tf32 = (config & 8) != 0;
  const int64_t spatial = args.spatial();
  args.stride_count = spatial >= 1 && spatial <= 3 ? spatial : 1;
  for (int64_t d = 0; d < args.stride_count; ++d)
    args.stride[d] = (config >> (4 + 10 * (3 - args.stride_count + d))) & 1023;
  args.groups = config >> 34;
}

}  // namespace conv1x1
