// BINDING, the part that the devices share: tensors -> Conv1x1Problem, outputs allocated. No arithmetic.
//
//   conv1x1_ext::op on a device   Operators<ItsBackend>::op    arguments decoded and checked
//                                 op(backend, args, ...)       binding.cpp: views, outputs, the order of the passes
//                                 Backend                      cpu/conv1x1_cpu.cpp, cuda/conv1x1_cuda.cpp
#pragma once

#include <torch/csrc/stable/library.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "gemm.h"
#include "tensor_checks.h"

namespace conv1x1 {

// What a device does. Made per call, on the stack, from checked arguments; an error of the device is an exception.
class Backend {
 public:
  virtual bool output_channels_last(const ConvArgs& args) const = 0;
  // A fresh output, before anything is written to it.
  virtual void prepare_output(void* /*data*/, int64_t /*bytes*/) const {}

  virtual void gemm(const GemmProblem& g) const = 0;
  // Panels of a weight that stays the same: what tells their layout (0: this device packs none), bytes, making them.
  virtual int64_t panel_layout() const { return 0; }
  virtual int64_t packed_weight_bytes(const GemmProblem& /*g*/) const { return 0; }
  virtual void pack_weight(const GemmProblem& /*g*/, void* /*panels*/) const {}
  // dz = dy under the mask of y.
  virtual void mask_grad(const Conv1x1Problem& p, const ActivationView& dz) const = 0;
  // dx = 0
  virtual void zero_fill(const Conv1x1Problem& p) const = 0;
  // out(image, c) = mean over pixels of activation(W x + bias); (batch, C_out) contiguous.
  virtual void avg_pool(const Conv1x1Problem& p, void* out) const = 0;
  // Its gradients, written to p.dx, p.dw and p.dbias where those have data; p.dy has no pixel strides.
  virtual void avg_pool_backward(const Conv1x1Problem& p) const = 0;
  // The plan, as "key=value" lines.
  virtual std::string explain(const GemmProblem& g) const = 0;
  virtual std::string explain_avg_pool(const Conv1x1Problem& p) const = 0;

 protected:
  ~Backend() = default;
};

using MaybeTensor = std::optional<Tensor>;
using ConvGrads = std::tuple<MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor>;
using AvgPoolGrads = std::tuple<MaybeTensor, MaybeTensor, MaybeTensor>;

struct Wanted {  // gradients
  bool input, weight, bias, residual;
};

Tensor empty_strided(int64_t ndim, const int64_t* size, const int64_t* stride, const TensorInfo& like);

// The operators, on checked arguments.
// `packed`, where given, is of pack_weight(); panels of another layout than this call's are left aside.
Tensor fprop(const Backend& backend, const ConvArgs& args, const Tensor& input, const Tensor& weight,
             const MaybeTensor& bias, const MaybeTensor& residual, const Tensor* packed = nullptr);
Tensor pack_weight(const Backend& backend, const ConvArgs& args, const Tensor& input, const Tensor& weight);
ConvGrads backward(const Backend& backend, const ConvArgs& args, const Tensor& grad_output, const TensorInfo& dy,
                   const Tensor& input, const Tensor& weight, const MaybeTensor& output, const TensorInfo& y,
                   const Wanted& wanted);
Tensor avg_pool(const Backend& backend, const ConvArgs& args, const Tensor& input, const Tensor& weight,
                const MaybeTensor& bias);
AvgPoolGrads avg_pool_backward(const Backend& backend, const ConvArgs& args, const Tensor& grad_output,
                               const TensorInfo& dy, const Tensor& input, const Tensor& weight, const MaybeTensor& bias,
                               const Wanted& wanted);
// `direction`: fprop, dgrad, wgrad or avg_pool.
std::string explain(const Backend& backend, const ConvArgs& args, const Tensor& input, const Tensor& weight,
                    const MaybeTensor& bias, const MaybeTensor& residual, const std::string& direction);

inline ConvArgs conv_args(const Tensor& input, const Tensor& weight, const MaybeTensor& bias,
                          const MaybeTensor& residual) {
  ConvArgs args;
  args.input = info_of(input);
  args.weight = info_of(weight);
  args.bias = info_of(bias);
  args.residual = info_of(residual);
  return args;
}

inline void set_conv(ConvArgs& args, int64_t groups, const std::string& activation, bool allow_tf32) {
  args.groups = groups;
  args.allow_tf32 = allow_tf32;
  set_activation(args, activation);
}

// The schemas of ops.cpp for one device: D is its Backend, made from `const ConvArgs&`.
template <class D>
struct Operators {
  static Tensor conv1x1(const Tensor& input, const Tensor& weight, const MaybeTensor& bias, const MaybeTensor& residual,
                        std::vector<int64_t> stride, int64_t groups, std::string activation, bool allow_tf32) {
    ConvArgs args = conv_args(input, weight, bias, residual);
    set_stride(args, stride);
    set_conv(args, groups, activation, allow_tf32);
    raise_if(check_conv(args));
    return fprop(D(args), args, input, weight, bias, residual);
  }

  static Tensor fprop_private(const Tensor& input, const Tensor& weight, const MaybeTensor& bias,
                              const MaybeTensor& residual, int64_t config) {
    ConvArgs args = conv_args(input, weight, bias, residual);
    decode_config(args, config);
    raise_if(check_conv(args));
    return fprop(D(args), args, input, weight, bias, residual);
  }

  static Tensor pack_weight(const Tensor& input, const Tensor& weight, int64_t config) {
    ConvArgs args = conv_args(input, weight, std::nullopt, std::nullopt);
    decode_config(args, config);
    raise_if(check_conv(args));
    return conv1x1::pack_weight(D(args), args, input, weight);
  }

  static Tensor fprop_packed(const Tensor& input, const Tensor& weight, const Tensor& packed, const MaybeTensor& bias,
                             const MaybeTensor& residual, int64_t config) {
    ConvArgs args = conv_args(input, weight, bias, residual);
    decode_config(args, config);
    raise_if(check_conv(args));
    return fprop(D(args), args, input, weight, bias, residual, &packed);
  }

  static ConvGrads backward_checked(const ConvArgs& args, const Tensor& grad_output, const Tensor& input,
                                    const Tensor& weight, const MaybeTensor& output, const Wanted& wanted) {
    const TensorInfo dy = info_of(grad_output), y = info_of(output);
    raise_if(check_backward(args, dy, y));
    return backward(D(args), args, grad_output, dy, input, weight, output, y, wanted);
  }

  static ConvGrads conv1x1_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                                    const MaybeTensor& output, std::vector<int64_t> stride, int64_t groups,
                                    std::string activation, bool allow_tf32, bool need_input, bool need_weight,
                                    bool need_bias, bool need_residual) {
    ConvArgs args = conv_args(input, weight, std::nullopt, std::nullopt);
    set_stride(args, stride);
    set_conv(args, groups, activation, allow_tf32);
    return backward_checked(args, grad_output, input, weight, output,
                            {need_input, need_weight, need_bias, need_residual});
  }

  static ConvGrads backward_private(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                                    const MaybeTensor& output, int64_t config, int64_t wanted) {
    ConvArgs args = conv_args(input, weight, std::nullopt, std::nullopt);
    decode_config(args, config);
    return backward_checked(args, grad_output, input, weight, output,
                            {(wanted & 1) != 0, (wanted & 2) != 0, (wanted & 4) != 0, (wanted & 8) != 0});
  }

  static Tensor conv1x1_avg_pool(const Tensor& input, const Tensor& weight, const MaybeTensor& bias, int64_t groups,
                                 std::string activation, bool allow_tf32) {
    ConvArgs args = conv_args(input, weight, bias, std::nullopt);
    set_conv(args, groups, activation, allow_tf32);
    raise_if(check_conv(args));
    return avg_pool(D(args), args, input, weight, bias);
  }

  static AvgPoolGrads conv1x1_avg_pool_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                                                const MaybeTensor& bias, int64_t groups, std::string activation,
                                                bool allow_tf32, bool need_input, bool need_weight, bool need_bias) {
    ConvArgs args = conv_args(input, weight, bias, std::nullopt);
    set_conv(args, groups, activation, allow_tf32);
    const TensorInfo dy = info_of(grad_output);
    raise_if(check_avg_pool_backward(args, dy));
    return avg_pool_backward(D(args), args, grad_output, dy, input, weight, bias,
                             {need_input, need_weight, need_bias, false});
  }

  static std::string explain(const Tensor& input, const Tensor& weight, const MaybeTensor& bias,
                             const MaybeTensor& residual, std::vector<int64_t> stride, int64_t groups,
                             std::string activation, bool allow_tf32, std::string direction) {
    ConvArgs args = conv_args(input, weight, bias, residual);
    set_stride(args, stride);
    set_conv(args, groups, activation, allow_tf32);
    raise_if(check_conv(args));
    return conv1x1::explain(D(args), args, input, weight, bias, residual, direction);
  }

  static void implement(torch::stable::detail::StableLibrary& m) {
    m.impl("conv1x1", TORCH_BOX(&Operators::conv1x1));
    m.impl("conv1x1_backward", TORCH_BOX(&Operators::conv1x1_backward));
    m.impl("conv1x1_avg_pool", TORCH_BOX(&Operators::conv1x1_avg_pool));
    m.impl("conv1x1_avg_pool_backward", TORCH_BOX(&Operators::conv1x1_avg_pool_backward));
    m.impl("_fprop", TORCH_BOX(&Operators::fprop_private));
    m.impl("_pack_weight", TORCH_BOX(&Operators::pack_weight));
    m.impl("_fprop_packed", TORCH_BOX(&Operators::fprop_packed));
    m.impl("_backward", TORCH_BOX(&Operators::backward_private));
    m.impl("_explain", TORCH_BOX(&Operators::explain));
  }
};

// The library's CUDA lines of build_info; cuda/conv1x1_cuda.cpp or, in a build without CUDA, cuda/no_cuda.cpp.
std::string cuda_build_info();

}  // namespace conv1x1
