// What the files of this folder share to make a plan (plan.h lists them).
#pragma once

#include "plan.h"

namespace conv1x1 {

constexpr double kWorkPerThread = 150e3;  // multiply-adds that pay for entering a parallel region (about 1 us)

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
inline int64_t clamp(int64_t x, int64_t low, int64_t high) { return x < low ? low : (x > high ? high : x); }

int64_t l2_bytes();  // of a core, as the operating system tells it, within bounds

// operands.cpp. Chooses the microkernel by dtype, channels and the pixels of an image. Neither the batch nor the
// threads may decide a result's bits.
const Microkernel& choose_kernel(const GemmProblem& p, const KernelSet& kernels);
// Sets Plan::a, b, a_access, m, n, and the shape of the kernel's tiles. `element`: bytes of an accumulator.
void choose_operands(const GemmProblem& p, Plan& plan, int64_t element);
// Do all output channels of a group fit into one tile of a kernel in parts?
bool one_tile_of_weights(const GemmProblem& p, const Microkernel& kernel);

// partition.cpp. Sets Plan::part_* and threads. evened() returns n, or tiles whose number divides evenly by `parts`.
void choose_partition(const GemmProblem& p, Plan& plan, int max_threads);
Tiling evened(const GemmProblem& p, const Tiling& n, int64_t parts);

}  // namespace conv1x1
