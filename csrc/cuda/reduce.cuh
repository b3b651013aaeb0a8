// Second passes, in a fixed order, so that results are the same bits from run to run: split-K's partial sums, the rows'
// sums of wgrad (dbias), and the pixels' sums of average pooling.
#pragma once

#include "epilogue.cuh"

namespace conv1x1::cuda {

constexpr int kReduceThreads = 256;

// D(m, n) = epilogue(sum over slices of partials), kCount neighbours along n a thread (n is a multiple), n fastest.
template <class T, int kCount>
__global__ void __launch_bounds__(kReduceThreads) reduce_partials(const __grid_constant__ GemmParams p) {
  using Acc = typename Accumulator<T>::type;
  const int64_t outputs = static_cast<int64_t>(p.groups) * p.m * p.n;
  const int64_t step = int64_t{gridDim.x} * kReduceThreads * kCount;
  const Acc* partials = static_cast<const Acc*>(p.partials);
  for (int64_t i = (int64_t{blockIdx.x} * kReduceThreads + threadIdx.x) * kCount; i < outputs; i += step) {
    Acc sums[kCount] = {};
#pragma unroll 4
    for (uint32_t s = 0; s < p.slices; ++s) {
      const auto part = load_chunk<kCount>(partials + s * outputs + i);
#pragma unroll
      for (int j = 0; j < kCount; ++j) sums[j] += part.value[j];
    }
    const int64_t row = i / p.n;
    const uint32_t group = static_cast<uint32_t>(row / p.m), m = static_cast<uint32_t>(row - int64_t{group} * p.m);
#pragma unroll
    for (int j = 0; j < kCount; ++j) finish<T>(sums[j], p, group, m, static_cast<uint32_t>(i - row * p.n) + j);
  }
}

// out[i] (+)= sum over slices of sums[s * count + i]
template <class T>
__global__ void __launch_bounds__(kReduceThreads)
    reduce_row_sums(const typename Accumulator<T>::type* sums, T* out, int64_t stride, int64_t count, uint32_t slices,
                    bool accumulate) {
  using Acc = typename Accumulator<T>::type;
  const int64_t i = int64_t{blockIdx.x} * kReduceThreads + threadIdx.x;
  if (i >= count) return;
  Acc sum = accumulate ? widen(out[i * stride]) : Acc(0);
  for (uint32_t s = 0; s < slices; ++s) sum += sums[s * count + i];
  out[i * stride] = narrow<T>(sum);
}

// out[image * channels + c] = sum over slots of sums[(image * slots + s) * channels + c] / pixels
template <class T>
__global__ void __launch_bounds__(kReduceThreads)
    reduce_pooled(const typename Accumulator<T>::type* sums, T* out, int64_t count, int64_t channels, uint32_t slots,
                  double pixels) {
  using Acc = typename Accumulator<T>::type;
  const int64_t i = int64_t{blockIdx.x} * kReduceThreads + threadIdx.x;
  if (i >= count) return;
  const Acc* from = sums + i / channels * slots * channels + i % channels;
  Acc sum = 0;
  for (uint32_t s = 0; s < slots; ++s) sum += from[s * channels];
  out[i] = narrow<T>(static_cast<Acc>(sum / static_cast<Acc>(pixels)));
}

}  // namespace conv1x1::cuda
