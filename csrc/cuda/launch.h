// What the binding (conv1x1_cuda.cpp) and the emulation's tests (tests/cuda_on_cpu/) call. Torch-free.
//
//   lower.cpp  Conv1x1Problem -> GemmProblem     plan.cpp   GemmProblem -> Plan, a pure function (heuristics.h)
//   launch.cu  GemmProblem + Plan -> kernels     passes.cu  pooling, masked copy: what is not one GEMM
//
// Pointers are device pointers. Nothing synchronises; every launch is checked. The current device is the tensors'.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <string>

#include "../problem/gemm.h"

namespace conv1x1::cuda {

struct Tuning;  // heuristics.h

struct Device {                    // what a plan may depend on beside the problem
  int arch = 0;                    // compute capability, 10 * major + minor
  int sm_count = 0;                // multiprocessors
  int shared_memory = 0;           // bytes a block may have, opted in
  const Tuning* tuning = nullptr;  // null: heuristics.h as it is
};

enum class Kernel : int { kSimt, kMma };

// A masked copy of an operand in the workspace. It is needed where the tensor allows no copies of 4 bytes: odd rows, or
// strided pixels, of 16-bit elements. The copy is contiguous along the index along which the tile is; its rows are
// `pitch` elements apart.
struct Repack {
  bool needed = false;
  int64_t pitch = 0, at = 0, bytes = 0;  // `at` in the workspace
};

struct Plan {
  Kernel kernel = Kernel::kSimt;
  bool tf32 = false;
  int kind = -1, tile = 0;  // which instantiation: heuristics.h's tables
  int block_m = 0, block_n = 0, block_k = 0;
  bool a_k_unit = false, b_k_unit = false;    // the operand's tile is contiguous along k, not along m or n
  int a_chunk = 1, b_chunk = 1, d_chunk = 1;  // elements moved at once: the alignment tier; 1 is element by element
  int64_t tiles_m = 0, tiles_n = 0;
  int64_t slices = 1, slice = 0;  // of k, and their length: split-K
  Repack a_repack, b_repack;
  int64_t partials = 0, row_sums = 0, workspace = 0;  // device memory in bytes; workspace is all of it
};

// `images` > 1: that many GEMMs of this shape, `image_stride` elements apart in the operand with the pixels (average
// pooling).
Plan make_plan(const GemmProblem& problem, const Device& device, bool allow_tf32, int64_t images = 1,
               int64_t image_stride = 0);
// "key=value" lines, as the CPU's describe().
std::string describe(const GemmProblem& problem, const Device& device, const Plan& plan);
// Empty, or why the problem cannot run: an axis of 2^31 or more, too many tiles, an architecture without code.
std::string check_problem(const GemmProblem& problem, const Device& device);
cudaError_t run_gemm(const GemmProblem& problem, const Plan& plan, void* workspace, cudaStream_t stream);

// out(image, c) = mean over pixels of activation(W x + bias); (batch, C_out) contiguous, of the problem's dtype; NaN
// where there are no pixels.
std::string describe_avg_pool(const Conv1x1Problem& p, const Device& device, bool allow_tf32);
int64_t avg_pool_workspace(const Conv1x1Problem& p, const Device& device, bool allow_tf32);
cudaError_t run_avg_pool(const Conv1x1Problem& p, void* out, const Device& device, bool allow_tf32, void* workspace,
                         cudaStream_t stream);
// Its gradients, written to p.dx, p.dw and p.dbias where those have data; p.dy has no pixel strides. The pre-activation
// is recomputed in pieces, and a piece is most of the workspace. A piece is a quarter of the images, or as many as have
// 2^24 elements where that is more, and at least one image. With several pieces, dw and dbias of half types are added
// in float32.
int64_t avg_pool_backward_workspace(const Conv1x1Problem& p, const Device& device, bool allow_tf32);
cudaError_t run_avg_pool_backward(const Conv1x1Problem& p, const Device& device, bool allow_tf32, void* workspace,
                                  cudaStream_t stream);

// dz = dy under the mask of y (lower_mask).
cudaError_t run_masked_copy(const MaskedCopy& copy, DType dtype, cudaStream_t stream);
// dx, which is dense, = 0: with a stride, dgrad writes only the pixels that the forward read.
cudaError_t run_zero_fill(const Conv1x1Problem& p, cudaStream_t stream);

}  // namespace conv1x1::cuda
