#include "strides.h"

#include <algorithm>

namespace conv1x1 {
namespace {

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

// Do the operands ask for a channels-last output?
bool suggests_channels_last(const ConvArgs& args) {
  const TensorInfo& x = args.input;
  if (std::find(x.size, x.size + x.ndim, 0) != x.size + x.ndim) return false;
  // torch makes a 1d input contiguous first. That changes nothing where only dimensions of size 1 have other strides.
  const bool input_counts = args.spatial() > 1 || is_contiguous(x);
  return is_channels_last_in_conv(args.weight, args.weight.ndim) ||
         (input_counts && is_channels_last_in_conv(x, args.weight.ndim));
}

// True where torch uses oneDNN for a 3d convolution of size 1. Its other 3d convolution does not support channels last.
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

}  // namespace

bool is_channels_last(const TensorInfo& t) { return is_channels_last(t.size, t.stride, t.ndim); }

bool is_contiguous(const TensorInfo& t) {
  int64_t step = 1;
  for (int64_t d = t.ndim - 1; d >= 0; --d) {
    if (t.size[d] != 1 && t.stride[d] != step) return false;
    step *= t.size[d];
  }
  return true;
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

void weight_grad_strides(const TensorInfo& w, int64_t* stride) {
  const int64_t out = w.size[0], in = w.size[1], so = w.stride[0], si = w.stride[1];
  const bool row_major = (in == 1 || si == 1) && (out == 1 || so == in);
  const bool column_major = (out == 1 || so == 1) && (in == 1 || si == out);
  if (row_major || column_major)
    std::copy(w.stride, w.stride + w.ndim, stride);
  else
    dense_strides(w.size, w.ndim, false, stride);
}

bool cpu_output_channels_last(const ConvArgs& args, int threads) {
  return suggests_channels_last(args) && (args.spatial() < 3 || torch_3d_knows_channels_last(args, threads));
}

// cudnn_conv_suggest_memory_format. torch uses its depthwise kernels, which do not support channels last, only where
// this rule says contiguous.
bool cuda_output_channels_last(const ConvArgs& args) {
  return args.input.dtype != kDouble && suggests_channels_last(args);
}

}  // namespace conv1x1
