// The door from Python to the emulated kernels: one call does what the binding does between the checks of arguments and
// the return, for a problem that comes as a flat array of int64 (harness.py writes it in this order).
// The workspace is exactly as large as the plan says, poisoned, and guarded on both sides.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <string>

#include "../../csrc/cuda/heuristics.h"
#include "../../csrc/cuda/launch.h"

namespace {

using namespace conv1x1;
using namespace conv1x1::cuda;

enum Direction { kFprop, kDgrad, kWgrad, kAvgPool, kAvgPoolBackward, kMaskedCopy };

class Reader {
 public:
  explicit Reader(const int64_t* values) : next_(values) {}
  int64_t integer() { return *next_++; }
  void* pointer() { return reinterpret_cast<void*>(integer()); }
  void integers(int64_t* to, int count) {
    for (int i = 0; i < count; ++i) to[i] = integer();
  }
  ActivationView activation() {
    ActivationView view;
    view.data = pointer();
    integers(view.stride, 5);
    return view;
  }
  WeightView weight() {
    WeightView view;
    view.data = pointer();
    view.stride_out = integer();
    view.stride_in = integer();
    return view;
  }
  VectorView vector() {
    VectorView view;
    view.data = pointer();
    view.stride = integer();
    return view;
  }

 private:
  const int64_t* next_;
};

class Workspace {
 public:
  explicit Workspace(int64_t bytes) : bytes_(static_cast<size_t>(bytes)) {
    if (posix_memalign(&memory_, kAlignment, bytes_ + 2 * kGuard) != 0) std::abort();
    std::memset(memory_, 0xff, bytes_ + 2 * kGuard);
  }
  ~Workspace() { std::free(memory_); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  void* data() const { return bytes() + kGuard; }
  bool guards_intact() const {
    const auto untouched = [](unsigned char byte) { return byte == 0xff; };
    return std::all_of(bytes(), bytes() + kGuard, untouched) &&
           std::all_of(bytes() + kGuard + bytes_, bytes() + 2 * kGuard + bytes_, untouched);
  }

 private:
#ifdef __SANITIZE_ADDRESS__
  static constexpr size_t kGuard = 0;  // AddressSanitizer's own stand closer, and name the culprit
#else
  static constexpr size_t kGuard = 256;
#endif
  static constexpr size_t kAlignment = 256;
  unsigned char* bytes() const { return static_cast<unsigned char*>(memory_); }
  size_t bytes_;
  void* memory_ = nullptr;
};

struct Result {
  std::string error, description;
};

std::string message_of(cudaError_t error) {
  if (error == cudaSuccess) error = cudaGetLastError();
  if (error == cudaSuccess) return "";
  const std::string message = cudaGetErrorString(error);
  cudaGetLastError();
  return message.empty() ? "CUDA error " + std::to_string(error) : message;
}

template <class Run>
std::string with_workspace(int64_t bytes, const Run& run) {
  if (bytes < 0) return "the workspace has " + std::to_string(bytes) + " bytes";
  const Workspace workspace(bytes);
  const std::string error = message_of(run(workspace.data()));
  if (!error.empty()) return error;
  return workspace.guards_intact() ? "" : "a store outside the workspace of " + std::to_string(bytes) + " bytes";
}

Result run_gemm_of(const GemmProblem& problem, const Device& device, bool allow_tf32) {
  Result result;
  result.error = check_problem(problem, device);
  if (!result.error.empty()) return result;
  const Plan plan = make_plan(problem, device, allow_tf32);
  result.description = describe(problem, device, plan);
  result.error =
      with_workspace(plan.workspace, [&](void* workspace) { return run_gemm(problem, plan, workspace, nullptr); });
  return result;
}

Result run_direction(Direction direction, const Conv1x1Problem& p, void* out, const ActivationView& dz,
                     const Device& device, bool allow_tf32) {
  Result result;
  switch (direction) {
    case kFprop: return run_gemm_of(lower_fprop(p), device, allow_tf32);
    case kDgrad:
      if (p.strided()) result.error = message_of(run_zero_fill(p, nullptr));
      return result.error.empty() ? run_gemm_of(lower_dgrad(p), device, allow_tf32) : result;
    case kWgrad: return run_gemm_of(lower_wgrad(p), device, allow_tf32);
    case kAvgPool:
      result.error = with_workspace(avg_pool_workspace(p, device, allow_tf32), [&](void* workspace) {
        return run_avg_pool(p, out, device, allow_tf32, workspace, nullptr);
      });
      return result;
    case kAvgPoolBackward:
      result.error = with_workspace(avg_pool_backward_workspace(p, device, allow_tf32), [&](void* workspace) {
        return run_avg_pool_backward(p, device, allow_tf32, workspace, nullptr);
      });
      return result;
    case kMaskedCopy: result.error = message_of(run_masked_copy(lower_mask(p, dz), p.dtype, nullptr)); return result;
  }
  result.error = "unknown direction";
  return result;
}

void write(const std::string& text, char* to, int64_t capacity) {
  const size_t count = std::min(text.size(), static_cast<size_t>(capacity) - 1);
  std::memcpy(to, text.data(), count);
  to[count] = 0;
}

}  // namespace

// `error` and `description` get zero-terminated text of at most `capacity` bytes; an empty error means success.
extern "C" __attribute__((visibility("default"))) void conv1x1_emulated(const int64_t* values, char* error,
                                                                        char* description, int64_t capacity) {
  Reader read(values);
  const auto direction = static_cast<Direction>(read.integer());
  emulator::Settings& settings = emulator::settings();
  settings.seed = static_cast<uint64_t>(read.integer());
  settings.os_threads = static_cast<int>(read.integer());
  Device device;
  device.arch = static_cast<int>(read.integer());
  device.sm_count = static_cast<int>(read.integer());
  device.shared_memory = static_cast<int>(read.integer());
  settings.shared_memory_limit = device.shared_memory;
  Tuning tuning;
  tuning.tile = static_cast<int>(read.integer());
  tuning.slices = read.integer();
  tuning.pooled_piece = read.integer();
  device.tuning = &tuning;
  const bool allow_tf32 = read.integer() != 0;

  Conv1x1Problem p;
  p.dtype = static_cast<DType>(read.integer());
  p.activation = static_cast<Activation>(read.integer());
  p.batch = read.integer();
  p.c_in = read.integer();
  p.c_out = read.integer();
  p.groups = read.integer();
  read.integers(p.in_size, 3);
  read.integers(p.out_size, 3);
  read.integers(p.stride, 3);
  p.accumulate_dw = read.integer() != 0;
  p.x = read.activation();
  p.y = read.activation();
  p.residual = read.activation();
  p.dy = read.activation();
  p.dx = read.activation();
  p.w = read.weight();
  p.dw = read.weight();
  p.bias = read.vector();
  p.dbias = read.vector();
  void* const out = read.pointer();
  const ActivationView dz = read.activation();

  const Result result = run_direction(direction, p, out, dz, device, allow_tf32);
  write(result.error, error, capacity);
  write(result.description, description, capacity);
}
