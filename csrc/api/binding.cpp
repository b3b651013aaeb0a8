#include "binding.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "strides.h"

namespace conv1x1 {
namespace {

// The strides of a tensor (C, ...) or (N, C, ...), in the order N C D H W.
void view_strides(const TensorInfo& t, bool batched, int64_t* out) {
  const int64_t channel = batched ? 1 : 0, spatial = t.ndim - 1 - channel;
  out[0] = batched ? t.stride[0] : 0;
  out[1] = t.stride[channel];
  for (int64_t d = 0; d < 3; ++d) out[2 + d] = d < 3 - spatial ? 0 : t.stride[channel + 1 + d - (3 - spatial)];
}

ActivationView activation_view(const Tensor& tensor, const TensorInfo& t, bool batched) {
  ActivationView view;
  view.data = const_cast<void*>(tensor.const_data_ptr());
  view_strides(t, batched, view.stride);
  return view;
}

Conv1x1Problem problem_of(const ConvArgs& args, const Tensor& input, const Tensor& weight) {
  Conv1x1Problem p;
  const TensorInfo &x = args.input, &w = args.weight;
  const bool batched = args.batched();
  const int64_t spatial = args.spatial(), first = batched ? 2 : 1;
  to_dtype(x.dtype, &p.dtype);
  p.activation = args.activation;
  p.batch = batched ? x.size[0] : 1;
  p.c_in = w.size[1] * args.groups;
  p.c_out = w.size[0];
  p.groups = args.groups;
  for (int64_t d = 0; d < spatial; ++d) {
    const int64_t at = 3 - spatial + d;
    p.in_size[at] = x.size[first + d];
    p.stride[at] = args.stride_of(d);
    p.out_size[at] = output_size(p.in_size[at], p.stride[at]);
  }
  p.x = activation_view(input, x, batched);
  p.w = {const_cast<void*>(weight.const_data_ptr()), w.stride[0], w.stride[1]};
  return p;
}

VectorView bias_view(const ConvArgs& args, const Tensor& bias) {
  if (!bias) return {};
  return {const_cast<void*>(bias.const_data_ptr()), args.bias.size[0] == 1 ? 1 : args.bias.stride[0]};
}

// Sizes and strides of a result. They are known before it is allocated, and a plan needs nothing else.
struct Shape {
  int64_t ndim = 0, size[kMaxDims], stride[kMaxDims];

  int64_t elements() const {
    int64_t count = 1;
    for (int64_t d = 0; d < ndim; ++d) count *= size[d];
    return count;
  }
  // The address of its elements. A result that is only planned gets a placeholder.
  void* address_of(const Tensor& tensor) const {
    if (tensor) return tensor.mutable_data_ptr();
    return elements() == 0 ? nullptr : planned_address();
  }
};

Shape output_shape(const Backend& backend, const ConvArgs& args, const Conv1x1Problem& p) {
  int64_t size[kMaxDims], stride[kMaxDims];
  const bool batched = args.batched();
  const int64_t spatial = args.spatial(), skip = batched ? 0 : 1;
  // Channels-last strides are defined for batched tensors, so those of an unbatched one are computed with a batch of 1.
  size[0] = p.batch;
  size[1] = args.input.size[batched ? 1 : 0] == 0 ? 0 : p.c_out;
  for (int64_t d = 0; d < spatial; ++d) size[2 + d] = p.out_size[3 - spatial + d];
  dense_strides(size, spatial + 2, backend.output_channels_last(args), stride);
  Shape shape;
  shape.ndim = spatial + 2 - skip;
  std::copy(size + skip, size + spatial + 2, shape.size);
  std::copy(stride + skip, stride + spatial + 2, shape.stride);
  return shape;
}

Shape weight_grad_shape(const ConvArgs& args) {
  Shape shape;
  shape.ndim = args.weight.ndim;
  std::copy(args.weight.size, args.weight.size + shape.ndim, shape.size);
  weight_grad_strides(args.weight, shape.stride);
  return shape;
}

// The gradient of the input is channels last if the input is, contiguous otherwise.
Shape input_grad_shape(const ConvArgs& args) {
  Shape shape;
  shape.ndim = args.input.ndim;
  std::copy(args.input.size, args.input.size + shape.ndim, shape.size);
  dense_strides(shape.size, shape.ndim, is_channels_last(args.input), shape.stride);
  return shape;
}

// `tensor`: the allocated result, or none where the result is only planned.
ActivationView activation_view(const Tensor& tensor, const Shape& shape, const ConvArgs& args) {
  TensorInfo t;
  t.ndim = shape.ndim;
  t.size = shape.size;
  t.stride = shape.stride;
  ActivationView view;
  view.data = shape.address_of(tensor);
  view_strides(t, args.batched(), view.stride);
  return view;
}

WeightView weight_view(const Tensor& tensor, const Shape& shape) {
  return {shape.address_of(tensor), shape.stride[0], shape.stride[1]};
}

Tensor allocate(const Shape& shape, const ConvArgs& args) {
  return empty_strided(shape.ndim, shape.size, shape.stride, args.input);
}

// Allocates an output, or the gradient of an input.
Tensor allocate_activation(const Backend& backend, const ConvArgs& args, const Conv1x1Problem& p, const Shape& shape,
                           ActivationView* view) {
  Tensor tensor = allocate(shape, args);
  *view = activation_view(tensor, shape, args);
  backend.prepare_output(view->data, shape.elements() * dtype_size(p.dtype));
  return tensor;
}

Tensor allocate_output(const Backend& backend, const ConvArgs& args, const Conv1x1Problem& p, ActivationView* view) {
  return allocate_activation(backend, args, p, output_shape(backend, args, p), view);
}

Tensor allocate_input_grad(const Backend& backend, const ConvArgs& args, const Conv1x1Problem& p,
                           ActivationView* view) {
  return allocate_activation(backend, args, p, input_grad_shape(args), view);
}

Tensor allocate_weight_grad(const ConvArgs& args, WeightView* view) {
  const Shape shape = weight_grad_shape(args);
  Tensor dw = allocate(shape, args);
  *view = weight_view(dw, shape);
  return dw;
}

Tensor allocate_bias_grad(const ConvArgs& args, const Conv1x1Problem& p, VectorView* view) {
  const int64_t one = 1;
  Tensor dbias = empty_strided(1, &p.c_out, &one, args.input);
  *view = {dbias.mutable_data_ptr(), 1};
  return dbias;
}

}  // namespace

Tensor empty_strided(int64_t ndim, const int64_t* size, const int64_t* stride, const TensorInfo& like) {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(ndim, size, stride, like.dtype, like.device_type, like.device_index, &handle));
  return Tensor(handle);
}

namespace {

Tensor empty_bytes(int64_t size, TensorInfo like) {
  const int64_t one = 1;
  like.dtype = kUInt8;
  return empty_strided(1, &size, &one, like);
}

bool has_pool_mask(const Backend& backend, const Conv1x1Problem& p) {
  return backend.pool_masks() && (p.activation == Activation::kReLU || p.activation == Activation::kReLU6);
}

// Stored in front of packed panels: what they were made for. A call uses them only if it would make the same panels.
struct PackedWeightTag {
  int64_t layout, dtype, weight_is_b, groups, k, channels, reserved[2];
  bool operator==(const PackedWeightTag& other) const { return std::memcmp(this, &other, sizeof *this) == 0; }
};
static_assert(sizeof(PackedWeightTag) == 64, "panels start at a multiple of 64 bytes");

PackedWeightTag tag_of(const Backend& backend, const GemmProblem& g) {
  return {backend.panel_layout(g),
          static_cast<int64_t>(g.dtype),
          g.b_is_weight,
          g.groups,
          g.k,
          g.b_is_weight ? g.n : g.m,
          {}};
}

const void* panels_for(const Backend& backend, const GemmProblem& g, const Tensor& packed) {
  const auto* tag = static_cast<const PackedWeightTag*>(packed.const_data_ptr());
  return packed.numel() > static_cast<int64_t>(sizeof *tag) && *tag == tag_of(backend, g) ? tag + 1 : nullptr;
}

}  // namespace

Tensor pack_weight(const Backend& backend, const ConvArgs& args, const Tensor& input, const Tensor& weight) {
  Conv1x1Problem p = problem_of(args, input, weight);
  p.y = activation_view(Tensor(), output_shape(backend, args, p), args);
  int64_t bytes = 0;
  GemmProblem g;
  if (p.c_in != 0) {
    g = backend.roles_for_packed_weight(lower_fprop(p));
    bytes = backend.packed_weight_bytes(g);
  }
  const int64_t size = bytes == 0 ? 0 : bytes + static_cast<int64_t>(sizeof(PackedWeightTag));
  Tensor packed = empty_bytes(size, args.input);
  if (bytes == 0) return packed;
  auto* tag = static_cast<PackedWeightTag*>(packed.mutable_data_ptr());
  *tag = tag_of(backend, g);
  backend.pack_weight(g, tag + 1);
  return packed;
}

Tensor fprop(const Backend& backend, const ConvArgs& args, const Tensor& input, const Tensor& weight,
             const Tensor& bias, const Tensor& residual, const Tensor* packed) {
  Conv1x1Problem p = problem_of(args, input, weight);
  Tensor out = allocate_output(backend, args, p, &p.y);
  if (p.c_in == 0) return out;  // nn.Conv2d then has no output channels either
  p.bias = bias_view(args, bias);
  if (residual) p.residual = activation_view(residual, args.residual, args.batched());
  GemmProblem g = lower_fprop(p);
  if (packed) {
    GemmProblem q = backend.roles_for_packed_weight(g);
    q.packed_weight = panels_for(backend, q, *packed);
    if (q.packed_weight) g = q;
  }
  backend.gemm(g);
  return out;
}

ConvGrads backward(const Backend& backend, const ConvArgs& args, const Tensor& grad_output, const TensorInfo& dy,
                   const Tensor& input, const Tensor& weight, const Tensor& output, const TensorInfo& y,
                   const Wanted& wanted) {
  const bool batched = args.batched();
  Conv1x1Problem p = problem_of(args, input, weight);
  p.dy = activation_view(grad_output, dy, batched);
  if (output && args.activation != Activation::kNone) p.y = activation_view(output, y, batched);
  ConvGrads grads;
  if (wanted.residual) {
    // The residual's gradient is dz. It is computed once and then replaces dy for the other gradients.
    Tensor dz = allocate_output(backend, args, p, &p.dx);
    backend.mask_grad(p, p.dx);
    p.dy = p.dx;
    p.y = ActivationView();
    p.activation = Activation::kNone;
    grads[3] = std::move(dz);
  }
  const bool empty = p.c_in == 0;  // grad_output has no elements then
  if (wanted.input) {
    Tensor dx = allocate_input_grad(backend, args, p, &p.dx);
    if (p.strided()) backend.zero_fill(p);
    if (!empty) backend.gemm(lower_dgrad(p));
    grads[0] = std::move(dx);
  }
  if (wanted.weight) grads[1] = allocate_weight_grad(args, &p.dw);
  if (wanted.bias) {
    Tensor dbias = allocate_bias_grad(args, p, &p.dbias);
    if (empty) TORCH_ERROR_CODE_CHECK(aoti_torch_zero_(dbias.get()));
    grads[2] = std::move(dbias);
  }
  if ((wanted.weight || wanted.bias) && !empty) backend.gemm(lower_wgrad(p));
  return grads;
}

Tensor avg_pool(const Backend& backend, const ConvArgs& args, const Tensor& input, const Tensor& weight,
                const Tensor& bias, Tensor* mask) {
  Conv1x1Problem p = problem_of(args, input, weight);
  p.bias = bias_view(args, bias);
  const int64_t size[2] = {p.batch, args.input.size[args.batched() ? 1 : 0] == 0 ? 0 : p.c_out},
                stride[2] = {size[1] > 1 ? size[1] : 1, 1};
  const int64_t skip = args.batched() ? 0 : 1;
  Tensor out = empty_strided(2 - skip, size + skip, stride + skip, args.input);
  if (mask && has_pool_mask(backend, p)) {
    *mask = empty_bytes(p.pool_mask_bytes(), args.input);
    p.pool_mask = static_cast<uint8_t*>(mask->mutable_data_ptr());
    TORCH_ERROR_CODE_CHECK(aoti_torch_zero_(mask->get()));
  }
  if (p.c_in != 0) backend.avg_pool(p, out.mutable_data_ptr());
  return out;
}

AvgPoolGrads avg_pool_backward(const Backend& backend, const ConvArgs& args, const Tensor& grad_output,
                               const TensorInfo& dy, const Tensor& input, const Tensor& weight, const Tensor& bias,
                               const Tensor& mask, const Wanted& wanted) {
  Conv1x1Problem p = problem_of(args, input, weight);
  p.bias = bias_view(args, bias);
  if (mask) {
    const TensorInfo bits = info_of(mask);
    if (!has_pool_mask(backend, p) || bits.dtype != kUInt8 || bits.ndim != 1 || bits.stride[0] != 1 ||
        bits.size[0] != p.pool_mask_bytes())
      raise_if("conv1x1_avg_pool_backward: mask: expected none, or what _avg_pool_masked returned for these arguments");
    p.pool_mask = static_cast<uint8_t*>(const_cast<void*>(mask.const_data_ptr()));
  }
  p.dy.data = const_cast<void*>(grad_output.const_data_ptr());
  p.dy.stride[0] = args.batched() ? dy.stride[0] : 0;
  p.dy.stride[1] = dy.stride[args.batched() ? 1 : 0];
  AvgPoolGrads grads;
  if (wanted.input) grads[0] = allocate_input_grad(backend, args, p, &p.dx);
  if (wanted.weight) grads[1] = allocate_weight_grad(args, &p.dw);
  if (wanted.bias) {
    Tensor dbias = allocate_bias_grad(args, p, &p.dbias);
    if (p.c_in == 0) TORCH_ERROR_CODE_CHECK(aoti_torch_zero_(dbias.get()));
    grads[2] = std::move(dbias);
  }
  if (p.c_in != 0) backend.avg_pool_backward(p);
  return grads;
}

std::string explain(const Backend& backend, const ConvArgs& args, const Tensor& input, const Tensor& weight,
                    const Tensor& bias, const Tensor& residual, const std::string& direction) {
  Conv1x1Problem p = problem_of(args, input, weight);
  if (p.c_in == 0) return "kernel=none: no input channels, no output channels";
  p.bias = bias_view(args, bias);
  if (residual) p.residual = activation_view(residual, args.residual, args.batched());
  p.y = activation_view(Tensor(), output_shape(backend, args, p), args);
  if (direction == "fprop") return backend.explain(lower_fprop(p));
  if (direction == "avg_pool") return backend.explain_avg_pool(p);
  if (direction != "dgrad" && direction != "wgrad")
    raise_if("conv1x1: direction: expected 'fprop', 'dgrad', 'wgrad' or 'avg_pool', got '" + direction + "'");
  if (!masks_from_output(p.activation)) p.activation = Activation::kNone;  // torch's own derivative comes first
  p.dy = p.y;
  if (direction == "dgrad") {
    p.dx = activation_view(Tensor(), input_grad_shape(args), args);
    return backend.explain(lower_dgrad(p));
  }
  p.dw = weight_view(Tensor(), weight_grad_shape(args));
  if (p.bias.data) p.dbias = {planned_address(), 1};
  return backend.explain(lower_wgrad(p));
}

}  // namespace conv1x1
