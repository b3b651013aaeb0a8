// What every kernel uses: axes and operands on the device, conversions, masks, tile indices, and two macros that launch
// kernels and declare dynamic shared memory (tests/cuda_on_cpu/ defines its own).
#pragma once

#include "launch.h"
#include "ptx.cuh"

#ifndef CONV1X1_CUDA_ON_CPU
#define CONV1X1_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<grid, block, shared_bytes, stream>>>(__VA_ARGS__)
#define CONV1X1_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#endif

namespace conv1x1::cuda {

// n / divisor for n < 2^31 by one multiplication: the multiplier is 2^(31 + log2 divisor) / divisor, rounded up.
// (Granlund, Montgomery: Division by Invariant Integers using Multiplication, 1994.)
struct FastDivmod {
  uint32_t divisor = 1, multiplier = 0, shift = 0;

  FastDivmod() = default;
  explicit FastDivmod(uint32_t d) : divisor(d) {
    if (d <= 1) return;
    uint32_t log2 = 0;
    while ((uint64_t{1} << log2) < d) ++log2;
    multiplier = static_cast<uint32_t>(((uint64_t{1} << (31 + log2)) + d - 1) / d);
    shift = log2 - 1;
  }
  __device__ __forceinline__ uint32_t quotient(uint32_t n) const {
    return divisor == 1 ? n : __umulhi(n, multiplier) >> shift;
  }
  __device__ __forceinline__ uint32_t remainder(uint32_t n) const { return n - quotient(n) * divisor; }
};

struct Offsets {  // in elements: of the tensor itself, and of the one beside it (mask or residual)
  int64_t data, aux;
};

// gemm.h's Axis, innermost dimension first.
struct DeviceAxis {
  int nd = 1;
  FastDivmod size[3];  // of all but the outermost dimension
  int64_t stride[4] = {0, 0, 0, 0}, aux_stride[4] = {0, 0, 0, 0};

  // Most axes are linear. The loop for the others is not unrolled, because every loader contains it several times.
  __device__ __forceinline__ Offsets at(uint32_t index) const {
    Offsets o{0, 0};
    int d = 0;
#pragma unroll 1
    for (; d + 1 < nd; ++d) {
      const uint32_t outer = size[d].quotient(index), i = index - outer * size[d].divisor;
      o.data += static_cast<int64_t>(i) * stride[d];
      o.aux += static_cast<int64_t>(i) * aux_stride[d];
      index = outer;
    }
    o.data += static_cast<int64_t>(index) * stride[d];
    o.aux += static_cast<int64_t>(index) * aux_stride[d];
    return o;
  }
};

// A or B: `mn` is the index of D that it has (m of A, n of B).
struct Operand {
  const void* data = nullptr;
  const void* aux = nullptr;  // the saved output that masks it
  DeviceAxis mn, k;
  uint32_t mn_count = 0;
  // 2^chunk_log2 elements may be copied at once along the tile's contiguous index. Tensor-core kernels: the index's
  // count is a multiple of it, so that a chunk exists or does not.
  int chunk_log2 = 0;
  bool k_unit = false;   // that index is k
  bool streams = false;  // linear along k, and in whole vectors if k is contiguous: pointers only advance
  int64_t group_stride = 0, aux_group_stride = 0, image_stride = 0;
};

struct Output {
  void* data = nullptr;
  const void* residual = nullptr;
  DeviceAxis m, n;
  int chunk = 1;  // elements that may be written at once along n
  int64_t group_stride = 0, residual_group_stride = 0;
};

struct GemmParams {
  Operand a, b;
  Output d;
  uint32_t m = 0, n = 0, k = 0;
  uint32_t groups = 1, images = 1;  // images > 1 only where each is a GEMM of its own (average pooling)
  uint32_t tiles_m = 1, tiles_n = 1;
  // Order of the tiles: the index with fewer tiles is the fastest, so that L2 serves the other operand.
  bool m_fastest = false;
  FastDivmod inner_tiles, outer_tiles, per_group, per_image;  // divide a block's number, from the innermost index on
  uint32_t slices = 1, slice = 0;
  Mask mask = Mask::kNone;
  Activation activation = Activation::kNone;
  float lower = 0, upper = 0;  // none, ReLU and ReLU6 as a range
  bool rare = false;           // pooling, or an activation that is no range: rare_epilogue()
  const void* bias = nullptr;
  int64_t bias_stride = 0;
  bool bias_along_m = false;
  // Of the accumulator's type, in the workspace, where not null:
  void* partials = nullptr;  // (slices, groups, m, n): split-K
  void* row_sums = nullptr;  // (slices, groups, m): sums of A's rows, for dbias
  void* pooled = nullptr;    // (images, pool_slots, groups * channels): sums over a tile's pixels
  bool pool_along_n = false;
  uint32_t pool_slots = 0;
};

struct TileIndex {
  uint32_t tile_m, tile_n, group, image, slice;
};

__device__ __forceinline__ TileIndex tile_index(const GemmParams& p, uint32_t block) {
  const auto take = [](uint32_t& id, const FastDivmod& by) {
    const uint32_t rest = by.remainder(id);
    id = by.quotient(id);
    return rest;
  };
  uint32_t id = block;
  const uint32_t inner = take(id, p.inner_tiles), outer = take(id, p.outer_tiles);
  TileIndex t;
  t.tile_m = p.m_fastest ? inner : outer;
  t.tile_n = p.m_fastest ? outer : inner;
  t.group = take(id, p.per_group);
  t.image = take(id, p.per_image);
  t.slice = id;
  return t;
}

__device__ __forceinline__ TileIndex tile_index(const GemmParams& p) { return tile_index(p, blockIdx.x); }

// Storage type -> accumulator type.
template <class T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T, class Acc>
__device__ __forceinline__ T narrow(Acc x) {
  return static_cast<T>(x);
}
template <>
__device__ __forceinline__ __half narrow<__half, float>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16, float>(float x) {
  return __float2bfloat16_rn(x);
}

// A NaN output passes the gradient, as in torch.
template <class Acc>
__device__ __forceinline__ bool passes(Acc y, Mask mask) {
  return mask == Mask::kNone || (!(y <= Acc(0)) && (mask == Mask::kReLU || !(y >= Acc(6))));
}

// kCount elements that one access moves. The type's alignment is the width of the access.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount > 16 ? 16 : sizeof(T) * kCount) Chunk {
  T value[kCount];
};

template <int kCount, class T>
__device__ __forceinline__ Chunk<T, kCount> load_chunk(const T* from) {
  return *reinterpret_cast<const Chunk<T, kCount>*>(from);
}

}  // namespace conv1x1::cuda
