// All OpenMP regions of the library. OpenMP's threads keep the floating-point environment of their last use. Here they
// get the caller's (torch.set_flush_denormal).
#pragma once

#include <omp.h>

#include "../plan/plan.h"
#include "architecture.h"

namespace conv1x1 {

// Calls team(thread, threads, barrier) on at most `threads` threads: OpenMP may start fewer than asked for. A single
// thread is the caller's own, without a region. `team` must not throw.
template <class Team>
void run_team(int threads, const Team& team) {
  if (threads == 1) {
    team(0, 1, [] {});
    return;
  }
  const FloatingPointControl callers = floating_point_control();
#pragma omp parallel num_threads(threads)
  {
    const FloatingPointControl workers = floating_point_control();
    set_floating_point_control(callers);
    team(omp_get_thread_num(), omp_get_num_threads(), [] {
#pragma omp barrier
    });
    set_floating_point_control(workers);
  }
}

// Calls body(i) for each i below `count`. Each thread has consecutive i.
template <class Body>
void parallel_for(int64_t count, int threads, const Body& body) {
  run_team(threads, [&](int thread, int team, auto /*barrier*/) {
    const Range mine = share(count, team, thread);
    for (int64_t i = mine.begin; i < mine.end; ++i) body(i);
  });
}

}  // namespace conv1x1
