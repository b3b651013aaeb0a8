// The part of the binding that CPU and CUDA share. It turns tensors into a Conv1x1Problem and allocates the outputs. It
// does no arithmetic.
//
//   conv1x1_ext::op on a device   Operators<ItsBackend>::op    arguments decoded and checked
//                                 op(backend, args, ...)       binding.cpp: views, outputs, the order of the passes
//                                 Backend                      cpu/conv1x1_cpu.cpp, cuda/conv1x1_cuda.cpp
#pragma once

#include <torch/csrc/stable/library.h>

#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../problem/gemm.h"
#include "tensor_checks.h"

namespace conv1x1 {

// What a device implements. An object is made for each call, on the stack, from checked arguments. An error of the
// device is thrown as an exception.
class Backend {
 public:
  virtual bool output_channels_last(const ConvArgs& args) const = 0;
  // Called for each new output, before anything is written to it.
  virtual void prepare_output(void* /*data*/, int64_t /*bytes*/) const {}

  virtual void gemm(const GemmProblem& g) const = 0;
  // Weights packed beforehand: a number that identifies the layout of the panels (0: this device packs no weights), the
  // size of the panels in bytes, and packing itself.
  virtual int64_t panel_layout(const GemmProblem& /*g*/) const { return 0; }
  // The forward with the roles of A and B that suit a weight packed beforehand.
  virtual GemmProblem roles_for_packed_weight(const GemmProblem& g) const { return g; }
  virtual int64_t packed_weight_bytes(const GemmProblem& /*g*/) const { return 0; }
  virtual void pack_weight(const GemmProblem& /*g*/, void* /*panels*/) const {}
  // dz = dy under the mask of y.
  virtual void mask_grad(const Conv1x1Problem& p, const ActivationView& dz) const = 0;
  // dx = 0
  virtual void zero_fill(const Conv1x1Problem& p) const = 0;
  // True: the forward of average pooling writes Conv1x1Problem::pool_mask and the backward reads it. False: the
  // backward recomputes the pre-activation.
  virtual bool pool_masks() const { return false; }
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

using ConvGrads = std::array<Tensor, 4>;     // of input, weight, bias and residual; those that are wanted
using AvgPoolGrads = std::array<Tensor, 3>;  // of input, weight and bias

struct Wanted {  // gradients
  bool input, weight, bias, residual;
};

// Bits of the private operators' `wanted`, from the lowest on.
inline Wanted decode_wanted(int64_t wanted) {
  return {(wanted & 1) != 0, (wanted & 2) != 0, (wanted & 4) != 0, (wanted & 8) != 0};
}

Tensor empty_strided(int64_t ndim, const int64_t* size, const int64_t* stride, const TensorInfo& like);

// The operators, on checked arguments; bias, residual and output may be none. `packed`: the result of pack_weight(), or
// null. It is ignored where this call needs panels of another layout.
Tensor fprop(const Backend& backend, const ConvArgs& args, const Tensor& input, const Tensor& weight,
             const Tensor& bias, const Tensor& residual, const Tensor* packed = nullptr);
Tensor pack_weight(const Backend& backend, const ConvArgs& args, const Tensor& input, const Tensor& weight);
ConvGrads backward(const Backend& backend, const ConvArgs& args, const Tensor& grad_output, const TensorInfo& dy,
                   const Tensor& input, const Tensor& weight, const Tensor& output, const TensorInfo& y,
                   const Wanted& wanted);
// `mask`: if not null, it receives a bit for each pooled output, for the backward. It stays none where the backward
// recomputes them.
Tensor avg_pool(const Backend& backend, const ConvArgs& args, const Tensor& input, const Tensor& weight,
                const Tensor& bias, Tensor* mask = nullptr);
AvgPoolGrads avg_pool_backward(const Backend& backend, const ConvArgs& args, const Tensor& grad_output,
                               const TensorInfo& dy, const Tensor& input, const Tensor& weight, const Tensor& bias,
                               const Tensor& mask, const Wanted& wanted);
// `direction`: fprop, dgrad, wgrad or avg_pool.
std::string explain(const Backend& backend, const ConvArgs& args, const Tensor& input, const Tensor& weight,
                    const Tensor& bias, const Tensor& residual, const std::string& direction);

inline void set_conv(ConvArgs& args, int64_t groups, const std::string& activation, bool allow_tf32) {
  args.groups = groups;
  args.allow_tf32 = allow_tf32;
  set_activation(args, activation);
}

// The operators of ops.cpp for one device. D is its Backend, constructed from `const ConvArgs&`. An operator owns the
// handles that it receives: each becomes a Tensor before any statement that can throw.
template <class D>
struct Operators {
  using Handle = AtenTensorHandle;
  using MaybeHandle = std::optional<AtenTensorHandle>;
  using FourGrads = std::tuple<MaybeResult, MaybeResult, MaybeResult, MaybeResult>;
  using ThreeGrads = std::tuple<MaybeResult, MaybeResult, MaybeResult>;

  // The arguments that every operator has, and what the checks read of them.
  struct Operands {
    const Tensor input, weight, bias, residual;
    ConvArgs args;

    Operands(Handle input_, Handle weight_, MaybeHandle bias_ = {}, MaybeHandle residual_ = {})
        : input(input_), weight(weight_), bias(bias_), residual(residual_) {
      args.input = info_of(input);
      args.weight = info_of(weight);
      args.bias = info_of(bias);
      args.residual = info_of(residual);
    }

    Result fprop(const Tensor* packed = nullptr) const {
      raise_if(check_conv(args));
      return conv1x1::fprop(D(args), args, input, weight, bias, residual, packed).release();
    }

    FourGrads backward(const Tensor& grad_output, const Tensor& output, const Wanted& wanted) const {
      const TensorInfo dy = info_of(grad_output), y = info_of(output);
      raise_if(check_backward(args, dy, y));
      ConvGrads grads = conv1x1::backward(D(args), args, grad_output, dy, input, weight, output, y, wanted);
      return {grads[0].release_if_any(), grads[1].release_if_any(), grads[2].release_if_any(),
              grads[3].release_if_any()};
    }

    Result avg_pool(Tensor* mask = nullptr) const {
      raise_if(check_conv(args));
      return conv1x1::avg_pool(D(args), args, input, weight, bias, mask).release();
    }

    ThreeGrads avg_pool_backward(const Tensor& grad_output, const Tensor& mask, const Wanted& wanted) const {
      const TensorInfo dy = info_of(grad_output);
      raise_if(check_avg_pool_backward(args, dy));
      AvgPoolGrads grads =
          conv1x1::avg_pool_backward(D(args), args, grad_output, dy, input, weight, bias, mask, wanted);
      return {grads[0].release_if_any(), grads[1].release_if_any(), grads[2].release_if_any()};
    }
  };

  static Result conv1x1(Handle input, Handle weight, MaybeHandle bias, MaybeHandle residual,
                        std::vector<int64_t> stride, int64_t groups, std::string activation, bool allow_tf32) {
    Operands t(input, weight, bias, residual);
    set_stride(t.args, stride);
    set_conv(t.args, groups, activation, allow_tf32);
    return t.fprop();
  }

  static Result fprop_private(Handle input, Handle weight, MaybeHandle bias, MaybeHandle residual, int64_t config) {
    Operands t(input, weight, bias, residual);
    decode_config(t.args, config);
    return t.fprop();
  }

  static Result pack_weight(Handle input, Handle weight, int64_t config) {
    Operands t(input, weight);
    decode_config(t.args, config);
    raise_if(check_conv(t.args));
    return conv1x1::pack_weight(D(t.args), t.args, t.input, t.weight).release();
  }

  static Result fprop_packed(Handle input, Handle weight, Handle packed_, MaybeHandle bias, MaybeHandle residual,
                             int64_t config) {
    const Tensor packed(packed_);
    Operands t(input, weight, bias, residual);
    decode_config(t.args, config);
    return t.fprop(&packed);
  }

  static FourGrads conv1x1_backward(Handle grad_output_, Handle input, Handle weight, MaybeHandle output_,
                                    std::vector<int64_t> stride, int64_t groups, std::string activation,
                                    bool allow_tf32, bool need_input, bool need_weight, bool need_bias,
                                    bool need_residual) {
    const Tensor grad_output(grad_output_), output(output_);
    Operands t(input, weight);
    set_stride(t.args, stride);
    set_conv(t.args, groups, activation, allow_tf32);
    return t.backward(grad_output, output, {need_input, need_weight, need_bias, need_residual});
  }

  static FourGrads backward_private(Handle grad_output_, Handle input, Handle weight, MaybeHandle output_,
                                    int64_t config, int64_t wanted) {
    const Tensor grad_output(grad_output_), output(output_);
    Operands t(input, weight);
    decode_config(t.args, config);
    return t.backward(grad_output, output, decode_wanted(wanted));
  }

  static Result conv1x1_avg_pool(Handle input, Handle weight, MaybeHandle bias, int64_t groups, std::string activation,
                                 bool allow_tf32) {
    Operands t(input, weight, bias);
    set_conv(t.args, groups, activation, allow_tf32);
    return t.avg_pool();
  }

  static Result avg_pool_private(Handle input, Handle weight, MaybeHandle bias, int64_t config) {
    Operands t(input, weight, bias);
    decode_config(t.args, config);
    return t.avg_pool();
  }

  static std::tuple<Result, MaybeResult> avg_pool_masked(Handle input, Handle weight, MaybeHandle bias,
                                                         int64_t config) {
    Operands t(input, weight, bias);
    decode_config(t.args, config);
    Tensor mask;
    const Result out = t.avg_pool(&mask);
    return {out, mask.release_if_any()};
  }

  static ThreeGrads conv1x1_avg_pool_backward(Handle grad_output_, Handle input, Handle weight, MaybeHandle bias,
                                              int64_t groups, std::string activation, bool allow_tf32, bool need_input,
                                              bool need_weight, bool need_bias) {
    const Tensor grad_output(grad_output_);
    Operands t(input, weight, bias);
    set_conv(t.args, groups, activation, allow_tf32);
    return t.avg_pool_backward(grad_output, Tensor(), {need_input, need_weight, need_bias, false});
  }

  static ThreeGrads avg_pool_backward_private(Handle grad_output_, Handle input, Handle weight, MaybeHandle bias,
                                              MaybeHandle mask_, int64_t config, int64_t wanted) {
    const Tensor grad_output(grad_output_), mask(mask_);
    Operands t(input, weight, bias);
    decode_config(t.args, config);
    return t.avg_pool_backward(grad_output, mask, decode_wanted(wanted));
  }

  static std::string explain(Handle input, Handle weight, MaybeHandle bias, MaybeHandle residual,
                             std::vector<int64_t> stride, int64_t groups, std::string activation, bool allow_tf32,
                             std::string direction) {
    Operands t(input, weight, bias, residual);
    set_stride(t.args, stride);
    set_conv(t.args, groups, activation, allow_tf32);
    raise_if(check_conv(t.args));
    return conv1x1::explain(D(t.args), t.args, t.input, t.weight, t.bias, t.residual, direction);
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
    m.impl("_avg_pool", TORCH_BOX(&Operators::avg_pool_private));
    m.impl("_avg_pool_masked", TORCH_BOX(&Operators::avg_pool_masked));
    m.impl("_avg_pool_backward", TORCH_BOX(&Operators::avg_pool_backward_private));
    m.impl("_explain", TORCH_BOX(&Operators::explain));
  }
};

// The lines about CUDA in build_info. Defined in cuda/conv1x1_cuda.cpp or, in a build without CUDA, in
// cuda/no_cuda.cpp.
std::string cuda_build_info();

}  // namespace conv1x1
