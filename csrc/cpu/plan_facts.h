// What plan.cpp decides by and explain.cpp gives as a reason.
#pragma once

#include "plan.h"

namespace conv1x1 {

constexpr double kWorkPerThread = 150e3;  // multiply-adds that pay for entering a parallel region (about 1 us)

int64_t l2_bytes();  // of a core, as the operating system tells it, within bounds

// Can a tile read B in place? One stride along k, and unit stride along the n of a whole segment.
bool b_readable(const GemmProblem& p, const Microkernel& kernel);

}  // namespace conv1x1
