// Prints "kind threads dynamic-shared-bytes" of every tensor-core configuration in the tables of heuristics.h, a line
// each, for tests/test_cuda_build.py: no binary holds the dynamic shared memory that a launch will ask for.
#include <cstdio>
#include <utility>

#include "../csrc/cuda/gemm_mma_sm80.cuh"

namespace {

using namespace conv1x1::cuda;

template <class T, int kKind, int kTile>
void print_one() {
  if constexpr (has_tile(kMmaKinds[kKind], kTile, sizeof(T))) {
    using Config = MmaConfig<T, kKind, kTile>;
    std::printf("%d %d %d\n", kKind, Config::kThreads, Config::kSharedBytes);
  }
}

template <class T, int... kIndex>
void print_all(std::integer_sequence<int, kIndex...>) {
  (print_one<T, kIndex / kMmaTileCount, kIndex % kMmaTileCount>(), ...);
}

}  // namespace

int main() {
  constexpr auto indices = std::make_integer_sequence<int, kMmaKindCount * kMmaTileCount>();
  print_all<__half>(indices);
  print_all<__nv_bfloat16>(indices);
  print_all<float>(indices);
}
