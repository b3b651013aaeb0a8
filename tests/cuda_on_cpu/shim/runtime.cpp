// The host side of cuda_runtime.h: errors, limits of shared memory, memory that is the host's.
#include "cuda_runtime.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <utility>

namespace conv1x1::cuda::emulator {
namespace {

constexpr size_t kDefaultSharedLimit = 48 << 10;

struct State {
  std::mutex mutex;
  cudaError_t error = cudaSuccess;
  std::string message;
  std::map<const void*, size_t> shared_limits;
  Settings settings;
};

State& state() {
  static State instance;
  return instance;
}

}  // namespace

Settings& settings() { return state().settings; }

void set_error(cudaError_t error, const std::string& message) {
  const std::lock_guard<std::mutex> lock(state().mutex);
  if (state().error != cudaSuccess) return;
  state().error = error;
  state().message = message;
}

cudaError_t set_shared_memory(const void* function, int bytes) {
  const int limit = settings().shared_memory_limit;
  if (bytes < 0 || bytes > limit) {
    set_error(cudaErrorInvalidValue, "cudaFuncSetAttribute: " + std::to_string(bytes) +
                                         " bytes of dynamic shared memory, the device has " + std::to_string(limit));
    return cudaErrorInvalidValue;
  }
  const std::lock_guard<std::mutex> lock(state().mutex);
  state().shared_limits[function] = static_cast<size_t>(bytes);
  return cudaSuccess;
}

size_t shared_memory_limit(const void* function) {
  const std::lock_guard<std::mutex> lock(state().mutex);
  const auto opted_in = state().shared_limits.find(function);
  const size_t limit = opted_in == state().shared_limits.end() ? 0 : opted_in->second;
  return std::min(std::max(limit, kDefaultSharedLimit), static_cast<size_t>(settings().shared_memory_limit));
}

}  // namespace conv1x1::cuda::emulator

cudaError_t cudaPeekAtLastError() {
  const std::lock_guard<std::mutex> lock(conv1x1::cuda::emulator::state().mutex);
  return conv1x1::cuda::emulator::state().error;
}

cudaError_t cudaGetLastError() {
  const std::lock_guard<std::mutex> lock(conv1x1::cuda::emulator::state().mutex);
  return std::exchange(conv1x1::cuda::emulator::state().error, cudaSuccess);
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorNotSupported: return "operation not supported";
    default: return conv1x1::cuda::emulator::state().message.c_str();
  }
}

cudaError_t cudaMemsetAsync(void* pointer, int value, size_t bytes, cudaStream_t) {
  if (bytes) std::memset(pointer, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  if (bytes) std::memcpy(to, from, bytes);
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
