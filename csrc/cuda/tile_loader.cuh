// One operand's tile, from global to shared memory by cp.async, for the tensor-core kernels.
//
// A tile is kBlock indices of m (or n) by kBlockKBytes of k, in 16-byte chunks along the contiguous index:
//
//   Major::kK   row = index of m, 64 bytes of k: two rows make a line of 128 bytes, chunk c of line l lies at c ^ (l %
//   8) Major::kMN  row = index of k, kBlock elements of m: chunk c of row r lies at c ^ s(r), s = r % 8 for 16-bit
//   types and
//               2 (r % 4) for 32-bit ones
//
// so that neither the copies nor ldmatrix (or, for 32-bit kMN, plain loads) meet a bank twice. Where the tensor's
// strides or alignment do not allow 16 bytes at once, a chunk is copied in pieces: the alignment tiers. Indices past
// the end become zeros. Any strides are right; the tier only decides the speed.
#pragma once

#include "device.cuh"

namespace conv1x1::cuda {

constexpr int kBlockKBytes = 64;

template <class T, Major kMajor, int kBlock>
struct TileLayout {
  static constexpr int kVector = 16 / sizeof(T);
  static constexpr int kBlockK = kBlockKBytes / sizeof(T);
  static constexpr int kBytes = kBlock * kBlockKBytes;
  static constexpr int kRows = kMajor == Major::kK ? kBlock : kBlockK;
  static constexpr int kChunksPerRow = kMajor == Major::kK ? kBlockKBytes / 16 : kBlock / kVector;

  // In bytes.
  static __device__ __forceinline__ int offset(int row, int chunk) {
    if constexpr (kMajor == Major::kK) {
      const int line = row >> 1;
      return line * 128 + ((((row & 1) << 2 | chunk) ^ (line & 7)) << 4);
    } else {
      const int swizzle = sizeof(T) == 2 ? row & 7 : (row & 3) << 1;
      return row * (kBlock * static_cast<int>(sizeof(T))) + ((chunk ^ swizzle) << 4);
    }
  }
};

template <class T, Major kMajor, int kBlock, int kThreads, bool kWithAux>
struct TileLoader {
  using Layout = TileLayout<T, kMajor, kBlock>;
  static constexpr bool kAlongK = kMajor == Major::kK;
  static constexpr int kVector = Layout::kVector, kSize = sizeof(T);
  static constexpr int kChunks = Layout::kRows * Layout::kChunksPerRow;
  static constexpr int kPerThread = kChunks / kThreads, kRowStep = kThreads / Layout::kChunksPerRow;
  static_assert(kThreads % Layout::kChunksPerRow == 0 && kPerThread * kThreads == kChunks);
  // Offsets along m or n stay the same for all of k: computed once. In kMN tiles all of a thread's chunks share one.
  static constexpr int kOffsets = kAlongK ? kPerThread : 1;

  // One offset along k a chunk, twice with a mask: at once they would take registers that there are not.
  static constexpr int kUnroll = !kAlongK && kWithAux ? 1 : kPerThread;

  const GemmParams& params;
  const Operand& operand;
  const uint32_t mn0;
  const T* at_mn[kOffsets];
  const T* aux_at_mn;  // of the first chunk: the mask's tensor is hardly ever nested along m or n

  __device__ __forceinline__ TileLoader(const GemmParams& p, const Operand& o, uint32_t first)
      : params(p), operand(o), mn0(first) {
    const TileIndex t = tile_index(p);
#pragma unroll
    for (int i = 0; i < kOffsets; ++i) {
      const uint32_t mn = mn0 + (kAlongK ? row(i) : chunk() * kVector);
      const Offsets along_mn = mn < o.mn_count ? o.mn.at(mn) : Offsets{0, 0};
      at_mn[i] = data(t) + along_mn.data;
      if (i == 0) aux_at_mn = masked() ? aux(t) + along_mn.aux : nullptr;
    }
  }

  // k in [k0, k_end) into the stage's tiles.
  __device__ __forceinline__ void load(unsigned char* tile, unsigned char* aux_tile, uint32_t k0,
                                       uint32_t k_end) const {
    if (operand.chunk == kVector)
      load_chunks(tile, aux_tile, k0, k_end);
    else if (operand.chunk * kSize >= 4)
      load_pieces(tile, aux_tile, k0, k_end);
    else
      load_elements(tile, aux_tile, k0, k_end);
  }

 private:
  __device__ __forceinline__ bool masked() const { return kWithAux && operand.aux != nullptr; }
  __device__ __forceinline__ const T* data(const TileIndex& t) const {
    return static_cast<const T*>(operand.data) + t.group * operand.group_stride + t.image * operand.image_stride;
  }
  __device__ __forceinline__ const T* aux(const TileIndex& t) const {
    return static_cast<const T*>(operand.aux) + t.group * operand.aux_group_stride;
  }
  static __device__ __forceinline__ int row(int i) { return threadIdx.x / Layout::kChunksPerRow + i * kRowStep; }
  static __device__ __forceinline__ int chunk() { return threadIdx.x % Layout::kChunksPerRow; }
  // How many of `limit` elements from `index` on there are.
  static __device__ __forceinline__ int left(uint32_t count, uint32_t index, int limit) {
    return index >= count ? 0 : static_cast<int>(min(count - index, static_cast<uint32_t>(limit)));
  }

  __device__ __forceinline__ void load_chunks(unsigned char* tile, unsigned char* aux_tile, uint32_t k0,
                                              uint32_t k_end) const {
    Offsets along_k{0, 0};
    if (kAlongK && k0 + chunk() * kVector < k_end) along_k = operand.k.at(k0 + chunk() * kVector);
#pragma unroll(kUnroll)
    for (int i = 0; i < kPerThread; ++i) {
      const int at = Layout::offset(row(i), chunk());
      int valid;
      if constexpr (kAlongK) {
        valid = mn0 + row(i) < operand.mn_count ? left(k_end, k0 + chunk() * kVector, kVector) : 0;
      } else {
        valid = k0 + row(i) < k_end ? left(operand.mn_count, mn0 + chunk() * kVector, kVector) : 0;
        along_k = valid > 0 ? operand.k.at(k0 + row(i)) : Offsets{0, 0};
      }
      // Where nothing is left, nothing is read.
      ptx::cp_async<16>(tile + at, at_mn[i % kOffsets] + along_k.data, valid * kSize);
      if (masked()) ptx::cp_async<16>(aux_tile + at, aux_at(i, valid) + along_k.aux, valid * kSize);
    }
  }

  __device__ __forceinline__ const T* aux_at(int i, int valid) const {
    if (!kAlongK || i == 0 || valid == 0) return aux_at_mn;
    if (operand.mn.nd == 1) return aux_at_mn + i * kRowStep * operand.mn.aux_stride[0];
    return aux(tile_index(params)) + operand.mn.at(mn0 + row(i)).aux;
  }

  struct Piece {  // `count` neighbours of which `valid` exist, and where they lie
    int at, valid;
    Offsets from;
  };

  // Pieces of operand.chunk elements, numbered along the tile's contiguous index, so that a warp's reads are
  // neighbours.
  __device__ __forceinline__ Piece piece(int index, int count, uint32_t k0, uint32_t k_end) const {
    const int first = index * count, at_row = first / (Layout::kChunksPerRow * kVector);
    const int along = first % (Layout::kChunksPerRow * kVector);
    const uint32_t k = k0 + (kAlongK ? along : at_row), mn = mn0 + (kAlongK ? at_row : along);
    Piece p;
    p.at = Layout::offset(at_row, along / kVector) + along % kVector * kSize;
    p.valid = (kAlongK ? mn < operand.mn_count : k < k_end)
                  ? (kAlongK ? left(k_end, k, count) : left(operand.mn_count, mn, count))
                  : 0;
    p.from = Offsets{0, 0};
    if (p.valid > 0) {
      const Offsets a = operand.mn.at(mn), b = operand.k.at(k);
      p.from = Offsets{a.data + b.data, a.aux + b.aux};
    }
    return p;
  }

  __device__ __forceinline__ void load_pieces(unsigned char* tile, unsigned char* aux_tile, uint32_t k0,
                                              uint32_t k_end) const {
    const int count = operand.chunk;
    const TileIndex t = tile_index(params);  // again, rather than in registers through the mainloop
#pragma unroll 1
    for (int i = threadIdx.x; i < kChunks * kVector / count; i += kThreads) {
      const Piece p = piece(i, count, k0, k_end);
      if (count * kSize == 8) {
        ptx::cp_async<8>(tile + p.at, data(t) + p.from.data, p.valid * kSize);
        if (masked()) ptx::cp_async<8>(aux_tile + p.at, aux(t) + p.from.aux, p.valid * kSize);
      } else {
        ptx::cp_async<4>(tile + p.at, data(t) + p.from.data, p.valid * kSize);
        if (masked()) ptx::cp_async<4>(aux_tile + p.at, aux(t) + p.from.aux, p.valid * kSize);
      }
    }
  }

  // Too small for cp.async: through registers, a few reads under way at a time.
  __device__ __forceinline__ void load_elements(unsigned char* tile, unsigned char* aux_tile, uint32_t k0,
                                                uint32_t k_end) const {
    constexpr int kTogether = 4;
    const TileIndex t = tile_index(params);
#pragma unroll 1
    for (int i = threadIdx.x; i < kChunks * kVector; i += kTogether * kThreads) {
      T value[kTogether], aux_value[kTogether];
      int at[kTogether];
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        const Piece p = piece(i + j * kThreads, 1, k0, k_end);
        at[j] = p.at;
        value[j] = p.valid ? data(t)[p.from.data] : narrow<T>(0.0f);
        if (masked()) aux_value[j] = p.valid ? aux(t)[p.from.aux] : narrow<T>(0.0f);
      }
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        *reinterpret_cast<T*>(tile + at[j]) = value[j];
        if (masked()) *reinterpret_cast<T*>(aux_tile + at[j]) = aux_value[j];
      }
    }
  }
};

}  // namespace conv1x1::cuda
