// What the binding (conv1x1_cuda.cpp) and the emulation's tests (tests/cuda_on_cpu/) call. Torch-free.
//
//   lower.cpp  Conv1x1Problem -> GemmProblem     heuristics.h  GemmProblem -> Plan, a pure function
//   launch.cu  GemmProblem + Plan -> kernels     passes.cu     pooling, masked copy: what is not one GEMM
//
// Pointers are device pointers. Nothing synchronises; every launch is checked. The current device is the tensors'.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <string>

#include "../gemm.h"

namespace conv1x1::cuda {

struct Device {             // what a plan may depend on beside the problem
  int arch = 0;             // compute capability, 10 * major + minor
  int sm_count = 0;         // multiprocessors
  int shared_memory = 0;    // bytes a block may have, opted in
};

enum class Kernel : int { kSimt, kMma };

// Along which index an operand's tile is contiguous in shared memory.
enum class Major : int { kK, kMN };

struct Plan {
  Kernel kernel = Kernel::kSimt;
  bool tf32 = false;
  int block_m = 0, block_n = 0, block_k = 0, stages = 0, threads = 0;
  Major a_major = Major::kK, b_major = Major::kK;
  int a_chunk = 0, b_chunk = 0, d_chunk = 0;  // elements moved at once: the alignment tier; 1 is element by element
  int64_t split_k = 1, slice = 0;             // slices of k and their length
  int64_t shared_memory = 0;                  // dynamic, bytes a block
  int64_t workspace = 0;                      // device memory, bytes, 256-byte aligned: split-K partial sums
};

Plan make_plan(const GemmProblem& problem, const Device& device, bool allow_tf32);
// "key=value" lines, as the CPU's describe().
std::string describe(const GemmProblem& problem, const Device& device, const Plan& plan);
// Empty, or why the problem cannot run: an axis of 2^31 or more, an architecture without code.
std::string check_problem(const GemmProblem& problem, const Device& device);
cudaError_t run_gemm(const GemmProblem& problem, const Plan& plan, void* workspace, cudaStream_t stream);

// out(image, c) = mean over pixels of activation(W x + bias); (batch, C_out) contiguous, of the problem's dtype; NaN
// where there are no pixels.
int64_t avg_pool_workspace(const Conv1x1Problem& p, const Device& device, bool allow_tf32);
cudaError_t run_avg_pool(const Conv1x1Problem& p, void* out, const Device& device, bool allow_tf32, void* workspace,
                         cudaStream_t stream);
// Its gradients, written to p.dx, p.dw and p.dbias where those have data; p.dy has no pixel strides. Recomputes the
// pre-activation in pieces of a bounded workspace.
int64_t avg_pool_backward_workspace(const Conv1x1Problem& p, const Device& device, bool allow_tf32);
cudaError_t run_avg_pool_backward(const Conv1x1Problem& p, const Device& device, bool allow_tf32, void* workspace,
                                  cudaStream_t stream);

// dz = dy under the mask of y (lower_mask).
cudaError_t run_masked_copy(const MaskedCopy& copy, DType dtype, cudaStream_t stream);
// dx = 0: with a stride, dgrad writes only the pixels that the forward read.
cudaError_t run_zero_fill(const Conv1x1Problem& p, cudaStream_t stream);

}  // namespace conv1x1::cuda
