// What this machine can do at most, measured: multiply-adds from registers, and copying. Plain C functions for ctypes;
// no torch, no Python. Built by bench/ceiling.py with -ffp-contract=fast, so that a * b + c is one instruction where
// the instruction set has it ("scalar" on x86-64 is SSE2: a multiply and an add). Each loop is its own function
// compiled for its own instruction set, and only called where the CPU has it.
//
// A new kind of arithmetic is a loop and a line in kRates.
#include <omp.h>
#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#include <algorithm>
#include <chrono>
#include <cstring>

namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point t) { return std::chrono::duration<double>(Clock::now() - t).count(); }

// Chains are independent: enough of them to hide a multiply-add's latency on every pipe, few enough for the registers.
// The asm statement keeps each accumulator in a register and each step in the loop. x = 0.5 x + 1 stays near 2.
#define CONV1X1_RATE_LOOP(NAME, TARGET, T, BYTES, CHAINS)                            \
  TARGET double NAME(long steps, void* sink) {                                       \
    typedef T Vector __attribute__((vector_size(BYTES)));                            \
    const Vector half = Vector{} + T(0.5), one = Vector{} + T(1);                    \
    Vector chain[CHAINS];                                                            \
    _Pragma("GCC unroll 32") for (int i = 0; i < CHAINS; ++i) chain[i] = one + T(i); \
    for (long s = 0; s < steps; ++s) {                                               \
      _Pragma("GCC unroll 32") for (int i = 0; i < CHAINS; ++i) {                    \
        chain[i] = chain[i] * half + one;                                            \
        CONV1X1_KEEP(chain[i]);                                                      \
      }                                                                              \
    }                                                                                \
    _Pragma("GCC unroll 32") for (int i = 1; i < CHAINS; ++i) chain[0] += chain[i];  \
    std::memcpy(sink, &chain[0], BYTES);                                             \
    return 2.0 * static_cast<double>(steps) * CHAINS * (BYTES / sizeof(T));          \
  }

#if defined(__x86_64__)
#define CONV1X1_KEEP(v) asm volatile("" : "+v"(v))
CONV1X1_RATE_LOOP(sse2_float32, , float, 16, 14)
CONV1X1_RATE_LOOP(sse2_float64, , double, 16, 14)
CONV1X1_RATE_LOOP(avx2_float32, __attribute__((target("avx2,fma"))), float, 32, 12)
CONV1X1_RATE_LOOP(avx2_float64, __attribute__((target("avx2,fma"))), double, 32, 12)
CONV1X1_RATE_LOOP(avx512_float32, __attribute__((target("avx512f"))), float, 64, 24)
CONV1X1_RATE_LOOP(avx512_float64, __attribute__((target("avx512f"))), double, 64, 24)

// As above with pairs of bfloat16: acc += 0 * 1 + 0 * 1, four operations a lane.
__attribute__((target("avx512f,avx512bf16"))) double avx512_bfloat16(long steps, void* sink) {
  constexpr int kChains = 24;
  __m512 chain[kChains];
  __m512i zero = _mm512_setzero_si512(), one = _mm512_set1_epi16(0x3f80);
  CONV1X1_KEEP(zero);
  CONV1X1_KEEP(one);
#pragma GCC unroll 32
  for (int i = 0; i < kChains; ++i) chain[i] = _mm512_set1_ps(static_cast<float>(i));
  for (long s = 0; s < steps; ++s) {
#pragma GCC unroll 32
    for (int i = 0; i < kChains; ++i) {
      chain[i] = _mm512_dpbf16_ps(chain[i], (__m512bh)zero, (__m512bh)one);
      CONV1X1_KEEP(chain[i]);
    }
  }
#pragma GCC unroll 32
  for (int i = 1; i < kChains; ++i) chain[0] += chain[i];
  std::memcpy(sink, &chain[0], sizeof chain[0]);
  return 4.0 * static_cast<double>(steps) * kChains * 16;
}

// Four accumulators of 16 x 16, two tiles of A and two of B, as in the microkernel; nothing is loaded in the loop. Not
// of zeros: those the unit multiplies 1.26 times as fast as any numbers (measured on a Xeon 6-207-2), which no layer
// has. B's tiles are each other's negatives and take turns, so that sums stay small.
double amx_bfloat16(long steps, void* sink) {
  struct alignas(64) {
    unsigned char palette = 1, start_row = 0, reserved[14] = {};
    unsigned short bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    unsigned char rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } const configuration;
  constexpr int kElements = 16 * 32;
  alignas(64) unsigned short a[kElements], b[kElements], negative[kElements];
  unsigned random = 1;
  const auto number = [&] {  // bfloat16 between 0.5 and 2, of either sign
    random = random * 1664525u + 1013904223u;
    return static_cast<unsigned short>(0x3f00u + (random >> 24) + (random >> 8 & 0x8000u));
  };
  for (int i = 0; i < kElements; ++i) {
    a[i] = number();
    b[i] = number();
    negative[i] = b[i] ^ 0x8000u;
  }
  asm volatile("ldtilecfg %0" : : "m"(configuration));  // and zeros in all tiles
  const long pitch = 64;
  asm volatile(
      "tileloadd (%0,%3,1), %%tmm4\n\t"
      "tileloadd (%0,%3,1), %%tmm5\n\t"
      "tileloadd (%1,%3,1), %%tmm6\n\t"
      "tileloadd (%2,%3,1), %%tmm7"
      :
      : "r"(a), "r"(b), "r"(negative), "r"(pitch)
      : "memory");
  for (long s = 0; s < steps; s += 2)
    asm volatile(
        "tdpbf16ps %tmm6, %tmm4, %tmm0\n\t"
        "tdpbf16ps %tmm7, %tmm4, %tmm1\n\t"
        "tdpbf16ps %tmm6, %tmm5, %tmm2\n\t"
        "tdpbf16ps %tmm7, %tmm5, %tmm3\n\t"
        "tdpbf16ps %tmm7, %tmm4, %tmm0\n\t"
        "tdpbf16ps %tmm6, %tmm4, %tmm1\n\t"
        "tdpbf16ps %tmm7, %tmm5, %tmm2\n\t"
        "tdpbf16ps %tmm6, %tmm5, %tmm3");
  asm volatile("tilerelease");
  std::memset(sink, 0, 64);
  return 2.0 * static_cast<double>((steps + 1) / 2 * 2) * 4 * 16 * 16 * 32;
}

bool always() { return true; }
bool has_avx2() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
bool has_avx512() { return has_avx2() && __builtin_cpu_supports("avx512f"); }
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
bool has_amx() {  // as csrc/cpu/kernels/dispatch.cpp asks
#if defined(__linux__)
  unsigned a = 0, b = 0, c = 0, d = 0, saved = 0, high = 0;
  if (!has_avx512_bf16() || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || (~d & (1u << 22 | 1u << 24))) return false;
  asm("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
  return (saved & 3u << 17) == 3u << 17 && syscall(SYS_arch_prctl, 0x1023L, 18L) == 0;
#else
  return false;
#endif
}
#else
#define CONV1X1_KEEP(v) asm volatile("" : "+w"(v))
CONV1X1_RATE_LOOP(base_float32, , float, 16, 24)
CONV1X1_RATE_LOOP(base_float64, , double, 16, 24)
bool always() { return true; }
#endif

struct Rate {
  const char* isa;  // the name that the microkernel table uses
  const char* dtype;
  bool (*supported)();
  double (*run)(long steps, void* sink);  // returns the operations done
};

constexpr Rate kRates[] = {
#if defined(__x86_64__)
    {"scalar", "float32", always, sse2_float32},
    {"scalar", "float64", always, sse2_float64},
    {"avx2", "float32", has_avx2, avx2_float32},
    {"avx2", "float64", has_avx2, avx2_float64},
    {"avx512", "float32", has_avx512, avx512_float32},
    {"avx512", "float64", has_avx512, avx512_float64},
    {"avx512_bf16", "bfloat16", has_avx512_bf16, avx512_bfloat16},
    {"avx512_amx", "bfloat16", has_amx, amx_bfloat16},
#else
    {"scalar", "float32", always, base_float32},
    {"scalar", "float64", always, base_float64},
#endif
};
constexpr int kCount = sizeof(kRates) / sizeof(kRates[0]);

// All threads start together; the slowest decides.
template <class Work>
double slowest_seconds(int threads, const Work& work) {
  double slowest = 0;
#pragma omp parallel num_threads(threads) reduction(max : slowest)
  {
#pragma omp barrier
    const Clock::time_point begin = Clock::now();
    work(omp_get_thread_num(), omp_get_num_threads());
    slowest = seconds_since(begin);
  }
  return slowest;
}

}  // namespace

extern "C" {

__attribute__((visibility("default"))) int ceiling_count() { return kCount; }
__attribute__((visibility("default"))) const char* ceiling_isa(int i) { return kRates[i].isa; }
__attribute__((visibility("default"))) const char* ceiling_dtype(int i) { return kRates[i].dtype; }
__attribute__((visibility("default"))) int ceiling_supported(int i) { return kRates[i].supported(); }

// One sample of about `seconds`: GFLOP/s of all `threads` together.
__attribute__((visibility("default"))) double ceiling_gflops(int index, int threads, double seconds) {
  const Rate& rate = kRates[index];
  alignas(64) char sink[64];
  long steps = 1 << 12;
  Clock::time_point begin = Clock::now();
  rate.run(steps, sink);  // also wakes the vector units up
  const double once = std::max(seconds_since(begin), 1e-7);
  steps = std::max(1L, static_cast<long>(static_cast<double>(steps) * seconds / once));
  double flops = 0;
  const double time = slowest_seconds(threads, [&](int thread, int count) {
    alignas(64) char own[64];
    const double done = rate.run(steps, own);
    if (thread == 0) flops = done * count;
  });
  return flops / time / 1e9;
}

// GB/s, bytes read plus bytes written, of one copy of `bytes` between two buffers that the caller owns; each thread
// copies its own stretch.
__attribute__((visibility("default"))) double ceiling_copy(char* to, const char* from, long bytes, int threads) {
  const double time = slowest_seconds(threads, [&](int thread, int count) {
    const long begin = bytes / count * thread, end = thread + 1 == count ? bytes : bytes / count * (thread + 1);
    std::memcpy(to + begin, from + begin, static_cast<size_t>(end - begin));
  });
  return 2.0 * static_cast<double>(bytes) / time / 1e9;
}
}
