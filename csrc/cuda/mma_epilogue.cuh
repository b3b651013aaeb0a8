// From the tensor cores' accumulators to D. The sums start from the bias. None, ReLU, ReLU6 and the rounding are
// applied in registers. The rounded tile passes shared memory once, so that stores are whole lines in any layout.
// Partial sums go straight to memory. Tiles with a residual, pooling or another activation use epilogue.cuh.
#pragma once

#include "epilogue.cuh"

namespace conv1x1::cuda {

// Where a lane's accumulators lie: sums[i][j][2 h + c] is row i * 16 + h * 8 and column j * 8 + c from the first.
template <class C>
struct FragmentPlace {
  static constexpr int kFragmentsM = C::kWarpM / 16, kFragmentsN = C::kWarpN / 8;
  uint32_t m0, n0;  // of the block
  int row, col;     // of the first, in the block

  __device__ __forceinline__ FragmentPlace(uint32_t block_m, uint32_t block_n, int warp_m, int warp_n, int lane)
      : m0(block_m), n0(block_n), row(warp_m + lane / 4), col(warp_n + lane % 4 * 2) {}
};

template <class C>
using Sums = float[C::kWarpM / 16][C::kWarpN / 8][4];

// Sets the sums to the bias, or to zero where another function will add it.
template <class C>
__device__ __forceinline__ void start_sums(Sums<C>& sums, const GemmParams& p, const TileIndex& t,
                                           const FragmentPlace<C>& place) {
  using Place = FragmentPlace<C>;
  const auto* const bias = static_cast<const typename C::T*>(p.bias);
  const bool starts = bias && !p.partials && !p.rare, along_m = p.bias_along_m;
  const int64_t group = static_cast<int64_t>(t.group) * (along_m ? p.m : p.n);
  const auto at = [&](uint32_t channel, uint32_t count) {
    return starts && channel < count ? widen(bias[(group + channel) * p.bias_stride]) : 0.0f;
  };
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    if (along_m) {
#pragma unroll
      for (int i = 0; i < Place::kFragmentsM; ++i) {
        const float value = at(place.m0 + place.row + i * 16 + h * 8, p.m);
#pragma unroll
        for (int j = 0; j < Place::kFragmentsN; ++j) sums[i][j][2 * h] = sums[i][j][2 * h + 1] = value;
      }
    } else {
#pragma unroll
      for (int j = 0; j < Place::kFragmentsN; ++j) {
        const float value = at(place.n0 + place.col + j * 8 + h, p.n);
#pragma unroll
        for (int i = 0; i < Place::kFragmentsM; ++i) sums[i][j][h] = sums[i][j][2 + h] = value;
      }
    }
  }
}

// Stores the sums of one slice of k. Four lanes write 32 consecutive bytes.
template <class C>
__device__ __forceinline__ void store_partial_sums(const Sums<C>& sums, const GemmParams& p, const TileIndex& t,
                                                   const FragmentPlace<C>& place) {
  using Place = FragmentPlace<C>;
  const uint32_t n = place.n0 + place.col;
  const int64_t group = static_cast<int64_t>(t.slice) * p.groups + t.group;
  const bool pairs = p.n % 2 == 0;
#pragma unroll
  for (int i = 0; i < Place::kFragmentsM; ++i)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint32_t m = place.m0 + place.row + i * 16 + h * 8;
      if (m >= p.m) continue;
      float* const to = static_cast<float*>(p.partials) + (group * p.m + m) * p.n + n;
#pragma unroll
      for (int j = 0; j < Place::kFragmentsN; ++j) {
        const float x = sums[i][j][2 * h], y = sums[i][j][2 * h + 1];
        if (pairs) {
          if (n + j * 8 < p.n) *reinterpret_cast<float2*>(to + j * 8) = make_float2(x, y);
        } else {
          if (n + j * 8 < p.n) to[j * 8] = x;
          if (n + j * 8 + 1 < p.n) to[j * 8 + 1] = y;
        }
      }
    }
}

// Copies a finished tile from shared memory to D.
template <int kChunk, class T, int kBlockM, int kBlockN, int kThreads>
__device__ __forceinline__ void copy_tile(const T* tile, const GemmParams& p, const TileIndex& t, uint32_t m0,
                                          uint32_t n0) {
  constexpr int kChunks = kBlockN / kChunk, kStep = kThreads / kChunks;
  static_assert(kStep * kChunks == kThreads);
  const uint32_t col = threadIdx.x % kChunks * kChunk, n = n0 + col;
  if (n >= p.n) return;
  T* const to = static_cast<T*>(p.d.data) + t.group * p.d.group_stride + p.d.n.at(n).data;
  const uint32_t rows = min(p.m - min(m0, p.m), uint32_t{kBlockM});
#pragma unroll 4
  for (uint32_t row = threadIdx.x / kChunks; row < rows; row += kStep)
    *reinterpret_cast<Chunk<T, kChunk>*>(to + p.d.m.at(m0 + row).data) =
        load_chunk<kChunk>(tile + row * kEpilogueStride<kBlockN> + col);
}

// Finishes a tile with a range activation and without a residual.
template <class C>
__device__ __forceinline__ void store_finished(const Sums<C>& sums, const GemmParams& p, const TileIndex& t,
                                               const FragmentPlace<C>& place, unsigned char* shared) {
  using T = typename C::T;
  using Place = FragmentPlace<C>;
  constexpr int kVector = 16 / sizeof(T), kStride = kEpilogueStride<C::kBlockN>;
  T* const tile = reinterpret_cast<T*>(shared);
  T* const to = tile + place.row * kStride + place.col;
#pragma unroll
  for (int i = 0; i < Place::kFragmentsM; ++i)
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int j = 0; j < Place::kFragmentsN; ++j) {
        const float x = ptx::in_range(sums[i][j][2 * h], p.lower, p.upper);
        const float y = ptx::in_range(sums[i][j][2 * h + 1], p.lower, p.upper);
        T* const at = to + (i * 16 + h * 8) * kStride + j * 8;
        if constexpr (sizeof(T) == 4)
          *reinterpret_cast<float2*>(at) = make_float2(x, y);
        else
          *reinterpret_cast<uint32_t*>(at) = ptx::pack(x, y, T());
      }
  __syncthreads();
  if (p.d.chunk == kVector)
    copy_tile<kVector, T, C::kBlockM, C::kBlockN, C::kThreads>(tile, p, t, place.m0, place.n0);
  else if (kVector > 4 && p.d.chunk == 4)
    copy_tile<4, T, C::kBlockM, C::kBlockN, C::kThreads>(tile, p, t, place.m0, place.n0);
  else
    copy_tile<1, T, C::kBlockM, C::kBlockN, C::kThreads>(tile, p, t, place.m0, place.n0);
}

// The whole epilogue. All threads of the block call it, after the stages were last read and filled.
template <class C>
__device__ __forceinline__ void finish_sums(const Sums<C>& sums, const GemmParams& p, const TileIndex& t,
                                            const FragmentPlace<C>& place, unsigned char* shared) {
  using Place = FragmentPlace<C>;
  if (p.partials) return store_partial_sums<C>(sums, p, t, place);
  if (!p.rare && !p.d.residual) {
    if (p.d.data) store_finished<C>(sums, p, t, place, shared);  // null: dbias alone is wanted
    return;
  }
  float* const tile = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int i = 0; i < Place::kFragmentsM; ++i)
#pragma unroll
    for (int j = 0; j < Place::kFragmentsN; ++j)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        *reinterpret_cast<float2*>(tile + (place.row + i * 16 + h * 8) * kEpilogueStride<C::kBlockN> + place.col +
                                   j * 8) = make_float2(sums[i][j][2 * h], sums[i][j][2 * h + 1]);
  __syncthreads();
  epilogue<typename C::T, C::kBlockM, C::kBlockN, C::kBlockM, C::kThreads>(tile, p, t, 0, !p.rare);
}

}  // namespace conv1x1::cuda
