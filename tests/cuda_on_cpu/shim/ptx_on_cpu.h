// The functions of csrc/cuda/ptx.cuh on the CPU: same names and signatures, same results as the instructions, and a
// failed launch where the GPU would trap or quietly do something else. Included by ptx.cuh.
//
// mma adds exact products to a float32 in the order of k. The hardware keeps fewer bits in an order of its own, so that
// results agree within rounding and not bit by bit.
#pragma once

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_runtime.h"

namespace conv1x1::cuda::ptx {

inline float widened(__half value) { return __half2float(value); }
inline float widened(__nv_bfloat16 value) { return __bfloat162float(value); }

template <int kBytes>
void cp_async(void* shared, const void* global, bool valid, const char* file = __builtin_FILE(),
              int line = __builtin_LINE()) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  emulator::queue_copy(shared, global, kBytes, valid ? kBytes : 0, {file, line});
}

inline void opaque(int&) {}

inline uint32_t block_index() { return blockIdx.x; }

inline void cp_async_commit() { emulator::close_group(); }

template <int kPending>
void cp_async_wait() {
  emulator::wait_for_groups(kPending);
}

template <bool kTransposed>
void load_matrices(const char* name, uint32_t (&r)[4], const void* row, emulator::Site site) {
  struct Lane {
    const unsigned char* row;
    uint32_t* r;
  } mine{static_cast<const unsigned char*>(row), r};
  emulator::check_shared(name, row, 16, 16, site);
  const emulator::Perform perform = [](void* const(&lanes)[emulator::kWarp]) {
    for (int j = 0; j < 4; ++j) {
      uint16_t matrix[8][8];
      for (int i = 0; i < 8; ++i) std::memcpy(matrix[i], static_cast<Lane*>(lanes[8 * j + i])->row, 16);
      for (int l = 0; l < emulator::kWarp; ++l) {
        const int i = l / 4, k = 2 * (l % 4);
        const uint32_t low = kTransposed ? matrix[k][i] : matrix[i][k];
        const uint32_t high = kTransposed ? matrix[k + 1][i] : matrix[i][k + 1];
        static_cast<Lane*>(lanes[l])->r[j] = low | high << 16;
      }
    }
  };
  emulator::warp_collective(name, perform, &mine, site);
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, const char* file = __builtin_FILE(),
                        int line = __builtin_LINE()) {
  load_matrices<false>("ldmatrix_x4", r, row, {file, line});
}

inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, const char* file = __builtin_FILE(),
                              int line = __builtin_LINE()) {
  load_matrices<true>("ldmatrix_x4_trans", r, row, {file, line});
}

struct MmaLane {
  float* d;
  const uint32_t *a, *b;
};

// How a register of A or B unpacks: kPerRegister elements, neighbours along k.
struct HalfElements {
  static constexpr int kPerRegister = 2;
  static float at(uint32_t bits, int i) { return __half2float({static_cast<unsigned short>(bits >> (16 * i))}); }
};
struct BFloat16Elements {
  static constexpr int kPerRegister = 2;
  static float at(uint32_t bits, int i) { return __uint_as_float(i ? bits & 0xffff0000u : bits << 16); }
};
struct TF32Elements {
  static constexpr int kPerRegister = 1;
  static float at(uint32_t bits, int) { return __uint_as_float(bits & 0xffffe000u); }
};

template <class Elements>
void mma_perform(void* const (&lanes)[emulator::kWarp]) {
  constexpr int kPer = Elements::kPerRegister, kK = 8 * kPer;
  float a[16][kK], b[kK][8], d[16][8];
  for (int l = 0; l < emulator::kWarp; ++l) {
    const MmaLane& lane = *static_cast<MmaLane*>(lanes[l]);
    const int g = l / 4, t = l % 4;
    for (int i = 0; i < kPer; ++i) {
      const int k = kPer * t + i;
      for (int r = 0; r < 4; ++r) a[g + 8 * (r % 2)][k + 4 * kPer * (r / 2)] = Elements::at(lane.a[r], i);
      for (int r = 0; r < 2; ++r) b[k + 4 * kPer * r][g] = Elements::at(lane.b[r], i);
    }
    for (int r = 0; r < 4; ++r) d[g + 8 * (r / 2)][2 * t + r % 2] = lane.d[r];
  }
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < kK; ++k)
      for (int col = 0; col < 8; ++col) d[row][col] += a[row][k] * b[k][col];
  for (int l = 0; l < emulator::kWarp; ++l)
    for (int r = 0; r < 4; ++r) static_cast<MmaLane*>(lanes[l])->d[r] = d[l / 4 + 8 * (r / 2)][2 * (l % 4) + r % 2];
}

inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __half,
                         const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  MmaLane mine{d, a, b};
  emulator::warp_collective("mma_m16n8k16 (half)", mma_perform<HalfElements>, &mine, {file, line});
}

inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __nv_bfloat16,
                         const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  MmaLane mine{d, a, b};
  emulator::warp_collective("mma_m16n8k16 (bfloat16)", mma_perform<BFloat16Elements>, &mine, {file, line});
}

inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  MmaLane mine{d, a, b};
  emulator::warp_collective("mma_m16n8k8_tf32", mma_perform<TF32Elements>, &mine, {file, line});
}

// Adding half a unit rounds ties away from zero, and past the largest number to infinity.
inline uint32_t round_to_tf32(uint32_t float_bits) {
  const uint32_t magnitude = float_bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7fffffffu;
  if (magnitude == 0x7f800000u) return float_bits;
  return (float_bits + 0x1000u) & 0xffffe000u;
}

template <class T>
uint32_t passing(uint32_t y, uint32_t upper, T) {
  uint32_t mask = 0;
  for (int half = 0; half < 2; ++half) {
    T value, other;
    const uint16_t bits = static_cast<uint16_t>(y >> 16 * half), other_bits = static_cast<uint16_t>(upper >> 16 * half);
    std::memcpy(&value, &bits, 2);
    std::memcpy(&other, &other_bits, 2);
    const float v = widened(value);
    if (!(v <= 0) && !(v >= widened(other))) mask |= 0xffffu << 16 * half;
  }
  return mask;
}

inline float in_range(float x, float lower, float upper) {
  if (std::isnan(x)) return __uint_as_float(0x7fffffffu);
  return x > upper ? upper : x > lower ? x : lower;  // -0 is less than 0
}

inline uint32_t pack(float x, float y, __half) {
  return __half_as_ushort(__float2half_rn(x)) | static_cast<uint32_t>(__half_as_ushort(__float2half_rn(y))) << 16;
}

inline uint32_t pack(float x, float y, __nv_bfloat16) {
  return __bfloat16_as_ushort(__float2bfloat16_rn(x)) |
         static_cast<uint32_t>(__bfloat16_as_ushort(__float2bfloat16_rn(y))) << 16;
}

}  // namespace conv1x1::cuda::ptx
