// All inline PTX. tests/cuda_on_cpu/ has a CPU version of every function in this file, so the kernels run on a CPU from
// the same sources.
#pragma once

#ifdef CONV1X1_CUDA_ON_CPU
#include "ptx_on_cpu.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace conv1x1::cuda::ptx {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Hides from the compiler how `value` was computed, so that it keeps the value in a register.
__device__ __forceinline__ void opaque(int& value) { asm volatile("" : "+r"(value)); }

// Reads blockIdx.x at this point, so that values derived from it need no registers before.
__device__ __forceinline__ uint32_t block_index() {
  uint32_t index;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(index));
  return index;
}

// Asynchronous copy of kBytes (4, 8 or 16) from global to shared memory, or of as many zeros where `valid` is false;
// then `global` is not read. Both addresses are multiples of kBytes. (PTX also has a form with a count of valid bytes,
// which costs ten instructions.)
template <int kBytes>
__device__ __forceinline__ void cp_async(void* shared, const void* global, bool valid) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  if constexpr (kBytes == 16)
    asm volatile(
        "{ .reg .pred ignore; setp.eq.u32 ignore, %2, 0; cp.async.cg.shared.global [%0], [%1], 16, ignore; }" ::"r"(
            shared_address(shared)),
        "l"(global), "r"(static_cast<uint32_t>(valid))
        : "memory");
  else
    asm volatile(
        "{ .reg .pred ignore; setp.eq.u32 ignore, %2, 0; cp.async.ca.shared.global [%0], [%1], %3, ignore; }" ::"r"(
            shared_address(shared)),
        "l"(global), "r"(static_cast<uint32_t>(valid)), "n"(kBytes)
        : "memory");
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending of this thread's groups are still being copied. Other threads' copies need a barrier
// too.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8x8 matrices of 16-bit elements. Lanes 8j to 8j+7 give the addresses of the rows (16 bytes, aligned) of matrix
// j; lane l gets, in r[j], elements 2(l%4) and 2(l%4)+1 of row l/4; with `trans`, of the transposed matrix.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// d += a * b on a 16x8 tile, float32 accumulation. With g = lane / 4 and t = lane % 4: d[0], d[1] are row g, columns 2t
// and 2t+1, d[2], d[3] those of row g+8. For 16-bit types k = 16: a[0] is row g, k 2t and 2t+1; a[1] row g+8; a[2] and
// a[3] the same at k+8; b[0] is column g, k 2t and 2t+1; b[1] at k+8.
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __half) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                             __nv_bfloat16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The same for TF32 with k = 8, one element a register: a[0] is row g, k t; a[1] row g+8; a[2] and a[3] the same at
// k+4; b[0] is column g, k t; b[1] at k+4. Reads the upper 19 bits of a float32: round_to_tf32 first.
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The bits of a float32 rounded to TF32 (10 bits of mantissa), to nearest, ties away from zero.
__device__ __forceinline__ uint32_t round_to_tf32(uint32_t float_bits) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(__uint_as_float(float_bits)));
  return rounded;
}

// All ones in each 16-bit half where y is neither <= 0 nor >= `upper`. A NaN on either side of a comparison passes it.
__device__ __forceinline__ uint32_t passing(uint32_t y, uint32_t upper, __half) {
  __half2 value, other;
  memcpy(&value, &y, 4);
  memcpy(&other, &upper, 4);
  return __hgtu2_mask(value, __half2half2(__ushort_as_half(0))) & __hltu2_mask(value, other);
}

__device__ __forceinline__ uint32_t passing(uint32_t y, uint32_t upper, __nv_bfloat16) {
  __nv_bfloat162 value, other;
  memcpy(&value, &y, 4);
  memcpy(&other, &upper, 4);
  return __hgtu2_mask(value, __bfloat162bfloat162(__ushort_as_bfloat16(0))) & __hltu2_mask(value, other);
}

// x in [lower, upper]; NaN stays NaN.
__device__ __forceinline__ float in_range(float x, float lower, float upper) {
  asm("max.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(lower));
  asm("min.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(upper));
  return x;
}

// Two floats rounded to 16 bits each, x in the lower half.
__device__ __forceinline__ uint32_t pack(float x, float y, __half) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(y), "f"(x));
  return packed;
}

__device__ __forceinline__ uint32_t pack(float x, float y, __nv_bfloat16) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(y), "f"(x));
  return packed;
}

}  // namespace conv1x1::cuda::ptx

#endif
