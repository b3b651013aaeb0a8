// What happens to a tile of accumulators in shared memory: bias + residual + activation + rounding + store; or storing
// unfinished partial sums for split-K; or sums over the pixels for average pooling. Kernels for CUDA cores use all of
// it, tensor-core kernels use it where mma_epilogue.cuh does not finish a tile in registers.
//
// The kernel writes kRows rows of accumulators at a time to shared memory, row-major with kPad elements between rows.
// Stores to global memory are then whole lines, whatever the layout of the registers.
#pragma once

#include "device.cuh"
#include "heuristics.h"

namespace conv1x1::cuda {

// The padding keeps two rows that mma's lanes write at once in different banks.
template <int kBlockN>
constexpr int kEpilogueStride = kBlockN + kPad;

template <class Acc, int kRows, int kBlockN>
constexpr int kEpilogueBytes = kRows * kEpilogueStride<kBlockN> * static_cast<int>(sizeof(Acc));

__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }
__device__ __forceinline__ float error_function(float x) { return erff(x); }
__device__ __forceinline__ double error_function(double x) { return erf(x); }

// Comparisons are written so that NaN passes, as in torch.
template <class Acc>
__device__ __forceinline__ Acc activate(Acc x, Activation activation) {
  switch (activation) {
    case Activation::kNone: return x;
    case Activation::kReLU: return x <= Acc(0) ? Acc(0) : x;
    case Activation::kReLU6: return x <= Acc(0) ? Acc(0) : x >= Acc(6) ? Acc(6) : x;
    case Activation::kSiLU: return x / (Acc(1) + exponential(-x));
    case Activation::kHardswish: {
      const Acc shifted = x + Acc(3);
      return x * (shifted <= Acc(0) ? Acc(0) : shifted >= Acc(6) ? Acc(6) : shifted) / Acc(6);
    }
    case Activation::kGELU: return Acc(0.5) * x * (Acc(1) + error_function(x * Acc(0.70710678118654752440)));
  }
  return x;
}

// gradient * d activation(x) / dx. Zero where the activation holds the gradient back, even if the gradient is NaN, as
// in torch.
template <class Acc>
__device__ __forceinline__ Acc activation_gradient(Acc gradient, Acc x, Activation activation) {
  switch (activation) {
    case Activation::kNone: return gradient;
    case Activation::kReLU: return passes(x, Mask::kReLU) ? gradient : Acc(0);
    case Activation::kReLU6: return passes(x, Mask::kReLU6) ? gradient : Acc(0);
    case Activation::kSiLU: {
      const Acc s = Acc(1) / (Acc(1) + exponential(-x));
      return gradient * (s * (Acc(1) + x * (Acc(1) - s)));
    }
    case Activation::kHardswish:
      return x <= Acc(-3) ? Acc(0) : x >= Acc(3) ? gradient : gradient * (x / Acc(3) + Acc(0.5));
    case Activation::kGELU: {
      const Acc density = Acc(0.39894228040143267794) * exponential(Acc(-0.5) * x * x);
      return gradient * (Acc(0.5) * (Acc(1) + error_function(x * Acc(0.70710678118654752440))) + x * density);
    }
  }
  return gradient;
}

// One element of D, finished and stored.
template <class T, class Acc>
__device__ __forceinline__ void finish(Acc sum, const GemmParams& p, uint32_t group, uint32_t m, uint32_t n) {
  const Offsets row = p.d.m.at(m), col = p.d.n.at(n);
  if (p.bias) {
    const int64_t channel =
        p.bias_along_m ? static_cast<int64_t>(group) * p.m + m : static_cast<int64_t>(group) * p.n + n;
    sum += widen(static_cast<const T*>(p.bias)[channel * p.bias_stride]);
  }
  if (p.d.residual)
    sum += widen(static_cast<const T*>(p.d.residual)[group * p.d.residual_group_stride + row.aux + col.aux]);
  static_cast<T*>(p.d.data)[group * p.d.group_stride + row.data + col.data] = narrow<T>(activate(sum, p.activation));
}

// None, ReLU and ReLU6 are a range. The other activations are applied one element at a time, because expf and erff are
// much code.
template <bool kRange, class Acc>
__device__ __forceinline__ Acc finished(Acc x, const GemmParams& p) {
  if constexpr (kRange)
    return x < Acc(p.lower) ? Acc(p.lower) : x > Acc(p.upper) ? Acc(p.upper) : x;
  else
    return activate(x, p.activation);
}

// The tile's rows: sums + bias + residual, activated, rounded, stored, kChunk neighbours along n at a time. A thread
// has the same columns in all of its rows, so what depends on n is computed once.
template <int kChunk, bool kRange, class T, int kRows, int kBlockN, int kThreads, class Acc>
__device__ __forceinline__ void store_rows(const Acc* tile, const GemmParams& p, uint32_t group, uint32_t m0,
                                           uint32_t n0, bool biased) {
  constexpr int kChunks = kBlockN / kChunk, kStep = kThreads / kChunks;
  static_assert(kThreads % kChunks == 0);
  const uint32_t col = threadIdx.x % kChunks * kChunk, n = n0 + col;
  if (n >= p.n) return;
  const Offsets at_n = p.d.n.at(n);
  T* const to = static_cast<T*>(p.d.data) + group * p.d.group_stride + at_n.data;
  const T* const residual =
      p.d.residual ? static_cast<const T*>(p.d.residual) + group * p.d.residual_group_stride + at_n.aux : nullptr;
  const int64_t channel = p.bias_along_m ? static_cast<int64_t>(group) * p.m : static_cast<int64_t>(group) * p.n + n;
  const T* const bias = p.bias && !biased ? static_cast<const T*>(p.bias) + channel * p.bias_stride : nullptr;
  Acc offset[kChunk] = {};
  if (bias && !p.bias_along_m)
#pragma unroll
    for (int j = 0; j < kChunk; ++j) offset[j] = widen(bias[j * p.bias_stride]);
  const uint32_t rows = min(p.m - min(m0, p.m), uint32_t{kRows});
#pragma unroll 2
  for (uint32_t row = threadIdx.x / kChunks; row < rows; row += kStep) {
    const Offsets at_m = p.d.m.at(m0 + row);
    const Acc row_offset = bias && p.bias_along_m ? widen(bias[(m0 + row) * p.bias_stride]) : Acc(0);
    Chunk<T, kChunk> added, out;
    if (residual) added = load_chunk<kChunk>(residual + at_m.aux);
#pragma unroll
    for (int j = 0; j < kChunk; ++j) {
      Acc x = tile[row * kEpilogueStride<kBlockN> + col + j] + (offset[j] + row_offset);
      if (residual) x += widen(added.value[j]);
      out.value[j] = narrow<T>(finished<kRange>(x, p));
    }
    *reinterpret_cast<Chunk<T, kChunk>*>(to + at_m.data) = out;
  }
}

// One slice's sums, to be joined by reduce_partials.
template <int kChunk, int kRows, int kBlockN, int kThreads, class Acc>
__device__ __forceinline__ void store_partials(const Acc* tile, const GemmParams& p, const TileIndex& t, uint32_t m0,
                                               uint32_t n0) {
  constexpr int kChunks = kBlockN / kChunk, kStep = kThreads / kChunks;
  const uint32_t col = threadIdx.x % kChunks * kChunk;
  if (n0 + col >= p.n) return;
  const int64_t group = static_cast<int64_t>(t.slice) * p.groups + t.group;
  Acc* const to = static_cast<Acc*>(p.partials) + (group * p.m + m0) * p.n + n0 + col;
  const uint32_t rows = min(p.m - min(m0, p.m), uint32_t{kRows});
#pragma unroll 2
  for (uint32_t row = threadIdx.x / kChunks; row < rows; row += kStep)
    *reinterpret_cast<Chunk<Acc, kChunk>*>(to + static_cast<int64_t>(row) * p.n) =
        load_chunk<kChunk>(tile + row * kEpilogueStride<kBlockN> + col);
}

// Sums of activation(tile + bias) over the tile's pixels, all of one image, because each image is a GEMM of its own.
template <class T, int kRows, int kBlockN, int kThreads, class Acc>
__device__ __forceinline__ void pool_rows(const Acc* tile, const GemmParams& p, const TileIndex& t, uint32_t m0,
                                          uint32_t n0, uint32_t slot) {
  const T* bias = static_cast<const T*>(p.bias);
  const uint32_t channels = p.pool_along_n ? p.m : p.n;
  const uint32_t rows = min(p.m - min(m0, p.m), uint32_t{kRows}), cols = min(p.n - n0, uint32_t{kBlockN});
  Acc* out = static_cast<Acc*>(p.pooled) + (static_cast<int64_t>(t.image) * p.pool_slots + slot) * p.groups * channels +
             t.group * channels;
  const uint32_t count = p.pool_along_n ? rows : cols, length = p.pool_along_n ? cols : rows;
  for (uint32_t c = threadIdx.x; c < count; c += kThreads) {
    const uint32_t channel = c + (p.pool_along_n ? m0 : n0);
    const Acc offset =
        bias ? widen(bias[(static_cast<int64_t>(t.group) * channels + channel) * p.bias_stride]) : Acc(0);
    Acc sum = 0;
#pragma unroll 1
    for (uint32_t i = 0; i < length; ++i) {
      const Acc x = p.pool_along_n ? tile[c * kEpilogueStride<kBlockN> + i] : tile[i * kEpilogueStride<kBlockN> + c];
      sum += activate(x + offset, p.activation);
    }
    out[channel] = sum;
  }
}

// Pooling, and activations that are not a range. Not inlined: with expf and erff in every kernel, code and compile time
// would be ten times as large. The parameters are __restrict__, so that they are not loaded again after every store.
template <class T, int kBlockM, int kBlockN, int kRows, int kThreads, class Acc>
__device__ __noinline__ void rare_epilogue(const Acc* tile, const GemmParams* __restrict__ params, int pass) {
  const GemmParams& p = *params;
  const TileIndex t = tile_index(p);
  const uint32_t m0 = t.tile_m * kBlockM + pass * kRows, n0 = t.tile_n * kBlockN;
  if (p.pooled)
    pool_rows<T, kRows, kBlockN, kThreads>(tile, p, t, m0, n0,
                                           p.pool_along_n ? t.tile_n : t.tile_m * (kBlockM / kRows) + pass);
  else
    store_rows<1, false, T, kRows, kBlockN, kThreads>(tile, p, t.group, m0, n0, false);
}

// Finishes the kRows rows of pass `pass` of this block's tile, which lie in shared memory. `biased`: they contain the
// bias already. All threads of the block call it.
template <class T, int kBlockM, int kBlockN, int kRows, int kThreads, class Acc>
__device__ __forceinline__ void epilogue(const Acc* tile, const GemmParams& p, const TileIndex& t, int pass,
                                         bool biased) {
  constexpr int kVector = 16 / sizeof(T), kPartials = 16 / sizeof(Acc);
  const uint32_t m0 = t.tile_m * kBlockM + pass * kRows, n0 = t.tile_n * kBlockN;
  if (p.partials) {
    if (p.n % kPartials == 0)
      store_partials<kPartials, kRows, kBlockN, kThreads>(tile, p, t, m0, n0);
    else
      store_partials<1, kRows, kBlockN, kThreads>(tile, p, t, m0, n0);
  } else if (p.rare) {
    rare_epilogue<T, kBlockM, kBlockN, kRows, kThreads>(tile, &p, pass);
  } else if (p.d.data) {  // null: dbias alone is wanted
    if (p.d.chunk == kVector)
      store_rows<kVector, true, T, kRows, kBlockN, kThreads>(tile, p, t.group, m0, n0, biased);
    else
      store_rows<1, true, T, kRows, kBlockN, kThreads>(tile, p, t.group, m0, n0, biased);
  }
}

}  // namespace conv1x1::cuda
