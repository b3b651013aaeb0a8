// The schemas of all operators of the library. cpu/conv1x1_cpu.cpp and cuda/conv1x1_cuda.cpp register the kernels.
//
// Public operators take plain arguments and have rules for autograd, fake tensors and vmap
// (conv1x1_ext/_registrations.py). Private operators (leading underscore) are the eager fast path. They have no
// autograd, and take stride, groups, activation and allow_tf32 in one integer, since every argument costs about 0.2 us
// a call. Only float32 CUDA kernels read `allow_tf32`.
#include <torch/csrc/stable/library.h>

#include <cstring>

#include "tensor_checks.h"

STABLE_TORCH_LIBRARY(conv1x1_ext, m) {
  m.def(
      "conv1x1(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, int[] stride, int groups, str activation, "
      "bool allow_tf32) -> Tensor");
  m.def(
      "conv1x1_backward(Tensor grad_output, Tensor input, Tensor weight, Tensor? output, int[] stride, int groups, "
      "str activation, bool allow_tf32, bool need_input, bool need_weight, bool need_bias, bool need_residual) "
      "-> (Tensor?, Tensor?, Tensor?, Tensor?)");
  m.def(
      "conv1x1_avg_pool(Tensor input, Tensor weight, Tensor? bias, int groups, str activation, bool allow_tf32) "
      "-> Tensor");
  m.def(
      "conv1x1_avg_pool_backward(Tensor grad_output, Tensor input, Tensor weight, Tensor? bias, int groups, "
      "str activation, bool allow_tf32, bool need_input, bool need_weight, bool need_bias) "
      "-> (Tensor?, Tensor?, Tensor?)");

  m.def("_fprop(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, int config) -> Tensor");
  // The weight's panels for a forward of tensors like `input`, as bytes; empty where the kernels read the weight in
  // place.
  m.def("_pack_weight(Tensor input, Tensor weight, int config) -> Tensor");
  m.def(
      "_fprop_packed(Tensor input, Tensor weight, Tensor packed, Tensor? bias, Tensor? residual, int config) -> "
      "Tensor");
  m.def(
      "_backward(Tensor grad_output, Tensor input, Tensor weight, Tensor? output, int config, int wanted) "
      "-> (Tensor?, Tensor?, Tensor?, Tensor?)");
  m.def("_avg_pool(Tensor input, Tensor weight, Tensor? bias, int config) -> Tensor");
  // As _avg_pool; returns also a bit for each output that was pooled, or none where the backward recomputes them.
  m.def("_avg_pool_masked(Tensor input, Tensor weight, Tensor? bias, int config) -> (Tensor, Tensor?)");
  m.def(
      "_avg_pool_backward(Tensor grad_output, Tensor input, Tensor weight, Tensor? bias, Tensor? mask, int config, "
      "int wanted) -> (Tensor?, Tensor?, Tensor?)");

  m.def(
      "_explain(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, int[] stride, int groups, str activation, "
      "bool allow_tf32, str direction) -> str");
  m.def("_build_info() -> str");
}

// The same checks for fake tensors, called through ctypes with plain integers (conv1x1_ext/_library.py). For input,
// weight, bias, residual, grad_output and output: defined, dtype, device type, device index, ndim, sizes[8]; then
// stride count, stride[3], groups, activation, and whether the operator pools. Returns whether the arguments are good;
// otherwise the message is in `message`.
extern "C" __attribute__((visibility("default"))) int conv1x1_ext_check(const int64_t* values, char* message,
                                                                        int64_t capacity) {
  using namespace conv1x1;
  ConvArgs args;
  TensorInfo grad_output, output;
  for (TensorInfo* t : {&args.input, &args.weight, &args.bias, &args.residual, &grad_output, &output}) {
    t->defined = values[0] != 0;
    t->dtype = static_cast<int>(values[1]);
    t->device_type = static_cast<int>(values[2]);
    t->device_index = static_cast<int>(values[3]);
    t->ndim = values[4];
    t->size = values + 5;
    values += 13;
  }
  args.stride_count = values[0];
  std::string error = check_stride_count(args.stride_count);
  if (error.empty()) {
    for (int d = 0; d < 3; ++d) args.stride[d] = values[1 + d];
    args.groups = values[4];
    args.activation = static_cast<Activation>(values[5]);
    const bool pools = values[6] != 0;
    if (!grad_output.defined)
      error = check_conv(args);
    else
      error = pools ? check_avg_pool_backward(args, grad_output) : check_backward(args, grad_output, output);
  }
  std::strncpy(message, error.c_str(), static_cast<size_t>(capacity));
  return error.empty();
}
