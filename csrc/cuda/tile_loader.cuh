// One operand's tile, from global to shared memory by cp.async, for the tensor-core kernels.
//
// A tile is kBlock indices of m (or n) by kBlockKBytes of k, in 16-byte chunks along the contiguous index:
//
//   Major::kK: a row is an index of m; 64 bytes of k. Two rows make a line of 128 bytes; chunk c of line l lies at
//   c ^ (l % 8).
//
//   Major::kMN: a row is an index of k; kBlock elements of m. Chunk c of row r lies at c ^ (r % 8) for 16-bit types, at
//   c ^ 2 (r % 4) for 32-bit ones,
//
// so that the copies and ldmatrix (for 32-bit kMN: plain loads) have no bank conflicts. Where the tensor's strides or
// alignment do not allow 16 bytes at once, a chunk is copied in pieces of 8 or 4: the alignment tiers. (A tensor that
// does not allow 4 bytes was repacked, repack.cuh.) Zeros follow the end of k. Past the end of m or n a tile has
// arbitrary values; sums with them are not stored. Any strides give right results; the tier only decides the speed.
#pragma once

#include "device.cuh"
#include "heuristics.h"

namespace conv1x1::cuda {

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
class TileLoader {
  using Layout = TileLayout<T, kMajor, kBlock>;
  static constexpr bool kAlongK = kMajor == Major::kK;
  static constexpr int kVector = Layout::kVector, kLog2 = kVector == 8 ? 3 : 2;
  static constexpr int kSize = sizeof(T), kBlockK = Layout::kBlockK;
  static constexpr int kLine = kAlongK ? kBlockK : kBlock;  // elements along the tile's contiguous index
  static constexpr int kRowBytes = kAlongK ? kBlockKBytes : kBlock * kSize;  // kK: on average, two rows being a line
  // A thread's pieces of kCount elements: the same place in every kStep-th row.
  template <int kCount>
  struct Share {
    static constexpr int kStep = kThreads * kCount / kLine, kRounds = Layout::kRows / kStep;
    static_assert(kRounds * kStep == Layout::kRows && (!kAlongK || kStep % 16 == 0));
    // The difference between the swizzles of the first row and of row i. Zero where their distance is a multiple of the
    // swizzle's period.
    static __device__ __forceinline__ constexpr int swizzle(int i) {
      return kAlongK ? 0 : kSize == 2 ? (i * kStep & 7) << 4 : (i * kStep & 3) << 5;
    }
  };
  static constexpr int kPointers = kAlongK ? Share<kVector>::kRounds : 1;

 public:
  __device__ __forceinline__ TileLoader(const Operand& o, const TileIndex& t, uint32_t first, uint32_t k_begin)
      : operand_(o), mn0_(first) {
    const T* const data = static_cast<const T*>(o.data) + t.group * o.group_stride + t.image * o.image_stride;
    const T* const aux = masked() ? static_cast<const T*>(o.aux) + t.group * o.aux_group_stride : nullptr;
    const int row = threadIdx.x / pieces(), along = piece_along();
    first_ = Layout::offset(row, along / kVector) + along % kVector * kSize;
    ptx::opaque(first_);
    along_k_ = kAlongK ? along : row;
#pragma unroll
    for (int i = 0; i < kPointers; ++i) {
      data_[i] = data;
      aux_[i] = aux;
      if (kAlongK && !o.streams) continue;
      // Rows past the end copy the last row.
      const uint32_t mn = mn0_ + (kAlongK ? row + i * Share<kVector>::kStep : along);
      const Offsets at = o.mn.at(min(mn, o.mn_count - (kAlongK ? 1u : 1u << o.chunk_log2)));
      data_[i] += at.data;
      aux_[i] += at.aux;
      if (!o.streams) continue;
      const int64_t k = k_begin + along_k_;
      data_[i] += k * o.k.stride[0];
      aux_[i] += k * o.k.aux_stride[0];
    }
  }

  // [k0, k_end) of k into a stage's tiles; stage after stage, each kBlockK further.
  __device__ __forceinline__ void load(unsigned char* tile, unsigned char* aux_tile, uint32_t k0, uint32_t k_end) {
    if (!operand_.streams)
      load_pieces(tile, aux_tile, k0, k_end);
    else if (kAlongK || operand_.chunk_log2 == kLog2)
      load_stream<kVector>(tile, aux_tile, k0 + along_k_, k_end);
    else if (kLog2 > 2 && operand_.chunk_log2 == 2)
      load_stream<kAlongK ? kVector : 4>(tile, aux_tile, k0 + along_k_, k_end);
    else if (operand_.chunk_log2 == 1)
      load_stream<kAlongK ? kVector : 2>(tile, aux_tile, k0 + along_k_, k_end);
    else if (kSize == 4)
      load_stream<kAlongK || kSize == 2 ? kVector : 1>(tile, aux_tile, k0 + along_k_, k_end);
  }

 private:
  __device__ __forceinline__ bool masked() const { return kWithAux && operand_.aux != nullptr; }

  template <int kCount>
  __device__ __forceinline__ void load_stream(unsigned char* tile, unsigned char* aux_tile, uint32_t k,
                                              uint32_t k_end) {
    using S = Share<kCount>;
    const int64_t stride = kAlongK ? 1 : operand_.k.stride[0], aux_stride = kAlongK ? 1 : operand_.k.aux_stride[0];
#pragma unroll
    for (int i = 0; i < S::kRounds; ++i) {
      const bool valid = kAlongK ? k < k_end : k + i * S::kStep < k_end;
      const int at = (first_ ^ S::swizzle(i)) + i * S::kStep * kRowBytes;
      const int64_t step = kAlongK ? 0 : i * S::kStep;
      ptx::cp_async<kCount * kSize>(tile + at, data_[i % kPointers] + step * stride, valid);
      if (masked()) ptx::cp_async<kCount * kSize>(aux_tile + at, aux_[i % kPointers] + step * aux_stride, valid);
    }
#pragma unroll
    for (int i = 0; i < kPointers; ++i) {
      data_[i] += kBlockK * stride;
      if (masked()) aux_[i] += kBlockK * aux_stride;
    }
  }

  // Pieces in a row of the tile, and where this thread's begin; of the kMN tile's rows they stay the same for all of k.
  __device__ __forceinline__ int pieces() const { return kLine >> operand_.chunk_log2; }
  __device__ __forceinline__ int piece_along() const { return (threadIdx.x & (pieces() - 1)) << operand_.chunk_log2; }

  // The loop is not unrolled, because fetching its code costs time as well.
  __device__ __forceinline__ void load_pieces(unsigned char* tile, unsigned char* aux_tile, uint32_t k0,
                                              uint32_t k_end) const {
    const int along = piece_along(), step = kThreads / pieces(), bytes = kSize << operand_.chunk_log2;
    const DeviceAxis& over = kAlongK ? operand_.mn : operand_.k;  // the rows
    const uint32_t first = kAlongK ? mn0_ : k0, end = kAlongK ? operand_.mn_count : k_end;
    const bool along_valid = kAlongK ? k0 + along < k_end : mn0_ + along < operand_.mn_count, linear = over.nd == 1;
    const Offsets at_along = kAlongK && along_valid ? operand_.k.at(k0 + along) : Offsets{0, 0};
    const T* const data = data_[0] + at_along.data;
    const T* const aux = aux_[0] + at_along.aux;
    int row = threadIdx.x / pieces();
    Offsets at{(first + row) * over.stride[0], (first + row) * over.aux_stride[0]};
#pragma unroll 1
    for (; row < Layout::kRows; row += step) {
      const bool valid = along_valid && first + row < end;
      if (!linear) at = valid ? over.at(first + row) : Offsets{0, 0};
      const int to = Layout::offset(row, along / kVector) + along % kVector * kSize;
      copy(tile + to, data + at.data, bytes, valid);
      if (masked()) copy(aux_tile + to, aux + at.aux, bytes, valid);
      at.data += step * over.stride[0];
      at.aux += step * over.aux_stride[0];
    }
  }

  static __device__ __forceinline__ void copy(unsigned char* to, const T* from, int bytes, bool valid) {
    if (bytes == 16)
      ptx::cp_async<16>(to, from, valid);
    else if (bytes == 8)
      ptx::cp_async<8>(to, from, valid);
    else
      ptx::cp_async<4>(to, from, valid);
  }

  const Operand& operand_;
  const uint32_t mn0_;
  int first_;         // where this thread's first piece lies in the tile, in bytes
  uint32_t along_k_;  // and its k
  const T* data_[kPointers];
  const T* aux_[kPointers];
};

}  // namespace conv1x1::cuda
