#include "checks.h"

#include <initializer_list>
#include <vector>

namespace conv1x1 {
namespace {

std::string shape_text(const int64_t* size, int64_t ndim) {
  std::string text = "[";
  for (int64_t d = 0; d < ndim; ++d) text += (d ? ", " : "") + std::to_string(size[d]);
  return text + "]";
}

std::string shape_of(const TensorInfo& t) { return shape_text(t.size, t.ndim); }

std::string scalar_type_text(int type) {
  constexpr const char* names[] = {"uint8",           "int8",
                                   "int16",           "int32",
                                   "int64",           "float16",
                                   "float32",         "float64",
                                   "complex32",       "complex64",
                                   "complex128",      "bool",
                                   "qint8",           "quint8",
                                   "qint32",          "bfloat16",
                                   "quint4x2",        "quint2x4",
                                   "bits1x8",         "bits2x4",
                                   "bits4x2",         "bits8",
                                   "bits16",          "float8_e5m2",
                                   "float8_e4m3fn",   "float8_e5m2fnuz",
                                   "float8_e4m3fnuz", "uint16",
                                   "uint32",          "uint64"};
  if (type >= 0 && type < static_cast<int>(sizeof names / sizeof *names)) return names[type];
  return "another one";
}

std::string device_text(const TensorInfo& t) {
  switch (t.device_type) {  // torch.headeronly.DeviceType
    case 0: return "cpu";
    case 1: return "cuda:" + std::to_string(t.device_index);
    case 14: return "meta";
    default: return "device type " + std::to_string(t.device_type);
  }
}

std::string expected(const char* argument, const std::string& what, const std::string& got) {
  return std::string("conv1x1: ") + argument + ": expected " + what + ", got " + got;
}

bool same_device(const TensorInfo& a, const TensorInfo& b) {
  return a.device_type == b.device_type && (a.device_type == 0 || a.device_index == b.device_index);
}

// dtype and device as the input's.
std::string check_like_input(const char* argument, const TensorInfo& t, const TensorInfo& input) {
  if (t.dtype != input.dtype)
    return expected(argument, "the input's dtype " + scalar_type_text(input.dtype), scalar_type_text(t.dtype));
  if (!same_device(t, input)) return expected(argument, "the input's device " + device_text(input), device_text(t));
  return "";
}

std::vector<int64_t> output_shape(const ConvArgs& args) {
  std::vector<int64_t> shape;
  if (args.batched()) shape.push_back(args.input.size[0]);
  // No input channels: nn.Conv2d returns no output channels either.
  const int64_t channel = args.batched() ? 1 : 0;
  shape.push_back(args.input.size[channel] == 0 ? 0 : args.weight.size[0]);
  for (int64_t d = 0; d < args.spatial(); ++d)
    shape.push_back(output_size(args.input.size[channel + 1 + d], args.stride_of(d)));
  return shape;
}

std::string check_shape(const char* argument, const TensorInfo& t, const std::vector<int64_t>& shape) {
  bool same = t.ndim == static_cast<int64_t>(shape.size());
  for (int64_t d = 0; same && d < t.ndim; ++d) same = t.size[d] == shape[static_cast<size_t>(d)];
  if (same) return "";
  return expected(argument, "the output's shape " + shape_text(shape.data(), static_cast<int64_t>(shape.size())),
                  shape_of(t));
}

std::string check_operands(const ConvArgs& args) {
  const TensorInfo &x = args.input, &w = args.weight, &b = args.bias;
  DType dtype;
  if (!to_dtype(x.dtype, &dtype))
    return expected("input", "dtype float32, float64, bfloat16 or float16", scalar_type_text(x.dtype));
  if (w.ndim < 3 || w.ndim > 5) return expected("weight", "shape (C_out, C_in / groups, 1[, 1[, 1]])", shape_of(w));
  for (int64_t d = 2; d < w.ndim; ++d)
    if (w.size[d] != 1) return expected("weight", "a kernel of size 1 in every spatial dimension", shape_of(w));
  if (x.ndim != w.ndim && x.ndim != w.ndim - 1)
    return expected("input",
                    std::to_string(w.ndim - 1) + " (unbatched) or " + std::to_string(w.ndim) +
                        " dimensions for a weight of shape " + shape_of(w),
                    shape_of(x));
  if (args.groups <= 0) return expected("groups", "a positive integer", std::to_string(args.groups));
  if (w.size[0] < 1) return expected("weight", "at least 1 output channel", shape_of(w));
  if (w.size[0] % args.groups != 0)
    return expected("weight", "output channels divisible by groups=" + std::to_string(args.groups), shape_of(w));
  const int64_t c_in = x.size[args.batched() ? 1 : 0];
  if (c_in != w.size[1] * args.groups)
    return expected("input",
                    std::to_string(w.size[1] * args.groups) + " channels for a weight of shape " + shape_of(w) +
                        " and groups=" + std::to_string(args.groups),
                    std::to_string(c_in) + " channels in shape " + shape_of(x));
  std::string error = check_like_input("weight", w, x);
  if (!error.empty() || !b.defined) return error;
  if (b.ndim != 1 || b.size[0] != w.size[0])
    return expected("bias", "shape [" + std::to_string(w.size[0]) + "]", shape_of(b));
  return check_like_input("bias", b, x);
}

std::string check_stride(const ConvArgs& args) {
  const std::string got = shape_text(args.stride, args.stride_count);
  if (args.stride_count != 1 && args.stride_count != args.spatial())
    return expected("stride",
                    args.spatial() == 1 ? "1 integer" : "1 or " + std::to_string(args.spatial()) + " integers", got);
  for (int64_t d = 0; d < args.stride_count; ++d)
    if (args.stride[d] <= 0) return expected("stride", "positive integers", got);
  return "";
}

}  // namespace

bool to_dtype(int scalar_type, DType* dtype) {
  switch (scalar_type) {
    case kFloat: *dtype = DType::kFloat32; return true;
    case kDouble: *dtype = DType::kFloat64; return true;
    case kBFloat16: *dtype = DType::kBFloat16; return true;
    case kHalf: *dtype = DType::kFloat16; return true;
    default: return false;
  }
}

bool to_activation(const std::string& name, Activation* activation) {
  for (int i = 0; i < kActivationCount; ++i)
    if (name == activation_name(static_cast<Activation>(i))) {
      *activation = static_cast<Activation>(i);
      return true;
    }
  return false;
}

std::string check_activation_name(const std::string& name) {
  Activation activation;
  if (to_activation(name, &activation)) return "";
  std::string known;
  for (int i = 0; i < kActivationCount; ++i)
    known += std::string(i ? ", '" : "'") + activation_name(static_cast<Activation>(i)) + "'";
  return expected("activation", "one of " + known, "'" + name + "'");
}

std::string check_stride_count(int64_t count) {
  if (count >= 1 && count <= 3) return "";
  return expected("stride", "1 to 3 integers", std::to_string(count) + " of them");
}

std::string check_conv(const ConvArgs& args) {
  std::string error = check_operands(args);
  if (error.empty()) error = check_stride(args);
  if (!error.empty() || !args.residual.defined) return error;
  error = check_shape("residual", args.residual, output_shape(args));
  return error.empty() ? check_like_input("residual", args.residual, args.input) : error;
}

std::string check_backward(const ConvArgs& args, const TensorInfo& grad_output, const TensorInfo& output) {
  std::string error = check_conv(args);
  if (error.empty()) error = check_shape("grad_output", grad_output, output_shape(args));
  if (error.empty()) error = check_like_input("grad_output", grad_output, args.input);
  if (!error.empty()) return error;
  if (!masks_from_output(args.activation))
    return expected("activation", "'none', 'relu' or 'relu6' in a backward from the output",
                    std::string("'") + activation_name(args.activation) + "'");
  if (!output.defined)
    return args.activation == Activation::kNone ? "" : expected("output", "the forward's result, for the mask", "None");
  error = check_shape("output", output, output_shape(args));
  return error.empty() ? check_like_input("output", output, args.input) : error;
}

std::string check_avg_pool_backward(const ConvArgs& args, const TensorInfo& grad_output) {
  std::string error = check_conv(args);
  if (!error.empty()) return error;
  std::vector<int64_t> shape = output_shape(args);
  shape.resize(args.batched() ? 2 : 1);
  error = check_shape("grad_output", grad_output, shape);
  return error.empty() ? check_like_input("grad_output", grad_output, args.input) : error;
}

}  // namespace conv1x1
