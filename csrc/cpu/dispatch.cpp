// Which microkernels exist and which one runs: the ordered table, the CPU's features, and CONV1X1_ISA.
#include <cstdlib>
#include <cstring>
#include <string>

#include "microkernel.h"

namespace conv1x1 {

Microkernel make_portable_float32();
Microkernel make_portable_float64();
#if defined(__x86_64__)
Microkernel make_avx2_float32();
Microkernel make_avx2_float64();
Microkernel make_avx512_float32();
Microkernel make_avx512_float64();
#endif

namespace {

// Built where no ISA beyond the baseline is on: making an entry only fills in function pointers, but the functions
// that do it are compiled for their ISA, so an entry this CPU cannot run is never made.
struct Table {
  Microkernel kernels[6];
  const Microkernel* pointers[6];
  KernelSet sets[3];
  size_t count = 0, set_count = 0;

  Table() {
    add("scalar", make_portable_float32, make_portable_float64);
#if defined(__x86_64__)
    add("avx2", make_avx2_float32, make_avx2_float64);
    add("avx512", make_avx512_float32, make_avx512_float64);
#endif
  }

  void add(const char* isa, Microkernel (*float32)(), Microkernel (*float64)()) {
    if (!isa_supported(isa)) return;
    for (auto make : {float32, float64}) {
      kernels[count] = make();
      pointers[count] = &kernels[count];
      ++count;
    }
    sets[set_count++] = {isa, pointers[count - 2], pointers[count - 1]};
  }
};

const Table& table() {
  static const Table t;
  return t;
}

}  // namespace

bool isa_supported(const std::string& isa) {
  if (isa == "scalar") return true;
#if defined(__x86_64__)
  __builtin_cpu_init();  // its answers include what the operating system saves
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (isa == "avx2") return avx2;
  if (isa == "avx512")
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
#endif
  return false;
}

KernelTable all_microkernels() { return {table().pointers, table().count}; }

const KernelSet* selected_kernels(std::string* error) {
  struct Choice {
    const KernelSet* set = nullptr;
    std::string error;
  };
  static const Choice choice = [] {
    const Table& t = table();
    Choice c;
    const char* wanted = std::getenv("CONV1X1_ISA");
    if (wanted == nullptr || *wanted == '\0') {
      c.set = &t.sets[t.set_count - 1];
      return c;
    }
    std::string known;
    for (size_t i = 0; i < t.set_count; ++i) {
      if (std::strcmp(t.sets[i].isa, wanted) == 0) c.set = &t.sets[i];
      known += std::string(i ? ", " : "") + t.sets[i].isa;
    }
    if (c.set == nullptr)
      c.error = std::string("CONV1X1_ISA: expected one of ") + known + " on this machine, got '" + wanted + "'";
    return c;
  }();
  if (choice.set == nullptr && error != nullptr) *error = choice.error;
  return choice.set;
}

}  // namespace conv1x1
