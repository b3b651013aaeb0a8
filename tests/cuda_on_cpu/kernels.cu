// Small kernels for test_cuda_on_cpu_shim.py: what the emulation must compute, and faults that it must report.
#include "../../csrc/cuda/ptx.cuh"

namespace {

using namespace conv1x1::cuda;

constexpr int kTile = 32, kStep = 8;

// c = a * b, row-major, 32x32 tiles by 128 threads. Faults: 1 and 2 leave out one of the barriers.
template <int kFault>
__global__ void __launch_bounds__(128) sgemm(const float* a, const float* b, float* c, int m, int n, int k) {
  __shared__ float tile_a[kStep][kTile], tile_b[kStep][kTile];
  const int m0 = blockIdx.y * kTile, n0 = blockIdx.x * kTile;
  const int row = threadIdx.x / 16 * 4, col = threadIdx.x % 16 * 2;
  float sum[4][2] = {};
  for (int k0 = 0; k0 < k; k0 += kStep) {
    for (int i = threadIdx.x; i < kStep * kTile; i += blockDim.x) {
      const int kk = i / kTile, j = i % kTile;
      tile_a[kk][j] = m0 + j < m && k0 + kk < k ? a[(m0 + j) * k + k0 + kk] : 0.0f;
      tile_b[kk][j] = n0 + j < n && k0 + kk < k ? b[(k0 + kk) * n + n0 + j] : 0.0f;
    }
    if constexpr (kFault != 1) __syncthreads();
    for (int kk = 0; kk < kStep; ++kk)
      for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 2; ++j) sum[i][j] += tile_a[kk][row + i] * tile_b[kk][col + j];
    if constexpr (kFault != 2) __syncthreads();
  }
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 2; ++j)
      if (m0 + row + i < m && n0 + col + j < n) c[(m0 + row + i) * n + n0 + col + j] = sum[i][j];
}

enum CopyFault { kNoFault, kNoWait, kWaitTooWeak, kNoCommit, kNotFinished, kMisaligned, kNotShared };

// Doubles 2 x 128 x 4 floats, copied as two groups; zeros where not valid.
template <int kFault>
__global__ void copies(const float* in, float* out, bool valid) {
  CONV1X1_DYNAMIC_SHARED(memory);
  float* shared = reinterpret_cast<float*>(memory);
  for (int s = 0; s < 2; ++s) {
    const int at = (s * 128 + static_cast<int>(threadIdx.x)) * 4;
    const float* from = kFault == kMisaligned ? in + at + 1 : in + at;
    ptx::cp_async<16>(kFault == kNotShared ? out + at : shared + at, from, valid);
    if (kFault != kNoCommit) ptx::cp_async_commit();
  }
  if (kFault == kNoFault || kFault == kNoCommit) ptx::cp_async_wait<0>();
  if (kFault == kWaitTooWeak || kFault == kNotFinished) ptx::cp_async_wait<1>();
  __syncthreads();
  for (int s = 0; s < (kFault == kNotFinished ? 1 : 2); ++s)
    for (int i = 0; i < 4; ++i) {
      const int at = (s * 128 + 127 - static_cast<int>(threadIdx.x)) * 4 + i;
      out[at] = 2 * shared[at];
    }
  __syncthreads();
  // A copy that is merely never read is a fault of its own.
  if (kFault != kNotFinished) ptx::cp_async_wait<0>();
}

__global__ void divergent_exit(float* out) {
  if (threadIdx.x >= 64) return;
  __syncthreads();
  out[threadIdx.x] = 1;
}

__global__ void divergent_sites(float* out) {
  if (threadIdx.x < 64) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = 1;
}

__global__ void divergent_warp(float* out) {
  if (threadIdx.x % 2) __syncwarp();
  out[threadIdx.x] = 1;
}

__global__ void partial_mask(float* out) { out[threadIdx.x] = __shfl_xor_sync(0xffffu, 1.0f, 1); }

__global__ void store_shared(float* out, int at) {
  CONV1X1_DYNAMIC_SHARED(memory);
  reinterpret_cast<float*>(memory)[at + static_cast<int>(threadIdx.x)] = 1;
  __syncthreads();
  out[threadIdx.x] = reinterpret_cast<float*>(memory)[threadIdx.x];
}

__global__ void store_global(float* out, int at) { out[at + static_cast<int>(threadIdx.x)] = 1; }

// Shared memory that nobody wrote: static, then dynamic.
__global__ void unwritten(float* out) {
  CONV1X1_DYNAMIC_SHARED(memory);
  __shared__ float values[128];
  out[blockIdx.x * 256 + threadIdx.x] = values[threadIdx.x];
  out[blockIdx.x * 256 + 128 + threadIdx.x] = reinterpret_cast<float*>(memory)[threadIdx.x];
  __syncthreads();
  values[threadIdx.x] = reinterpret_cast<float*>(memory)[threadIdx.x] = 1;
}

// One warp: d = c + a * b, of a 16 x k, b k x 8 as `in_b` 8 x k (or k x 8 through .trans), fragments by ldmatrix.
template <class T, bool kTransposed>
__global__ void mma16(const T* in_a, const T* in_b, float* d, int shift) {
  CONV1X1_DYNAMIC_SHARED(memory);
  T* a = reinterpret_cast<T*>(memory + shift);
  T* b = a + 16 * 16;
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = lane; i < 16 * 16; i += 32) a[i] = in_a[i];
  for (int i = lane; i < 16 * 8; i += 32) b[i] = in_b[i];
  __syncwarp();
  uint32_t fa[4], fb[4];
  ptx::ldmatrix_x4(fa, a + lane % 16 * 16 + lane / 16 * 8);
  if constexpr (kTransposed)
    ptx::ldmatrix_x4_trans(fb, b + lane % 16 * 8);  // k x 8
  else
    ptx::ldmatrix_x4(fb, b + lane % 8 * 16 + lane / 8 % 2 * 8);  // 8 x k
  const uint32_t fragment_b[2] = {fb[0], fb[1]};
  float sum[4];
  const int g = lane / 4, t = lane % 4;
  for (int r = 0; r < 4; ++r) sum[r] = d[(g + 8 * (r / 2)) * 8 + 2 * t + r % 2];
  ptx::mma_m16n8k16(sum, fa, fragment_b, T{});
  for (int r = 0; r < 4; ++r) d[(g + 8 * (r / 2)) * 8 + 2 * t + r % 2] = sum[r];
}

__global__ void mma_tf32(const float* a, const float* b, float* d) {
  const int lane = static_cast<int>(threadIdx.x), g = lane / 4, t = lane % 4;
  const uint32_t fa[4] = {__float_as_uint(a[g * 8 + t]), __float_as_uint(a[(g + 8) * 8 + t]),
                          __float_as_uint(a[g * 8 + t + 4]), __float_as_uint(a[(g + 8) * 8 + t + 4])};
  const uint32_t fb[2] = {__float_as_uint(b[t * 8 + g]), __float_as_uint(b[(t + 4) * 8 + g])};
  float sum[4] = {};
  ptx::mma_m16n8k8_tf32(sum, fa, fb);
  for (int r = 0; r < 4; ++r) d[(g + 8 * (r / 2)) * 8 + 2 * t + r % 2] = sum[r];
}

__global__ void shuffles(const int* in, int* out, int width) {
  const int lane = static_cast<int>(threadIdx.x);
  out[lane] = __shfl_sync(0xffffffffu, in[lane], 5, width);
  out[32 + lane] = __shfl_xor_sync(0xffffffffu, in[lane], 6, width);
  out[64 + lane] = __shfl_down_sync(0xffffffffu, in[lane], 3, width);
  out[96 + lane] = __shfl_up_sync(0xffffffffu, in[lane], 3, width);
  out[128 + lane] = static_cast<int>(__ballot_sync(__activemask(), in[lane] % 3 == 0));
}

__global__ void indices(int* out) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  out[block * blockDim.x * blockDim.y * blockDim.z + thread] += static_cast<int>(1000 * block + thread);
}

__global__ void float_to_half(const float* in, __half* half, __nv_bfloat16* bfloat16, uint32_t* tf32, int count) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) {
    half[i] = __float2half_rn(in[i]);
    bfloat16[i] = __float2bfloat16_rn(in[i]);
    tf32[i] = ptx::round_to_tf32(__float_as_uint(in[i]));
  }
}

__global__ void half_to_float(float* half, float* bfloat16) {
  for (unsigned i = threadIdx.x; i < 65536; i += blockDim.x) {
    half[i] = __half2float(__ushort_as_half(static_cast<unsigned short>(i)));
    bfloat16[i] = __bfloat162float(__ushort_as_bfloat16(static_cast<unsigned short>(i)));
  }
}

template <int kFault>
void run_copies(const float* in, float* out, int valid) {
  CONV1X1_LAUNCH((copies<kFault>), 1, 128, 2 * 128 * 16, nullptr, in, out, valid != 0);
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void configure(int64_t seed, int os_threads, int shared_memory_limit) {
  emulator::settings() = {static_cast<uint64_t>(seed), os_threads, shared_memory_limit};
}

EXPORT const char* last_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

EXPORT void run_sgemm(int fault, const float* a, const float* b, float* c, int m, int n, int k) {
  const auto kernel = fault == 0 ? sgemm<0> : fault == 1 ? sgemm<1> : sgemm<2>;
  const dim3 grid(static_cast<unsigned>((n + kTile - 1) / kTile), static_cast<unsigned>((m + kTile - 1) / kTile));
  CONV1X1_LAUNCH(kernel, grid, 128, 0, nullptr, a, b, c, m, n, k);
}

EXPORT void run_copies(int fault, const float* in, float* out, int valid) {
  constexpr void (*run[])(const float*, float*, int) = {
      run_copies<kNoFault>,     run_copies<kNoWait>,     run_copies<kWaitTooWeak>, run_copies<kNoCommit>,
      run_copies<kNotFinished>, run_copies<kMisaligned>, run_copies<kNotShared>};
  run[fault](in, out, valid);
}

EXPORT void run_divergent_exit(float* out) { CONV1X1_LAUNCH(divergent_exit, 1, 128, 0, nullptr, out); }
EXPORT void run_divergent_sites(float* out) { CONV1X1_LAUNCH(divergent_sites, 1, 128, 0, nullptr, out); }
EXPORT void run_divergent_warp(float* out) { CONV1X1_LAUNCH(divergent_warp, 1, 64, 0, nullptr, out); }
EXPORT void run_partial_mask(float* out) { CONV1X1_LAUNCH(partial_mask, 1, 32, 0, nullptr, out); }
EXPORT void run_partial_warp(int* out) { CONV1X1_LAUNCH(shuffles, 1, 48, 0, nullptr, out, out, 32); }
EXPORT void run_store_shared(float* out, int at) { CONV1X1_LAUNCH(store_shared, 1, 32, 128, nullptr, out, at); }
EXPORT void run_store_global(float* out, int at) { CONV1X1_LAUNCH(store_global, 1, 32, 0, nullptr, out, at); }
EXPORT void run_unwritten(float* out, int blocks) {
  CONV1X1_LAUNCH(unwritten, static_cast<unsigned>(blocks), 128, 512, nullptr, out);
}

EXPORT void run_mma_half(const __half* a, const __half* b, float* d, int transposed, int shift) {
  const auto kernel = transposed ? mma16<__half, true> : mma16<__half, false>;
  CONV1X1_LAUNCH(kernel, 1, 32, 1024, nullptr, a, b, d, shift);
}
EXPORT void run_mma_bfloat16(const __nv_bfloat16* a, const __nv_bfloat16* b, float* d, int transposed, int shift) {
  const auto kernel = transposed ? mma16<__nv_bfloat16, true> : mma16<__nv_bfloat16, false>;
  CONV1X1_LAUNCH(kernel, 1, 32, 1024, nullptr, a, b, d, shift);
}
EXPORT void run_mma_tf32(const float* a, const float* b, float* d) {
  CONV1X1_LAUNCH(mma_tf32, 1, 32, 0, nullptr, a, b, d);
}

EXPORT void run_shuffles(const int* in, int* out, int width) {
  CONV1X1_LAUNCH(shuffles, 1, 32, 0, nullptr, in, out, width);
}
EXPORT void run_indices(int* out) { CONV1X1_LAUNCH(indices, dim3(3, 2, 2), dim3(4, 3, 2), 0, nullptr, out); }
EXPORT void run_float_to_half(const float* in, __half* half, __nv_bfloat16* bfloat16, uint32_t* tf32, int count) {
  CONV1X1_LAUNCH(float_to_half, 1, 64, 0, nullptr, in, half, bfloat16, tf32, count);
}
EXPORT void run_half_to_float(float* half, float* bfloat16) {
  CONV1X1_LAUNCH(half_to_float, 1, 64, 0, nullptr, half, bfloat16);
}

EXPORT int opt_in(int bytes) {
  return cudaFuncSetAttribute(store_shared, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}
EXPORT void run_with_shared(float* out, int64_t bytes, int threads) {
  CONV1X1_LAUNCH(store_shared, 1, static_cast<unsigned>(threads), static_cast<size_t>(bytes), nullptr, out, 0);
}
EXPORT double numbers(int which) {
  switch (which) {
    case 0: return min(-1, 2);
    case 1: return max(3ll, 2);
    case 2: return min(1.0f, __uint_as_float(0x7fc00000u));
    case 3: return __umulhi(0x80000000u, 6u);
    case 4: return rsqrtf(0.25f);
    case 5: return __expf(0.0f);
    default: return erff(0.0f);
  }
}
