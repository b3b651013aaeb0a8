// What plan.cpp and partition.cpp use for their decisions and explain.cpp for its reasons.
#pragma once

#include "plan.h"

namespace conv1x1 {

constexpr double kWorkPerThread = 150e3;  // multiply-adds that pay for entering a parallel region (about 1 us)

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
inline int64_t clamp(int64_t x, int64_t low, int64_t high) { return x < low ? low : (x > high ? high : x); }

int64_t l2_bytes();  // of a core, as the operating system tells it, within bounds

// Can a tile read B in place? One stride along k, and unit stride along the n of a whole segment.
bool b_readable(const GemmProblem& p, const Microkernel& kernel);

// partition.cpp. Plan::part_*, threads; and tiles of n that come out even for so many parts.
void choose_partition(const GemmProblem& p, Plan& plan, int max_threads);
Tiling evened(const GemmProblem& p, const Tiling& n, int64_t parts);

}  // namespace conv1x1
