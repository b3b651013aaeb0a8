// Runs CUDA kernels on the CPU: every thread of a block is a fiber, blocks are shared out over OS threads.
//
// Made to show faults, not to be fast. Shared memory is poisoned before each block. Fibers run to their next barrier in
// an order that a seed shuffles, and a warp runs as far ahead of the others as its barriers let it. Asynchronous copies
// happen as late as they may. A fault (divergent barrier, misaligned or unfinished copy) ends the launch with a message
// that cudaGetErrorString gives. A data race is not detected as such: it shows as a wrong result under some seed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <tuple>

#include "vectors.h"

enum cudaError_t : int {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719,
  cudaErrorNotSupported = 801,
};

namespace conv1x1::cuda::emulator {

class Worker;

// What a thread of the GPU reads from special registers. The only thread_local of the library but for the kernels'
// __shared__ arrays: a worker poisons all the others.
struct Registers {
  uint3 thread_index = {}, block_index = {};
  dim3 block_dim, grid_dim;
  unsigned char* dynamic_shared = nullptr;
  Worker* worker = nullptr;
};
inline thread_local Registers registers;

struct Settings {
  uint64_t seed = 0;                 // of the order of blocks and of fibers
  int os_threads = 2;                // that blocks are shared out over
  int shared_memory_limit = 101376;  // bytes a kernel may opt in to
};
Settings& settings();

// Code and text of the first error since the last cudaGetLastError.
void set_error(cudaError_t error, const std::string& message);
// What cudaFuncSetAttribute keeps, and what a launch may have: 48 KiB where it was not called.
cudaError_t set_shared_memory(const void* function, int bytes);
size_t shared_memory_limit(const void* function);

struct Site {
  const char* file;
  int line;
};

constexpr int kWarp = 32;

// Waits for all threads of the block, which must call it from the same place.
void block_barrier(Site site);

// Waits for all 32 lanes of the warp, which must call it from the same place; the last to arrive calls `perform` with
// every lane's `mine`.
using Perform = void (*)(void* const (&lanes)[kWarp]);
void warp_collective(const char* name, Perform perform, void* mine, Site site);

int lane();

// Ends the launch; the message gets the kernel's, block's and thread's names.
[[noreturn]] void fail(const std::string& message, Site site);

// Fails unless [pointer, pointer + bytes) lies in this block's shared memory and pointer is a multiple of `alignment`.
void check_shared(const char* name, const void* pointer, size_t bytes, size_t alignment, Site site);

// The thread's asynchronous copies: queued, closed into groups, done when a wait demands it.
void queue_copy(void* shared, const void* global, int bytes, int valid, Site site);
void close_group();
void wait_for_groups(size_t pending);

struct Launch {
  const char* name;
  const void* function;
  dim3 grid, block;
  size_t shared_bytes;
  void (*call)(const void* arguments);
  const void* arguments;
};
void run(const Launch& launch);

// The arguments are converted to the parameters' types and copied once per launch, as CUDA does.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
            Arguments&&... arguments) {
  using Packed = std::tuple<void (*)(Parameters...), Parameters...>;
  const Packed packed(kernel, static_cast<Arguments&&>(arguments)...);
  const auto call = [](const void* data) {
    std::apply([](auto function, const auto&... values) { function(values...); }, *static_cast<const Packed*>(data));
  };
  run({name, reinterpret_cast<const void*>(kernel), grid, block, shared_bytes, call, &packed});
}

}  // namespace conv1x1::cuda::emulator
