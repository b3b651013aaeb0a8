// A 1x1 convolution as the binding hands it to the kernels, free of torch. Every tensor is seen as (N, C, D, H, W) with
// strides in elements; missing spatial dimensions have size 1. Filled by the bindings, read by lower.cpp.
#pragma once

#include <cstdint>

namespace conv1x1 {

enum class DType : int32_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

// The private operators' config integer and ACTIVATIONS in conv1x1_ext/_eager.py have the same order.
enum class Activation : int32_t { kNone, kReLU, kReLU6, kSiLU, kHardswish, kGELU };
constexpr int kActivationCount = 6;

inline const char* activation_name(Activation a) {
  constexpr const char* names[kActivationCount] = {"none", "relu", "relu6", "silu", "hardswish", "gelu"};
  return names[static_cast<int>(a)];
}

// True if the derivative is a function of the output y alone. Autograd then saves y and not the pre-activation.
inline bool masks_from_output(Activation a) {
  return a == Activation::kNone || a == Activation::kReLU || a == Activation::kReLU6;
}

inline int64_t dtype_size(DType t) { return t == DType::kFloat64 ? 8 : t == DType::kFloat32 ? 4 : 2; }

inline const char* dtype_name(DType t) {
  constexpr const char* names[] = {"float32", "float64", "bfloat16", "float16"};
  return names[static_cast<int>(t)];
}

// A placeholder for the address of a tensor that is planned for and never touched, aligned like an allocation. (A null
// pointer means that a tensor is not wanted or has no elements.)
inline void* planned_address() { return reinterpret_cast<void*>(intptr_t{256}); }

struct ActivationView {  // input, output, residual or one of their gradients
  void* data = nullptr;
  int64_t stride[5] = {0, 0, 0, 0, 0};  // N C D H W
};

struct WeightView {
  void* data = nullptr;
  int64_t stride_out = 0, stride_in = 0;  // along C_out, along C_in / groups
};

struct VectorView {  // bias or its gradient, C_out elements
  void* data = nullptr;
  int64_t stride = 0;
};

struct Conv1x1Problem {
  DType dtype = DType::kFloat32;
  Activation activation = Activation::kNone;
  int64_t batch = 0, c_in = 0, c_out = 0, groups = 1;
  int64_t in_size[3] = {1, 1, 1};   // D H W of input
  int64_t out_size[3] = {1, 1, 1};  // D H W of output
  int64_t stride[3] = {1, 1, 1};
  // forward: y = activation(W x + bias + residual)
  ActivationView x, y, residual;
  WeightView w;
  VectorView bias;
  // backward: dz = dy * activation'(y); a null data pointer means "not wanted"
  ActivationView dy, dx;
  WeightView dw;
  VectorView dbias;
  // Average pooling with ReLU or ReLU6: a bit for each output that is pooled, set where the output lets the gradient
  // pass. The bits are in the order of D in GemmProblem, (group, m, n). They take pool_mask_bytes(), which the caller
  // zeroes before the forward.
  uint8_t* pool_mask = nullptr;
  bool accumulate_dw = false;  // dw += and dbias += instead of =

  int64_t pixels() const { return out_size[0] * out_size[1] * out_size[2]; }          // per image
  int64_t pool_mask_bytes() const { return (batch * pixels() * c_out + 7) / 8 + 1; }  // bytes may be read in pairs
  bool strided() const { return stride[0] != 1 || stride[1] != 1 || stride[2] != 1; }
};

}  // namespace conv1x1
