// GEMM on tensor cores for float16, bfloat16 and float32 as TF32: mma.sync, fed by ldmatrix from swizzled shared
// memory, filled by cp.async a few stages ahead. For sm_80 and later. float32 accumulation.
//
// A block computes kBlockM x kBlockN of D, a warp kWarpM x kWarpN of it. Per stage of 64 bytes along k, a warp takes
// two steps of 32 bytes: k = 16 for 16-bit types, 8 for TF32. The mask of a gradient is applied to the fragments
// between shared memory and mma, from a tile of the saved output beside the operand's; dbias is summed from the same
// fragments.
#pragma once

#include <type_traits>

#include "heuristics.h"
#include "mma_epilogue.cuh"
#include "tile_loader.cuh"

namespace conv1x1::cuda {

// Shared memory of a multiprocessor of the architecture that is compiled for. Data-center chips have 164 KiB or more.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
constexpr int kSharedPerMultiprocessor = 100 * 1024;
#else
constexpr int kSharedPerMultiprocessor = 160 * 1024;
#endif

template <class T_, int kKind, int kTile>
struct MmaConfig {
  using T = T_;
  static constexpr MmaKind kOf = kMmaKinds[kKind];
  static constexpr Tile kShape = kMmaTiles[kTile];
  static constexpr int kBlockM = kShape.m, kBlockN = kShape.n, kWarpM = kShape.warp_m, kWarpN = kShape.warp_n;
  static constexpr Major kMajorA = kOf.a, kMajorB = kOf.b;
  static constexpr Masked kMasked = kOf.masked;
  static constexpr bool kRowSums = kOf.row_sums;  // wgrad: sums of A's rows, and a mask of A that may be absent
  static constexpr int kWarpsN = kBlockN / kWarpN;
  static constexpr int kThreads = mma_threads(kShape);
  static constexpr int kBlockK = kBlockKBytes / sizeof(T), kStages = mma_stages(kOf);
  static constexpr int kStageBytes = mma_stage_bytes(kOf, kShape), kSharedBytes = mma_shared_bytes(kOf, kShape);
  // With the fragments of a mask, two steps at once would need too many registers.
  static constexpr int kUnroll = kMasked == Masked::kNone ? 2 : 1;
  // Blocks that a multiprocessor should hold: 512 threads, or as many blocks as its shared memory has room for.
  static constexpr int kRoom =
      kSharedPerMultiprocessor / kSharedBytes > 1 ? kSharedPerMultiprocessor / kSharedBytes : 1;
  static constexpr int kBlocks = 512 / kThreads < kRoom ? 512 / kThreads : kRoom;
};

// The upper limit of a mask as the bits of a fragment register: 6 for ReLU6; NaN for ReLU, since no value is >= NaN.
template <class T>
__device__ __forceinline__ uint32_t upper_of(Mask mask) {
  const float value = mask == Mask::kReLU6 ? 6.0f : __uint_as_float(0x7fffffffu);
  if constexpr (sizeof(T) == 4)
    return __float_as_uint(value);
  else
    return ptx::pack(value, value, T());
}

// dy where the saved output y lets it pass, else zero. A NaN in y lets it pass.
template <class T>
__device__ __forceinline__ uint32_t masked(uint32_t dy, uint32_t y, uint32_t upper) {
  if constexpr (sizeof(T) == 4) {
    const float value = __uint_as_float(y);
    return !(value <= 0.0f) && !(value >= __uint_as_float(upper)) ? dy : 0u;
  } else {
    return dy & ptx::passing(y, upper, T());
  }
}

template <class T>
__device__ __forceinline__ float sum_of(uint32_t bits) {
  if constexpr (sizeof(T) == 4) {
    return __uint_as_float(bits);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __uint_as_float(bits << 16) + __uint_as_float(bits & 0xffff0000u);
  } else {
    T pair[2];
    memcpy(pair, &bits, 4);
    return widen(pair[0]) + widen(pair[1]);
  }
}

// Loads a lane's part of a warp's fragments from a tile of kBlock indices of m or n. The place of the first fragment
// and step is computed once. All others differ by constants, because the swizzle is an exclusive or with bits that are
// zero in the first place.
template <class T, Major kMajor, int kBlock, bool kIsA>
class FragmentReader {
  using Layout = TileLayout<T, kMajor, kBlock>;
  static constexpr int kRowBytes = kBlock * static_cast<int>(sizeof(T));  // of a kMN tile

 public:
  __device__ __forceinline__ FragmentReader(int first, int lane) : at_(offset_of(first, lane)) { ptx::opaque(at_); }

  // Fragment `i`, 16 indices of m or n each, of `step`, 32 bytes of k each. A: mma's four registers. B: the first two
  // are those of the first eight columns, the others those of the other eight.
  __device__ __forceinline__ void load(uint32_t (&r)[4], const unsigned char* tile, int i, int step) const {
    if constexpr (kMajor == Major::kK) {
      ptx::ldmatrix_x4(r, tile + (at_ ^ step * 32) + i * 16 * kBlockKBytes);
    } else if constexpr (sizeof(T) == 2) {
      ptx::ldmatrix_x4_trans(r, tile + (at_ ^ i * 32) + step * 16 * kRowBytes);
    } else {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int other_eight = kIsA ? e & 1 : e >> 1, other_k = kIsA ? e >> 1 : e & 1;
        r[e] = *reinterpret_cast<const uint32_t*>(tile + (at_ ^ (i * 64 + other_eight * 32)) +
                                                  (step * 8 + other_k * 4) * kRowBytes);
      }
    }
  }

 private:
  static __device__ __forceinline__ int offset_of(int first, int lane) {
    if constexpr (kMajor == Major::kK)
      return kIsA ? Layout::offset(first + lane % 16, lane / 16)
                  : Layout::offset(first + lane / 16 * 8 + lane % 8, lane / 8 % 2);
    else if constexpr (sizeof(T) == 2)
      return kIsA ? Layout::offset(lane / 16 * 8 + lane % 8, first / 8 + lane / 8 % 2)
                  : Layout::offset(lane / 8 % 2 * 8 + lane % 8, first / 8 + lane / 16);
    else
      return Layout::offset(lane % 4, (first + lane / 4) / 4) + lane / 4 % 4 * 4;
  }

  int at_;
};

template <class T>
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t b[2] = {b0, b1};
  if constexpr (std::is_same_v<T, float>)
    ptx::mma_m16n8k8_tf32(d, a, b);
  else
    ptx::mma_m16n8k16(d, a, b, T());
}

template <int kCount>
__device__ __forceinline__ void round_to_tf32(uint32_t (&fragment)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) fragment[i] = ptx::round_to_tf32(fragment[i]);
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kBlocks) gemm_mma(const __grid_constant__ GemmParams p) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800  // plans never choose it below
  using T = typename C::T;
  constexpr int kFragmentsM = C::kWarpM / 16, kPairsN = C::kWarpN / 16;
  constexpr int kOffsetB = C::kBlockM * kBlockKBytes, kOffsetAux = kOffsetB + C::kBlockN * kBlockKBytes;
  CONV1X1_DYNAMIC_SHARED(shared);

  const TileIndex t = tile_index(p);
  const uint32_t m0 = t.tile_m * C::kBlockM, n0 = t.tile_n * C::kBlockN;
  const uint32_t k_begin = t.slice * p.slice, k_end = min(p.k - min(k_begin, p.k), p.slice) + k_begin;
  const int steps = static_cast<int>((k_end - k_begin + C::kBlockK - 1) / C::kBlockK);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_m = warp / C::kWarpsN * C::kWarpM, warp_n = warp % C::kWarpsN * C::kWarpN;
  const bool sums_rows = C::kRowSums && p.row_sums && t.tile_n == 0 && warp_n == 0;

  TileLoader<T, C::kMajorA, C::kBlockM, C::kThreads, C::kMasked == Masked::kA> load_a(p.a, t, m0, k_begin);
  TileLoader<T, C::kMajorB, C::kBlockN, C::kThreads, C::kMasked == Masked::kB> load_b(p.b, t, n0, k_begin);
  const auto load_stage = [&](int step) {
    unsigned char* stage = shared + step % C::kStages * C::kStageBytes;
    const uint32_t k = k_begin + step * C::kBlockK;
    load_a.load(stage, stage + kOffsetAux, k, k_end);
    load_b.load(stage + kOffsetB, stage + kOffsetAux, k, k_end);
  };

  const FragmentReader<T, C::kMajorA, C::kBlockM, true> read_a(warp_m, lane);
  const FragmentReader<T, C::kMajorB, C::kBlockN, false> read_b(warp_n, lane);

  const uint32_t upper = upper_of<T>(p.mask);
  const FragmentPlace<C> place(m0, n0, warp_m, warp_n, lane);
  float sums[kFragmentsM][2 * kPairsN][4];
  start_sums<C>(sums, p, t, place);
  float row_sums[kFragmentsM][2] = {};

  // The first kStages - 1 rounds only load.
  for (int step = 1 - C::kStages; step < steps; ++step) {
    if (step >= 0) {
      ptx::cp_async_wait<C::kStages - 2>();
      __syncthreads();  // this stage is there for all, and all are done with the one that is filled next
    }
    if (step + C::kStages - 1 < steps) load_stage(step + C::kStages - 1);
    ptx::cp_async_commit();
    if (step < 0) continue;

    const unsigned char* stage = shared + step % C::kStages * C::kStageBytes;
#pragma unroll(C::kUnroll)
    for (int s = 0; s < 2; ++s) {
      uint32_t b[kPairsN][4];
#pragma unroll
      for (int j = 0; j < kPairsN; ++j) {
        read_b.load(b[j], stage + kOffsetB, j, s);
        if constexpr (C::kMasked == Masked::kB) {
          uint32_t y[4];
          read_b.load(y, stage + kOffsetAux, j, s);
#pragma unroll
          for (int i = 0; i < 4; ++i) b[j][i] = masked<T>(b[j][i], y[i], upper);
        }
        if constexpr (std::is_same_v<T, float>) round_to_tf32(b[j]);
      }
#pragma unroll
      for (int i = 0; i < kFragmentsM; ++i) {
        uint32_t a[4];
        read_a.load(a, stage, i, s);
        if constexpr (C::kMasked == Masked::kA) {
          if (!C::kRowSums || p.mask != Mask::kNone) {
            uint32_t y[4];
            read_a.load(y, stage + kOffsetAux, i, s);
#pragma unroll
            for (int e = 0; e < 4; ++e) a[e] = masked<T>(a[e], y[e], upper);
          }
        }
        if (C::kRowSums && sums_rows) {
          row_sums[i][0] += sum_of<T>(a[0]) + sum_of<T>(a[2]);
          row_sums[i][1] += sum_of<T>(a[1]) + sum_of<T>(a[3]);
        }
        if constexpr (std::is_same_v<T, float>) round_to_tf32(a);
#pragma unroll
        for (int j = 0; j < kPairsN; ++j) {
          multiply_add<T>(sums[i][2 * j], a, b[j][0], b[j][1]);
          multiply_add<T>(sums[i][2 * j + 1], a, b[j][2], b[j][3]);
        }
      }
    }
  }
  ptx::cp_async_wait<0>();

  if (C::kRowSums && sums_rows) {
#pragma unroll
    for (int i = 0; i < kFragmentsM; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float sum = row_sums[i][h];
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        const uint32_t m = m0 + warp_m + i * 16 + h * 8 + lane / 4;
        if (lane % 4 == 0 && m < p.m)
          static_cast<float*>(p.row_sums)[(static_cast<int64_t>(t.slice) * p.groups + t.group) * p.m + m] = sum;
      }
  }

  __syncthreads();  // the stages are read
  finish_sums<C>(sums, p, t, place, shared);
#endif
}

}  // namespace conv1x1::cuda
