// A copy of an operand in which its tile's contiguous index is contiguous and aligned (launch.h's Repack), under the
// mask. One pass at the speed of memory, where the GEMM would gather single elements once for every tile.
#pragma once

#include "device.cuh"

namespace conv1x1::cuda {

constexpr int kRepackThreads = 256;

struct RepackParams {
  const void* from = nullptr;
  const void* aux = nullptr;  // the saved output that masks it
  void* to = nullptr;         // (groups, images, other, pitch)
  DeviceAxis unit, other;
  uint32_t units = 0, others = 0, chunks = 0;  // chunks of 16 bytes in a pitch
  uint32_t images = 1;
  int64_t rows = 0;  // groups * images * others
  int64_t group_stride = 0, aux_group_stride = 0, image_stride = 0;
  Mask mask = Mask::kNone;
};

// Each thread copies one chunk. Zeros follow the last unit.
template <class T>
__global__ void __launch_bounds__(kRepackThreads) repack(const __grid_constant__ RepackParams p) {
  constexpr int kVector = 16 / sizeof(T);
  const int64_t i = int64_t{blockIdx.x} * kRepackThreads + threadIdx.x;
  const int64_t row = i / p.chunks;
  if (row >= p.rows) return;
  const uint32_t first = static_cast<uint32_t>(i - row * p.chunks) * kVector;
  const int64_t slab = row / p.others, group = slab / p.images;
  const Offsets at_row = p.other.at(static_cast<uint32_t>(row - slab * p.others));
  const T* const from =
      static_cast<const T*>(p.from) + group * p.group_stride + (slab - group * p.images) * p.image_stride + at_row.data;
  const T* const aux = static_cast<const T*>(p.aux) + group * p.aux_group_stride + at_row.aux;
  Chunk<T, kVector> out;
  Offsets at{0, 0};
  uint32_t left = 0;  // neighbours that one stride reaches
#pragma unroll
  for (int j = 0; j < kVector; ++j) {
    out.value[j] = narrow<T>(0.0f);
    if (first + j >= p.units) continue;
    if (left == 0) {
      at = p.unit.at(first + j);
      left = p.unit.nd == 1 ? p.units : p.unit.size[0].divisor - p.unit.size[0].remainder(first + j);
    }
    if (!p.aux || passes(widen(aux[at.aux]), p.mask)) out.value[j] = from[at.data];
    at.data += p.unit.stride[0];
    at.aux += p.unit.aux_stride[0];
    --left;
  }
  reinterpret_cast<Chunk<T, kVector>*>(p.to)[i] = out;
}

}  // namespace conv1x1::cuda
