// BINDING of the CPU kernels: tensors -> Conv1x1Problem, outputs allocated, status -> exception. No arithmetic.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <tuple>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../tensor_checks.h"
#include "avg_pool.h"
#include "plan.h"

namespace conv1x1 {
namespace {

constexpr int kMaxDims = 5;

// Asked for at every call: a new Python thread sees torch's setting only after torch was asked.
int threads() { return static_cast<int>(torch::stable::get_num_threads()); }

Tensor empty_strided(int64_t ndim, const int64_t* size, const int64_t* stride, const TensorInfo& like) {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(ndim, size, stride, like.dtype, like.device_type, like.device_index, &handle));
  return Tensor(handle);
}

// Blocks over 32 MiB are fresh from the kernel at every call (glibc maps and unmaps them): with 4 KiB pages, faulting
// them in takes longer than computing them. Asks for huge pages; where they are off, nothing changes.
void use_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__)
  constexpr int64_t kHugePage = 2 << 20;
  if (bytes <= 32 << 20) return;
  char* begin = static_cast<char*>(data);
  begin += -reinterpret_cast<intptr_t>(begin) & (kHugePage - 1);
  const int64_t inside = (static_cast<char*>(data) + bytes - begin) & ~(kHugePage - 1);
  madvise(begin, static_cast<size_t>(inside), MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

// torch's is_channels_last_strides_2d and 3d, what suggest_memory_format() goes by, for (N, C, spatial...).
bool is_channels_last(const int64_t* size, const int64_t* stride, int64_t ndim) {
  if (ndim < 4 || stride[1] == 0) return false;
  int64_t least = 0;
  for (int64_t i = 0; i < ndim; ++i) {
    const int64_t d = i == 0 ? 1 : (i == ndim - 1 ? 0 : ndim - i);  // C, W, H, (D,) N
    if (size[d] == 0 || stride[d] < least) return false;
    if (d == 0 && least == stride[1]) return false;  // ambiguous (N, 1, 1, 1): contiguous
    least = stride[d] * (size[d] > 1 ? size[d] : 1);
  }
  return true;
}

bool is_channels_last(const TensorInfo& t) { return is_channels_last(t.size, t.stride, t.ndim); }

// A tensor as torch's convolution sees it: a batch of 1 before an unbatched input, and (N, C, L) as (N, C, 1, L).
bool is_channels_last_in_conv(const TensorInfo& t, int64_t conv_ndim) {
  int64_t size[kMaxDims], stride[kMaxDims], n = 0;
  if (t.ndim < conv_ndim) {
    size[n] = 1;
    stride[n++] = t.size[0] * t.stride[0];
  }
  for (int64_t d = 0; d < t.ndim; ++d) {
    if (conv_ndim == 3 && n == 2) {
      size[n] = 1;
      stride[n++] = t.size[d] * t.stride[d];
    }
    size[n] = t.size[d];
    stride[n++] = t.stride[d];
  }
  return is_channels_last(size, stride, n);
}

bool is_contiguous(const TensorInfo& t) {
  int64_t step = 1;
  for (int64_t d = t.ndim - 1; d >= 0; --d) {
    if (t.size[d] != 1 && t.stride[d] != step) return false;
    step *= t.size[d];
  }
  return true;
}

// When torch hands a 3d convolution of size 1 to oneDNN; its other 3d convolution knows no channels last.
bool torch_3d_knows_channels_last(const ConvArgs& args, int threads) {
  const TensorInfo& x = args.input;
  if (x.dtype == kDouble) return false;
  const int64_t batch = args.batched() ? x.size[0] : 1;
  const int64_t* size = x.size + (args.batched() ? 1 : 0);
  bool strided = false;
  for (int64_t d = 0; d < 3; ++d) strided = strided || args.stride_of(d) != 1;
  return (strided || batch >= 16 || threads > 1) &&
         (args.groups > 1 || batch > 1 || batch * size[0] * size[1] * size[2] > 20480);
}

void dense_strides(const int64_t* size, int64_t ndim, bool channels_last, int64_t* stride) {
  int64_t step = 1;
  const auto place = [&](int64_t d) {
    stride[d] = step;
    step *= size[d] > 1 ? size[d] : 1;
  };
  if (channels_last) place(1);
  for (int64_t d = ndim - 1; d >= (channels_last ? 2 : 0); --d) place(d);
  if (channels_last) place(0);
}

// The strides that nn.Conv{1,2,3}d gives its output: channels last if input or weight are, where torch has the format.
// For half types in 3d torch's choice depends on the CPU; ours is that of float32.
bool output_channels_last(const ConvArgs& args, int threads) {
  const TensorInfo& x = args.input;
  if (std::find(x.size, x.size + x.ndim, 0) != x.size + x.ndim) return false;
  // A 1d input is made contiguous first, which leaves one that is contiguous but for sizes of 1 as it was.
  const bool input_counts = args.spatial() > 1 || is_contiguous(x);
  if (!is_channels_last_in_conv(args.weight, args.weight.ndim) &&
      !(input_counts && is_channels_last_in_conv(x, args.weight.ndim)))
    return false;
  return args.spatial() < 3 || torch_3d_knows_channels_last(args, threads);
}

// (C, ...) or (N, C, ...) strides as N C D H W.
void view_strides(const TensorInfo& t, bool batched, int64_t* out) {
  const int64_t channel = batched ? 1 : 0, spatial = t.ndim - 1 - channel;
  out[0] = batched ? t.stride[0] : 0;
  out[1] = t.stride[channel];
  for (int64_t d = 0; d < 3; ++d) out[2 + d] = d < 3 - spatial ? 0 : t.stride[channel + 1 + d - (3 - spatial)];
}

template <class MaybeTensor>
ActivationView activation_view(const MaybeTensor& tensor, const TensorInfo& t, bool batched) {
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

VectorView bias_view(const ConvArgs& args, const std::optional<Tensor>& bias) {
  if (!bias) return {};
  return {const_cast<void*>(bias->const_data_ptr()), args.bias.size[0] == 1 ? 1 : args.bias.stride[0]};
}

const KernelSet& kernels() {
  std::string error;
  const KernelSet* set = selected_kernels(&error);
  raise_if(error);
  return *set;
}

void raise_if_failed(Status status) { raise_if(status == kOk ? "" : "conv1x1: out of memory for the workspace"); }

void run(const GemmProblem& g) { raise_if_failed(run_gemm(g, make_plan(g, threads(), kernels()))); }

Tensor allocate_output(const ConvArgs& args, const Conv1x1Problem& p, ActivationView* view) {
  int64_t size[kMaxDims], stride[kMaxDims];
  const bool batched = args.batched();
  const int64_t spatial = args.spatial(), ndim = spatial + (batched ? 2 : 1);
  // As channels-last strides are those of the batched tensor, they are computed with a batch of 1 where there is none.
  size[0] = p.batch;
  size[1] = args.input.size[batched ? 1 : 0] == 0 ? 0 : p.c_out;
  for (int64_t d = 0; d < spatial; ++d) size[2 + d] = p.out_size[3 - spatial + d];
  dense_strides(size, spatial + 2, output_channels_last(args, threads()), stride);
  const int64_t skip = batched ? 0 : 1;
  Tensor out = empty_strided(ndim, size + skip, stride + skip, args.input);
  TensorInfo t;
  t.ndim = ndim;
  t.size = size + skip;
  t.stride = stride + skip;
  *view = activation_view(out, t, batched);
  use_huge_pages(view->data, p.batch * size[1] * p.pixels() * dtype_size(p.dtype));
  return out;
}

Tensor fprop(ConvArgs& args, const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
             const std::optional<Tensor>& residual) {
  raise_if(check_conv(args));
  Conv1x1Problem p = problem_of(args, input, weight);
  Tensor out = allocate_output(args, p, &p.y);
  if (p.c_in == 0) return out;  // no output channels either
  p.bias = bias_view(args, bias);
  if (residual) p.residual = activation_view(*residual, args.residual, args.batched());
  run(lower_fprop(p));
  return out;
}

ConvArgs conv_args(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                   const std::optional<Tensor>& residual) {
  ConvArgs args;
  args.input = info_of(input);
  args.weight = info_of(weight);
  args.bias = info_of(bias);
  args.residual = info_of(residual);
  return args;
}

Tensor fprop_private(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                     const std::optional<Tensor>& residual, int64_t config) {
  ConvArgs args = conv_args(input, weight, bias, residual);
  decode_config(args, config);
  return fprop(args, input, weight, bias, residual);
}

Tensor conv1x1(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
               const std::optional<Tensor>& residual, std::vector<int64_t> stride, int64_t groups,
               std::string activation, bool) {
  ConvArgs args = conv_args(input, weight, bias, residual);
  args.groups = groups;
  set_stride(args, stride);
  set_activation(args, activation);
  return fprop(args, input, weight, bias, residual);
}

// The weight's own strides where they are dense, so that grad.stride() == weight.stride(); contiguous otherwise.
Tensor allocate_like_weight(const ConvArgs& args, WeightView* view) {
  const TensorInfo& w = args.weight;
  const int64_t out = w.size[0], in = w.size[1], so = w.stride[0], si = w.stride[1];
  const bool row_major = (in == 1 || si == 1) && (out == 1 || so == in);
  const bool column_major = (out == 1 || so == 1) && (in == 1 || si == out);
  int64_t contiguous[kMaxDims];
  dense_strides(w.size, w.ndim, false, contiguous);
  const int64_t* stride = row_major || column_major ? w.stride : contiguous;
  Tensor dw = empty_strided(w.ndim, w.size, stride, w);
  *view = {dw.mutable_data_ptr(), stride[0], stride[1]};
  return dw;
}

// A gradient of the input: channels last if the input is, contiguous otherwise.
Tensor allocate_input_grad(const ConvArgs& args, ActivationView* view) {
  const TensorInfo& x = args.input;
  int64_t stride[kMaxDims];
  dense_strides(x.size, x.ndim, is_channels_last(x), stride);
  Tensor dx = empty_strided(x.ndim, x.size, stride, x);
  TensorInfo t = x;
  t.stride = stride;
  *view = activation_view(dx, t, args.batched());
  int64_t elements = 1;
  for (int64_t d = 0; d < x.ndim; ++d) elements *= x.size[d];
  DType dtype = DType::kFloat32;
  to_dtype(x.dtype, &dtype);
  use_huge_pages(view->data, elements * dtype_size(dtype));
  return dx;
}

struct Wanted {
  bool input, weight, bias, residual;
};

using MaybeTensor = std::optional<Tensor>;
using ConvGrads = std::tuple<MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor>;

ConvGrads backward(ConvArgs& args, const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                   const MaybeTensor& output, const Wanted& wanted) {
  const TensorInfo dy = info_of(grad_output), y = info_of(output);
  raise_if(check_backward(args, dy, y));
  const bool batched = args.batched();
  Conv1x1Problem p = problem_of(args, input, weight);
  p.dy = activation_view(grad_output, dy, batched);
  if (output && args.activation != Activation::kNone) p.y = activation_view(*output, y, batched);
  ConvGrads grads;
  if (wanted.residual) {
    // The residual's gradient is the masked dy itself: made once, it then serves the other gradients.
    Tensor dz = allocate_output(args, p, &p.dx);
    mask_grad(p, p.dx, threads(), kernels());
    p.dy = p.dx;
    p.y = ActivationView();
    p.activation = Activation::kNone;
    std::get<3>(grads) = dz;
  }
  const bool empty = p.c_in == 0;  // grad_output has no elements then
  if (wanted.input) {
    Tensor dx = allocate_input_grad(args, &p.dx);
    if (p.strided()) zero_fill(p, threads());
    if (!empty) run(lower_dgrad(p));
    std::get<0>(grads) = dx;
  }
  if (wanted.weight) std::get<1>(grads) = allocate_like_weight(args, &p.dw);
  if (wanted.bias) {
    const int64_t one = 1;
    Tensor dbias = empty_strided(1, &p.c_out, &one, args.input);
    p.dbias = {dbias.mutable_data_ptr(), 1};
    if (empty) torch::stable::zero_(dbias);
    std::get<2>(grads) = dbias;
  }
  if ((wanted.weight || wanted.bias) && !empty) run(lower_wgrad(p));
  return grads;
}

ConvGrads backward_private(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                           const MaybeTensor& output, int64_t config, int64_t wanted) {
  ConvArgs args = conv_args(input, weight, std::nullopt, std::nullopt);
  decode_config(args, config);
  const Wanted want{(wanted & 1) != 0, (wanted & 2) != 0, (wanted & 4) != 0, (wanted & 8) != 0};
  return backward(args, grad_output, input, weight, output, want);
}

ConvGrads conv1x1_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                           const MaybeTensor& output, std::vector<int64_t> stride, int64_t groups,
                           std::string activation, bool, bool need_input, bool need_weight, bool need_bias,
                           bool need_residual) {
  ConvArgs args = conv_args(input, weight, std::nullopt, std::nullopt);
  args.groups = groups;
  set_stride(args, stride);
  set_activation(args, activation);
  return backward(args, grad_output, input, weight, output, {need_input, need_weight, need_bias, need_residual});
}

Tensor conv1x1_avg_pool(const Tensor& input, const Tensor& weight, const MaybeTensor& bias, int64_t groups,
                        std::string activation, bool) {
  ConvArgs args = conv_args(input, weight, bias, std::nullopt);
  args.groups = groups;
  set_activation(args, activation);
  raise_if(check_conv(args));
  Conv1x1Problem p = problem_of(args, input, weight);
  p.bias = bias_view(args, bias);
  const int64_t size[2] = {p.batch, args.input.size[args.batched() ? 1 : 0] == 0 ? 0 : p.c_out},
                stride[2] = {size[1] > 1 ? size[1] : 1, 1};
  const int64_t skip = args.batched() ? 0 : 1;
  Tensor out = empty_strided(2 - skip, size + skip, stride + skip, args.input);
  if (p.c_in == 0) return out;
  raise_if_failed(avg_pool(p, out.mutable_data_ptr(), threads(), kernels()));
  return out;
}

std::tuple<MaybeTensor, MaybeTensor, MaybeTensor> conv1x1_avg_pool_backward(
    const Tensor& grad_output, const Tensor& input, const Tensor& weight, const MaybeTensor& bias, int64_t groups,
    std::string activation, bool, bool need_input, bool need_weight, bool need_bias) {
  ConvArgs args = conv_args(input, weight, bias, std::nullopt);
  args.groups = groups;
  set_activation(args, activation);
  const TensorInfo dy = info_of(grad_output);
  raise_if(check_avg_pool_backward(args, dy));
  Conv1x1Problem p = problem_of(args, input, weight);
  p.bias = bias_view(args, bias);
  p.dy.data = const_cast<void*>(grad_output.const_data_ptr());
  p.dy.stride[0] = args.batched() ? dy.stride[0] : 0;
  p.dy.stride[1] = dy.stride[args.batched() ? 1 : 0];
  MaybeTensor dx, dw, dbias;
  if (need_input) dx = allocate_input_grad(args, &p.dx);
  if (need_weight) {
    dw = allocate_like_weight(args, &p.dw);
    torch::stable::zero_(*dw);
  }
  if (need_bias) {
    const int64_t one = 1;
    dbias = empty_strided(1, &p.c_out, &one, args.input);
    torch::stable::zero_(*dbias);
    p.dbias = {dbias->mutable_data_ptr(), 1};
  }
  if (p.c_in != 0) raise_if_failed(avg_pool_backward(p, threads(), kernels()));
  return {dx, dw, dbias};
}

// The plan of a call, as "key=value" lines. `direction`: fprop, dgrad, wgrad or avg_pool.
std::string explain(const Tensor& input, const Tensor& weight, const MaybeTensor& bias, const MaybeTensor& residual,
                    std::vector<int64_t> stride, int64_t groups, std::string activation, std::string direction) {
  ConvArgs args = conv_args(input, weight, bias, residual);
  args.groups = groups;
  set_stride(args, stride);
  set_activation(args, activation);
  raise_if(check_conv(args));
  Conv1x1Problem p = problem_of(args, input, weight);
  if (p.c_in == 0) return "kernel=none: no input channels, no output channels";
  p.bias = bias_view(args, bias);
  if (residual) p.residual = activation_view(*residual, args.residual, args.batched());
  Tensor y = allocate_output(args, p, &p.y);
  GemmProblem g;
  if (direction == "fprop") {
    g = lower_fprop(p);
  } else if (direction == "avg_pool") {
    double unused = 0;
    g = lower_avg_pool(p, &unused);
  } else {
    if (direction != "dgrad" && direction != "wgrad")
      raise_if("conv1x1: direction: expected 'fprop', 'dgrad', 'wgrad' or 'avg_pool', got '" + direction + "'");
    if (!masks_from_output(p.activation)) p.activation = Activation::kNone;  // torch's own derivative comes first
    p.dy = p.y;
    if (direction == "dgrad") {
      Tensor dx = allocate_input_grad(args, &p.dx);
      g = lower_dgrad(p);
    } else {
      Tensor dw = allocate_like_weight(args, &p.dw);
      if (bias) p.dbias = p.bias;
      g = lower_wgrad(p);
    }
  }
  return describe(g, make_plan(g, threads(), kernels()));
}

std::string build_info() {
  const KernelSet& set = kernels();
  std::string text = std::string("isa=") + set.isa + "\nmicrokernels=";
  const KernelTable all = all_microkernels();
  for (size_t i = 0; i < all.count; ++i) text += std::string(i ? ", " : "") + all.kernels[i]->name;
  return text + "\ntorch_target=" + std::to_string(TORCH_FEATURE_VERSION >> 56) + "." +
         std::to_string((TORCH_FEATURE_VERSION >> 48) & 255) + "\ncompiler=" + __VERSION__;
}

}  // namespace
}  // namespace conv1x1

STABLE_TORCH_LIBRARY_IMPL(conv1x1_ext, CPU, m) {
  m.impl("conv1x1", TORCH_BOX(&conv1x1::conv1x1));
  m.impl("conv1x1_backward", TORCH_BOX(&conv1x1::conv1x1_backward));
  m.impl("conv1x1_avg_pool", TORCH_BOX(&conv1x1::conv1x1_avg_pool));
  m.impl("conv1x1_avg_pool_backward", TORCH_BOX(&conv1x1::conv1x1_avg_pool_backward));
  m.impl("_fprop", TORCH_BOX(&conv1x1::fprop_private));
  m.impl("_backward", TORCH_BOX(&conv1x1::backward_private));
  m.impl("_explain", TORCH_BOX(&conv1x1::explain));
}

STABLE_TORCH_LIBRARY_IMPL(conv1x1_ext, CompositeExplicitAutograd, m) {
  m.impl("_build_info", TORCH_BOX(&conv1x1::build_info));
}
