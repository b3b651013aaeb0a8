// The table of microkernels, in order, and the choice among them by the CPU's features and CONV1X1_ISA.
#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#include <cstdlib>
#include <cstring>
#include <deque>
#include <string>
#include <vector>

#include "microkernel.h"

namespace conv1x1 {

Microkernel make_portable_float32();
Microkernel make_portable_float64();
#if defined(__x86_64__)
Microkernel make_avx2_float32();
Microkernel make_avx2_float64();
Microkernel make_avx512_float32();
Microkernel make_avx512_float32_wide();
Microkernel make_avx512_float32_narrow();
Microkernel make_avx512_float32_tall();
Microkernel make_avx512_float32_float16_b();
Microkernel make_avx512_float64();
Microkernel make_avx512_bf16_bfloat16();
Microkernel make_avx512_bf16_bfloat16_wide();
Microkernel make_avx512_bf16_bfloat16_narrow();
Microkernel make_avx512_amx_bfloat16();
Microkernel make_avx512_amx_float32();
Microkernel make_avx512_amx_float16();
#endif

namespace {

// This file is compiled for the baseline instruction set. Each make_...() only fills in function pointers, but is
// itself compiled for its own instruction set. So it is called only if this CPU runs that set.
struct Table {
  std::deque<Microkernel> kernels;  // a deque: pointers to its elements stay valid as it grows
  std::vector<const Microkernel*> pointers;
  std::vector<KernelSet> sets;

  Table() {
    add("scalar", {make_portable_float32}, {make_portable_float64});
#if defined(__x86_64__)
    add("avx2", {make_avx2_float32}, {make_avx2_float64});
    add("avx512",
        {make_avx512_float32, make_avx512_float32_wide, make_avx512_float32_narrow, make_avx512_float32_tall,
         make_avx512_float32_float16_b},
        {make_avx512_float64});
    add_bfloat16("avx512_bf16",
                 {make_avx512_bf16_bfloat16, make_avx512_bf16_bfloat16_wide, make_avx512_bf16_bfloat16_narrow});
    add_bfloat16("avx512_amx", {make_avx512_amx_bfloat16});
    if (isa_supported("avx512_amx")) {
      sets.back().float32_parts = add(make_avx512_amx_float32);
      sets.back().float16_parts = add(make_avx512_amx_float16);
    }
#endif
  }

  using Make = Microkernel (*)();
  struct Shapes {
    Make usual, wide = nullptr, narrow = nullptr, tall = nullptr, float16_b = nullptr;
  };

  Microkernel* add(Make make) {
    kernels.push_back(make());
    pointers.push_back(&kernels.back());
    return &kernels.back();
  }

  const Microkernel* add(const Shapes& shapes) {
    const Microkernel* wide = shapes.wide ? add(shapes.wide) : nullptr;
    const Microkernel* narrow = shapes.narrow ? add(shapes.narrow) : nullptr;
    const Microkernel* tall = shapes.tall ? add(shapes.tall) : nullptr;
    const Microkernel* float16_b = shapes.float16_b ? add(shapes.float16_b) : nullptr;
    Microkernel* usual = add(shapes.usual);
    usual->wide = wide;
    usual->narrow = narrow;
    usual->tall = tall;
    usual->float16_b = float16_b;
    return usual;
  }

  void add(const char* isa, const Shapes& for_float32, const Shapes& for_float64) {
    if (!isa_supported(isa)) return;
    const Microkernel *float32 = add(for_float32), *float64 = add(for_float64);
    sets.push_back({isa, float32, float64, float32, nullptr, nullptr});
  }

  void add_bfloat16(const char* isa, const Shapes& shapes) {
    if (!isa_supported(isa)) return;
    KernelSet set = sets.back();  // the other types' kernels are those of the set before
    set.isa = isa;
    set.bfloat16 = add(shapes);
    sets.push_back(set);
  }
};

const Table& table() {
  static const Table t;
  return t;
}

#if defined(__x86_64__)
bool has_f16c() {  // some compilers' __builtin_cpu_supports has no name for F16C
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

// What this process lacks for AMX's bfloat16, or "". The operating system must save the tiles, and a process must ask
// for them once. It refuses where a signal stack is too small for them.
const std::string& amx_missing() {
  static const std::string missing = []() -> std::string {
#if defined(CONV1X1_TEST_EMULATES_AMX)  // by tests/amx alone: the instructions themselves are emulated
    return "";
#elif defined(__x86_64__) && defined(__linux__)
    constexpr unsigned kOsSavesByXsave = 1u << 27, kAmxBf16 = 1u << 22, kAmxTile = 1u << 24, kTileStates = 3u << 17;
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kAmxTile) || !(d & kAmxBf16))
      return "this CPU has no AMX-TILE and AMX-BF16";
    unsigned saved = 0, high = 0;
    if (__get_cpuid(1, &a, &b, &c, &d) && (c & kOsSavesByXsave)) asm("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
    if ((saved & kTileStates) != kTileStates) return "the operating system does not save AMX's tiles";
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0)
      return "the operating system refuses AMX's tiles to this process (arch_prctl)";
    return "";
#else
    return "AMX needs x86-64 and Linux";
#endif
  }();
  return missing;
}

// The default set: the last one, except on Intel CPUs without AMX. There vdpbf16ps has half the rate of float32
// multiply-adds, so converting bfloat16 to float32 is faster (1.2 to 1.7 times on a Xeon). On AMD vdpbf16ps has twice
// the rate of float32 multiply-adds.
const KernelSet& fastest(const Table& t) {
  const KernelSet* last = &t.sets.back();
#if defined(__x86_64__)
  if (std::strcmp(last->isa, "avx512_bf16") == 0 && __builtin_cpu_is("intel")) --last;
#endif
  return *last;
}

}  // namespace

bool isa_supported(const std::string& isa) {
  if (isa == "scalar") return true;
#if defined(__x86_64__)
  __builtin_cpu_init();  // its answers include what the operating system saves
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  if (isa == "avx2") return avx2;
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
  if (isa == "avx512") return avx512;
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  if (isa == "avx512_bf16") return bf16;
  if (isa == "avx512_amx") return bf16 && amx_missing().empty();
#endif
  return false;
}

KernelTable all_microkernels() { return {table().pointers.data(), table().pointers.size()}; }

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
      c.set = &fastest(t);
      return c;
    }
    std::string known;
    for (const KernelSet& set : t.sets) {
      if (std::strcmp(set.isa, wanted) == 0) c.set = &set;
      known += (known.empty() ? "" : ", ") + std::string(set.isa);
    }
    if (c.set == nullptr)
      c.error = std::string("CONV1X1_ISA: expected one of ") + known + " on this machine, got '" + wanted + "'";
    if (c.set == nullptr && std::strcmp(wanted, "avx512_amx") == 0)
      c.error += ": " + (amx_missing().empty() ? "this CPU has no AVX512-BF16" : amx_missing());
    return c;
  }();
  if (choice.set == nullptr && error != nullptr) *error = choice.error;
  return choice.set;
}

}  // namespace conv1x1
