// The binding of the CUDA kernels: implements the Backend of binding.h by the functions of launch.h, and turns
// cudaError_t into exceptions.
//
// A call runs on the input's device and on torch's current stream of that device. It never synchronises and allocates
// only through torch's caching allocator, so CUDA graphs can capture it.
#include <torch/csrc/stable/accelerator.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "../api/binding.h"
#include "../api/strides.h"
#include "heuristics.h"
#include "launch.h"

// Defined only in torch's CUDA library. A strong reference would keep this library from loading with a torch without
// CUDA. The symbol is found because this library is linked to libtorch (build_config.py).
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace conv1x1 {
namespace {

constexpr int32_t kCudaDevice = 1;  // of DeviceType

void raise_if_failed(cudaError_t error, const std::string& doing) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clears the error, which a later call would otherwise report again
  throw std::runtime_error("conv1x1: " + doing + ": " + cudaGetErrorName(error) + ": " + cudaGetErrorString(error));
}

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  raise_if_failed(cudaDeviceGetAttribute(&value, which, device), "asking CUDA device " + std::to_string(device));
  return value;
}

std::vector<cuda::Device> all_devices() {
  int count = 0;
  raise_if_failed(cudaGetDeviceCount(&count), "counting CUDA devices");
  std::vector<cuda::Device> devices;
  for (int d = 0; d < count; ++d)
    devices.push_back(
        {10 * attribute(cudaDevAttrComputeCapabilityMajor, d) + attribute(cudaDevAttrComputeCapabilityMinor, d),
         attribute(cudaDevAttrMultiProcessorCount, d), attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, d)});
  return devices;
}

// Facts of the machine, read once. The queries need no context and are legal in a stream capture.
const cuda::Device& device_at(int32_t index) {
  static const std::vector<cuda::Device> devices = all_devices();
  return devices.at(static_cast<size_t>(index));
}

#if defined(CONV1X1_TUNING)
// Only in a library built with CONV1X1_TUNING=1, for bench/cuda_tiles.py. There a process tries tiles and cost models
// through the unchanged operators. No other build has a global that a call could change.
cuda::Tuning& tuning() {
  static cuda::Tuning tuning;
  return tuning;
}
#endif

cuda::Device device_of(int32_t index) {
  cuda::Device device = device_at(index);
#if defined(CONV1X1_TUNING)
  device.tuning = &tuning();
#endif
  return device;
}

bool verbose() {
  static const bool value = [] {
    const char* text = std::getenv("CONV1X1_VERBOSE");
    return text && *text && std::strcmp(text, "0") != 0;
  }();
  return value;
}

// Checked first, before any call to a driver that may be missing.
int32_t cuda_index(const ConvArgs& args) {
  if (args.input.device_type != kCudaDevice)
    raise_if("conv1x1: input: expected a CUDA tensor in a CUDA kernel, got a tensor of another device");
  if (!aoti_torch_get_current_cuda_stream)
    raise_if("conv1x1: input: expected CPU tensors, got CUDA tensors: this torch was built without CUDA");
  return args.input.device_index;
}

class CudaBackend final : public Backend {
 public:
  explicit CudaBackend(const ConvArgs& args)
      : index_(cuda_index(args)), guard_(index_), device_(device_of(index_)), allow_tf32_(args.allow_tf32) {
    // torch's guard has set the device in torch's copy of the CUDA runtime, and will restore it. This library links a
    // copy of its own, which launches on the current device of that copy.
    int current = -1;
    raise_if_failed(cudaGetDevice(&current), "asking for the current device");
    if (current != index_) raise_if_failed(cudaSetDevice(index_), "switching to the input's device");
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  bool output_channels_last(const ConvArgs& args) const override { return cuda_output_channels_last(args); }

  void gemm(const GemmProblem& g) const override {
    const cuda::Plan plan = plan_of(g);
    if (verbose()) std::fprintf(stderr, "conv1x1\n%s\n", cuda::describe(g, device_, plan).c_str());
    const Workspace workspace(plan.workspace, index_);
    raise("the GEMM", cuda::run_gemm(g, plan, workspace.data, stream_));
  }

  void mask_grad(const Conv1x1Problem& p, const ActivationView& dz) const override {
    raise("the masked gradient", cuda::run_masked_copy(lower_mask(p, dz), p.dtype, stream_));
  }

  void zero_fill(const Conv1x1Problem& p) const override {
    raise("the zeros of a strided input's gradient", cuda::run_zero_fill(p, stream_));
  }

  void avg_pool(const Conv1x1Problem& p, void* out) const override {
    check(p);
    if (verbose()) std::fprintf(stderr, "conv1x1\n%s\n", explain_avg_pool(p).c_str());
    const Workspace workspace(cuda::avg_pool_workspace(p, device_, allow_tf32_), index_);
    raise("average pooling", cuda::run_avg_pool(p, out, device_, allow_tf32_, workspace.data, stream_));
  }

  void avg_pool_backward(const Conv1x1Problem& p) const override {
    check(p);
    const Workspace workspace(cuda::avg_pool_backward_workspace(p, device_, allow_tf32_), index_);
    raise("the backward of average pooling",
          cuda::run_avg_pool_backward(p, device_, allow_tf32_, workspace.data, stream_));
  }

  std::string explain(const GemmProblem& g) const override { return cuda::describe(g, device_, plan_of(g)); }

  std::string explain_avg_pool(const Conv1x1Problem& p) const override {
    check(p);
    return cuda::describe_avg_pool(p, device_, allow_tf32_);
  }

 private:
  // Released at the end of the pass. Its next owner runs later on the same stream.
  struct Workspace {
    Workspace(int64_t bytes, int32_t index) {
      if (bytes == 0) return;
      TensorInfo like;
      like.dtype = kUInt8;
      like.device_type = kCudaDevice;
      like.device_index = index;
      const int64_t one = 1;
      tensor = empty_strided(1, &bytes, &one, like);
      data = tensor.mutable_data_ptr();
    }

    Tensor tensor;
    void* data = nullptr;
  };

  void check(const Conv1x1Problem& p) const { raise_if(cuda::check_problem(lower_avg_pool(p), device_)); }

  cuda::Plan plan_of(const GemmProblem& g) const {
    raise_if(cuda::check_problem(g, device_));
    return cuda::make_plan(g, device_, allow_tf32_);
  }

  void raise(const char* what, cudaError_t error) const {
    if (error != cudaSuccess)
      raise_if_failed(error, std::string("launching ") + what + " on cuda:" + std::to_string(index_) + " (sm_" +
                                 std::to_string(device_.arch) + ", built for " CONV1X1_CUDA_ARCHS ")");
  }

  const int32_t index_;
  const torch::stable::accelerator::DeviceGuard guard_;
  const cuda::Device device_;
  const bool allow_tf32_;
  cudaStream_t stream_ = nullptr;
};

}  // namespace

std::string cuda_build_info() { return "cuda_archs=" CONV1X1_CUDA_ARCHS "\nnvcc=" CONV1X1_NVCC; }

}  // namespace conv1x1

STABLE_TORCH_LIBRARY_IMPL(conv1x1_ext, CUDA, m) { conv1x1::Operators<conv1x1::CudaBackend>::implement(m); }

#if defined(CONV1X1_TUNING)
// Called through ctypes while nothing else runs. `tile` and `slices` are those of Tuning. A model, if not null, has
// `alone` of each tile, then `full` of each tile, then the other members of CostModel in order.
extern "C" __attribute__((visibility("default"))) void conv1x1_ext_tune(int tile, int64_t slices, const double* bits16,
                                                                        const double* tf32) {
  using namespace conv1x1::cuda;
  Tuning& t = conv1x1::tuning();
  t.tile = tile;
  t.slices = slices;
  const auto read = [](const double* from, CostModel& to) {
    if (!from) return;
    for (int i = 0; i < kMmaTileCount; ++i) to.tiles[i] = {from[i], from[kMmaTileCount + i]};
    from += 2 * kMmaTileCount;
    for (double* member :
         {&to.fixed_alone, &to.fixed_full, &to.masked_alone, &to.masked_full, &to.reduction, &to.reduced_bytes})
      *member = *from++;
  };
  read(bits16, t.bits16);
  read(tf32, t.tf32);
}
#endif
