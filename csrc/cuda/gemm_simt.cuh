// GEMM on CUDA cores: float32 in full IEEE precision and float64; and 16-bit types, converted to float32, where a GPU
// has no mma.sync for them. Any compute capability.
//
// A block computes kBlockM x kBlockN of D with 256 threads. Tiles of A and B travel global -> registers -> shared
// memory, the next ones while this one is multiplied; the mask of a gradient and the conversion happen on the way.
// Shared memory is double buffered, k-major: row k holds kBlockM (or kBlockN) elements of one k.
#pragma once

#include "epilogue.cuh"
#include "heuristics.h"

namespace conv1x1::cuda {

template <class T_, int kBlock_, int kBlockK_>
struct SimtConfig {
  using T = T_;
  using Acc = typename Accumulator<T>::type;
  static constexpr int kBlock = kBlock_, kBlockK = kBlockK_, kThreads = kSimtThreads;  // square tiles
  static constexpr int kPerThread = kBlock / 16;                                       // rows and columns
  static constexpr int kLoads = 4;            // elements of A, and of B, a thread loads
  static constexpr int kStride = kBlock + 4;  // the padding keeps transposing stores in different banks
  static constexpr int kMainloopBytes = 4 * kBlockK * kStride * static_cast<int>(sizeof(Acc));
  static constexpr int kRows = kSimtRows;
  static constexpr int kBlocks = sizeof(Acc) == 8 ? 1 : 2;  // that a multiprocessor should hold: bounds the registers
  static constexpr int kTileBytes = kEpilogueBytes<Acc, kRows, kBlock>;
  static constexpr int kSharedBytes = kMainloopBytes > kTileBytes ? kMainloopBytes : kTileBytes;
  static_assert(kBlock * kBlockK == kLoads * kThreads && (kPerThread == 4 || kPerThread == 8));
  // Rows of a thread: four neighbours, and four more kHalf further, so that a warp's reads are whole vectors.
  static constexpr int kHalf = 64;
};

// Four elements of one operand a thread: along k where that is contiguous in memory, else along m or n.
template <class C>
struct SimtLoader {
  using T = typename C::T;
  using Acc = typename C::Acc;
  const Operand& operand;
  const T* data;
  const T* aux;
  const int k, mn;  // of the first element, in the tile
  const uint32_t mn0;
  Offsets along_mn;
  Acc value[C::kLoads];

  __device__ __forceinline__ SimtLoader(const Operand& o, const TileIndex& t, uint32_t first)
      : operand(o),
        data(static_cast<const T*>(o.data) + t.group * o.group_stride + t.image * o.image_stride),
        aux(o.aux ? static_cast<const T*>(o.aux) + t.group * o.aux_group_stride : nullptr),
        k(o.k_unit ? threadIdx.x % (C::kBlockK / 4) * 4 : threadIdx.x / (C::kBlock / 4)),
        mn(o.k_unit ? threadIdx.x / (C::kBlockK / 4) : threadIdx.x % (C::kBlock / 4) * 4),
        mn0(first + mn),
        along_mn(o.mn.at(min(mn0, o.mn_count))) {}

  __device__ __forceinline__ void fetch(uint32_t k0, uint32_t k_end, Mask mask) {
    const uint32_t at_k = k0 + k;
    const uint32_t count = operand.k_unit ? k_end : operand.mn_count, index = operand.k_unit ? at_k : mn0;
    const bool inside = operand.k_unit ? mn0 < operand.mn_count : at_k < k_end;
    if (inside && operand.chunk_log2 == 2 && index + C::kLoads <= count) {
      const Offsets along_k = operand.k.at(at_k);
      const auto x = load_chunk<C::kLoads>(data + along_mn.data + along_k.data);
#pragma unroll
      for (int j = 0; j < C::kLoads; ++j) value[j] = widen(x.value[j]);
      if (aux) {
        const auto y = load_chunk<C::kLoads>(aux + along_mn.aux + along_k.aux);
#pragma unroll
        for (int j = 0; j < C::kLoads; ++j) value[j] = passes(Acc(widen(y.value[j])), mask) ? value[j] : Acc(0);
      }
      return;
    }
    const Offsets fixed = !inside ? Offsets{0, 0} : operand.k_unit ? along_mn : operand.k.at(at_k);
#pragma unroll
    for (int j = 0; j < C::kLoads; ++j) {
      value[j] = Acc(0);
      if (!inside || index + j >= count) continue;
      const Offsets moving = operand.k_unit ? operand.k.at(index + j) : operand.mn.at(index + j);
      if (!aux || passes(Acc(widen(aux[fixed.aux + moving.aux])), mask))
        value[j] = widen(data[fixed.data + moving.data]);
    }
  }

  __device__ __forceinline__ void put(Acc* tile) const {
    const int step = operand.k_unit ? C::kStride : 1;
#pragma unroll
    for (int j = 0; j < C::kLoads; ++j) tile[k * C::kStride + mn + j * step] = value[j];
  }
};

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kBlocks) gemm_simt(const __grid_constant__ GemmParams p) {
  using Acc = typename C::Acc;
  constexpr int kTile = C::kBlockK * C::kStride, kPerThread = C::kPerThread;
  CONV1X1_DYNAMIC_SHARED(shared);
  Acc* const tiles = reinterpret_cast<Acc*>(shared);  // A and B, twice

  const TileIndex t = tile_index(p);
  const uint32_t m0 = t.tile_m * C::kBlock, n0 = t.tile_n * C::kBlock;
  const uint32_t k_begin = t.slice * p.slice, k_end = min(p.k - min(k_begin, p.k), p.slice) + k_begin;
  // A warp covers 32 x 64 (8 per thread) or 16 x 32 (4 per thread) of the tile: 4 threads down, 8 across.
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row0 = (warp / 2 * 4 + lane / 8) * 4, col0 = (warp % 2 * 8 + lane % 8) * 4;
  const bool sums_rows = p.row_sums && t.tile_n == 0 && col0 == 0;

  SimtLoader<C> load_a(p.a, t, m0), load_b(p.b, t, n0);
  Acc sums[kPerThread][kPerThread] = {};
  Acc row_sums[kPerThread] = {};

  const auto multiply = [&](int from) {
    const Acc *tile_a = tiles + from * 2 * kTile, *tile_b = tile_a + kTile;
#pragma unroll
    for (int kk = 0; kk < C::kBlockK; ++kk) {
      Acc a[kPerThread], b[kPerThread];
#pragma unroll
      for (int h = 0; h < kPerThread; h += 4)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          a[h + i] = tile_a[kk * C::kStride + h / 4 * C::kHalf + row0 + i];
          b[h + i] = tile_b[kk * C::kStride + h / 4 * C::kHalf + col0 + i];
        }
#pragma unroll
      for (int i = 0; i < kPerThread; ++i)
#pragma unroll
        for (int j = 0; j < kPerThread; ++j) sums[i][j] += a[i] * b[j];
      if (sums_rows)
#pragma unroll
        for (int i = 0; i < kPerThread; ++i) row_sums[i] += a[i];
    }
  };

  int buffer = 1;
  // The first round only loads.
  const int steps = static_cast<int>((k_end - k_begin + C::kBlockK - 1) / C::kBlockK);
  for (int step = -1; step < steps; ++step) {
    const bool more = step + 1 < steps;
    if (more) {
      load_a.fetch(k_begin + (step + 1) * C::kBlockK, k_end, p.mask);
      load_b.fetch(k_begin + (step + 1) * C::kBlockK, k_end, p.mask);
    }
    if (step >= 0) multiply(buffer);
    if (more) {  // into the buffer that was read before the last barrier
      buffer ^= 1;
      load_a.put(tiles + buffer * 2 * kTile);
      load_b.put(tiles + buffer * 2 * kTile + kTile);
      __syncthreads();
    }
  }
  if (sums_rows)
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const uint32_t m = m0 + i / 4 * C::kHalf + row0 + i % 4;
      if (m < p.m)
        static_cast<Acc*>(p.row_sums)[(static_cast<int64_t>(t.slice) * p.groups + t.group) * p.m + m] = row_sums[i];
    }

  // Worked out again, rather than in registers through the main loop.
  const TileIndex again = tile_index(p, ptx::block_index());
#pragma unroll
  for (int pass = 0; pass < C::kBlock / C::kRows; ++pass) {
    __syncthreads();  // the buffers, or the pass before, are read
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < kPerThread; ++j)
        tiles[(row0 + i) * kEpilogueStride<C::kBlock> + j / 4 * C::kHalf + col0 + j % 4] = sums[pass * 4 + i][j];
    __syncthreads();
    epilogue<typename C::T, C::kBlock, C::kBlock, C::kRows, C::kThreads>(tiles, p, again, pass, false);
  }
}

}  // namespace conv1x1::cuda
