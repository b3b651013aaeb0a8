// What happens to a tile of accumulators: bias + residual + activation + rounding + store; or, unfinished, partial sums
// for split-K; or sums over the pixels for average pooling. Shared by every GEMM kernel.
//
// The kernel lays kRows rows of accumulators at a time into shared memory, row-major with kPad elements between rows,
// so that stores to global memory are whole lines whatever the registers' layout is.
#pragma once

#include "device.cuh"

namespace conv1x1::cuda {

constexpr int kPad = 8;  // two rows that mma's lanes write at once meet no bank twice

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

// gradient * d activation(x) / dx; where the activation holds the gradient back zero, whatever it is, as in torch.
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

// kChunk neighbours along n, finished and stored. Chunks of more than one know only activations that are a range: the
// others would multiply the code of every kernel by their expf and erff.
template <int kChunk, class T, class Acc>
__device__ __forceinline__ void finish(const Acc* sums, const GemmParams& p, uint32_t group, uint32_t m, uint32_t n) {
  const T* bias = static_cast<const T*>(p.bias);
  const Offsets row = p.d.m.at(m), col = p.d.n.at(n);
  Chunk<T, kChunk> residual;
  if (p.d.residual)
    residual =
        load_chunk<kChunk>(static_cast<const T*>(p.d.residual) + group * p.d.residual_group_stride + row.aux + col.aux);
  Chunk<T, kChunk> out;
#pragma unroll
  for (int j = 0; j < kChunk; ++j) {
    Acc x = sums[j];
    if (bias) {
      const int64_t channel =
          p.bias_along_m ? static_cast<int64_t>(group) * p.m + m : static_cast<int64_t>(group) * p.n + n + j;
      x += widen(bias[channel * p.bias_stride]);
    }
    if (p.d.residual) x += widen(residual.value[j]);
    if constexpr (kChunk == 1)
      x = activate(x, p.activation);
    else
      x = x < Acc(p.lower) ? Acc(p.lower) : x > Acc(p.upper) ? Acc(p.upper) : x;
    out.value[j] = narrow<T>(x);
  }
  T* to = static_cast<T*>(p.d.data) + group * p.d.group_stride + row.data + col.data;
  *reinterpret_cast<Chunk<T, kChunk>*>(to) = out;
}

template <int kChunk, class T, int kRows, int kBlockN, int kThreads, class Acc>
__device__ __forceinline__ void store_rows(const Acc* tile, const GemmParams& p, uint32_t group, uint32_t m0,
                                           uint32_t n0) {
  constexpr int kChunks = kBlockN / kChunk;
#pragma unroll 1
  for (int c = threadIdx.x; c < kRows * kChunks; c += kThreads) {
    const uint32_t row = c / kChunks, col = (c % kChunks) * kChunk, m = m0 + row, n = n0 + col;
    if (m < p.m && n < p.n) finish<kChunk, T>(tile + row * kEpilogueStride<kBlockN> + col, p, group, m, n);
  }
}

// Sums of activation(tile + bias) over the tile's pixels: of one image, as the grid has images of its own.
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

// The kRows rows of pass `pass` of this block's tile, which lie in shared memory; every thread calls. Not inlined: the
// accumulators are in shared memory by now, and so it is compiled once a type and width, not once a kernel.
template <class T, int kBlockM, int kBlockN, int kRows, int kThreads, class Acc>
__device__ __noinline__ void epilogue(const Acc* tile, const GemmParams& p, int pass) {
  const TileIndex t = tile_index(p);  // again, rather than in registers through the mainloop
  const uint32_t m0 = t.tile_m * kBlockM + pass * kRows, n0 = t.tile_n * kBlockN;
  if (p.pooled) {
    pool_rows<T, kRows, kBlockN, kThreads>(tile, p, t, m0, n0,
                                           p.pool_along_n ? t.tile_n : t.tile_m * (kBlockM / kRows) + pass);
  } else if (p.partials) {
    const int64_t group = static_cast<int64_t>(t.slice) * p.groups + t.group;
    for (int c = threadIdx.x; c < kRows * kBlockN; c += kThreads) {
      const uint32_t row = c / kBlockN, col = c % kBlockN, m = m0 + row, n = n0 + col;
      if (m < p.m && n < p.n)
        static_cast<Acc*>(p.partials)[(group * p.m + m) * p.n + n] = tile[row * kEpilogueStride<kBlockN> + col];
    }
  } else if (!p.d.data) {
    return;  // dbias alone is wanted
  } else if (p.d.chunk == 16 / sizeof(T)) {
    store_rows<16 / sizeof(T), T, kRows, kBlockN, kThreads>(tile, p, t.group, m0, n0);
  } else {
    store_rows<1, T, kRows, kBlockN, kThreads>(tile, p, t.group, m0, n0);
  }
}

}  // namespace conv1x1::cuda
