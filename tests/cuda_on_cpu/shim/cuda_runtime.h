// What the kernels and their launchers use of CUDA's runtime, for the CPU: our own text, no CUDA toolkit is needed.
// Device side: qualifiers, built-in variables, barriers, shuffles, intrinsics. Host side: a device whose memory is the
// host's and whose streams have always finished.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "emulator.h"
#include "vectors.h"

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
// Blocks that run at the same time do so on different OS threads.
#define __shared__ static thread_local

#define threadIdx (::conv1x1::cuda::emulator::registers.thread_index)
#define blockIdx (::conv1x1::cuda::emulator::registers.block_index)
#define blockDim (::conv1x1::cuda::emulator::registers.block_dim)
#define gridDim (::conv1x1::cuda::emulator::registers.grid_dim)

#define CONV1X1_DYNAMIC_SHARED(name) \
  [[maybe_unused]] unsigned char* const name = ::conv1x1::cuda::emulator::registers.dynamic_shared
#define CONV1X1_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  (static_cast<void>(stream),                                          \
   ::conv1x1::cuda::emulator::launch(#kernel, kernel, grid, block, shared_bytes, __VA_ARGS__))

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  conv1x1::cuda::emulator::block_barrier({file, line});
}

namespace conv1x1::cuda::emulator {

constexpr unsigned kFullMask = 0xffffffffu;

// Every lane gets the value of lane `source`.
template <class T>
T shuffle(const char* name, unsigned mask, T value, int source, Site site) {
  static_assert(std::is_trivially_copyable_v<T>);
  struct Lane {
    T given, got;
    int source;
  };
  if (mask != kFullMask) fail(std::string(name) + ": the mask is not that of a full warp", site);
  Lane mine{value, value, source};
  const Perform perform = [](void* const(&lanes)[kWarp]) {
    for (void* lane : lanes) {
      Lane& to = *static_cast<Lane*>(lane);
      to.got = static_cast<const Lane*>(lanes[to.source])->given;
    }
  };
  warp_collective(name, perform, &mine, site);
  return mine.got;
}

// The lane itself where the other one lies outside its segment of `width` lanes.
inline int within_segment(int other, int width) {
  return other >= 0 && other / width == lane() / width ? other : lane();
}

template <class To, class From>
To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

}  // namespace conv1x1::cuda::emulator

inline void __syncwarp(unsigned mask = conv1x1::cuda::emulator::kFullMask, const char* file = __builtin_FILE(),
                       int line = __builtin_LINE()) {
  conv1x1::cuda::emulator::shuffle("__syncwarp", mask, 0, conv1x1::cuda::emulator::lane(), {file, line});
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, const char* file = __builtin_FILE(),
              int line = __builtin_LINE()) {
  const int lane = conv1x1::cuda::emulator::lane();
  const int from = lane / width * width + (source & (width - 1));
  return conv1x1::cuda::emulator::shuffle("__shfl_sync", mask, value, from, {file, line});
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, const char* file = __builtin_FILE(),
                  int line = __builtin_LINE()) {
  // A lane may read from an earlier segment, but not from a later one.
  const int lane = conv1x1::cuda::emulator::lane(), other = lane ^ lane_mask;
  const int from = other < (lane / width + 1) * width ? other : lane;
  return conv1x1::cuda::emulator::shuffle("__shfl_xor_sync", mask, value, from, {file, line});
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, const char* file = __builtin_FILE(),
                   int line = __builtin_LINE()) {
  using namespace conv1x1::cuda::emulator;
  const int from = within_segment(lane() + static_cast<int>(delta), width);
  return shuffle("__shfl_down_sync", mask, value, from, {file, line});
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, const char* file = __builtin_FILE(),
                 int line = __builtin_LINE()) {
  using namespace conv1x1::cuda::emulator;
  const int from = within_segment(lane() - static_cast<int>(delta), width);
  return shuffle("__shfl_up_sync", mask, value, from, {file, line});
}

inline unsigned __ballot_sync(unsigned mask, int predicate, const char* file = __builtin_FILE(),
                              int line = __builtin_LINE()) {
  using namespace conv1x1::cuda::emulator;
  if (mask != kFullMask) fail("__ballot_sync: the mask is not that of a full warp", {file, line});
  struct Lane {
    bool given;
    unsigned got;
  } mine{predicate != 0, 0};
  const Perform perform = [](void* const(&lanes)[kWarp]) {
    unsigned bits = 0;
    for (int i = 0; i < kWarp; ++i) bits |= static_cast<unsigned>(static_cast<Lane*>(lanes[i])->given) << i;
    for (void* lane : lanes) static_cast<Lane*>(lane)->got = bits;
  };
  warp_collective("__ballot_sync", perform, &mine, {file, line});
  return mine.got;
}

// Collectives need all 32 lanes here, so that no other mask is of use.
inline unsigned __activemask() { return conv1x1::cuda::emulator::kFullMask; }

inline float __uint_as_float(unsigned bits) { return conv1x1::cuda::emulator::bit_cast<float>(bits); }
inline unsigned __float_as_uint(float value) { return conv1x1::cuda::emulator::bit_cast<unsigned>(value); }
inline float __int_as_float(int bits) { return conv1x1::cuda::emulator::bit_cast<float>(bits); }
inline int __float_as_int(float value) { return conv1x1::cuda::emulator::bit_cast<int>(value); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((static_cast<uint64_t>(a) * b) >> 32); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
// glibc declares a function of this name and does not export it.
#define __expf expf

template <class T>
T __ldg(const T* pointer) {
  return *pointer;
}

// Of a number and a NaN, the number, as CUDA's.
template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>)
    return std::fmin(static_cast<T>(a), static_cast<T>(b));
  else
    return static_cast<T>(b) < static_cast<T>(a) ? static_cast<T>(b) : static_cast<T>(a);
}

template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>)
    return std::fmax(static_cast<T>(a), static_cast<T>(b));
  else
    return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(b) : static_cast<T>(a);
}

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaMemcpyKind { cudaMemcpyDeviceToDevice = 3, cudaMemcpyDefault = 4 };
using cudaStream_t = struct CUstream_st*;

cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();
const char* cudaGetErrorString(cudaError_t error);  // after a failed launch, what failed and where
cudaError_t cudaMemsetAsync(void* pointer, int value, size_t bytes, cudaStream_t stream = nullptr);
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream = nullptr);
cudaError_t cudaGetDevice(int* device);

template <class Function>
cudaError_t cudaFuncSetAttribute(Function* function, cudaFuncAttribute, int value) {
  return conv1x1::cuda::emulator::set_shared_memory(reinterpret_cast<const void*>(function), value);
}
