// All of the library's OpenMP regions. Workers keep the floating-point environment of whoever ran them last, or of
// whoever created them; here they get the caller's, whose setting it is (torch.set_flush_denormal).
#pragma once

#include <omp.h>

#include "../plan/plan.h"
#include "architecture.h"

namespace conv1x1 {

// team(thread, threads, barrier) on each of at most `threads` threads: a team may come out smaller than asked for. One
// thread is the caller's own, outside of any region. Nothing may throw.
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

// body(i) for each i below `count`, a thread's being neighbours.
template <class Body>
void parallel_for(int64_t count, int threads, const Body& body) {
  run_team(threads, [&](int thread, int team, auto /*barrier*/) {
    const Range mine = share(count, team, thread);
    for (int64_t i = mine.begin; i < mine.end; ++i) body(i);
  });
}

}  // namespace conv1x1
