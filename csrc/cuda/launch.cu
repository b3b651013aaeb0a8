// GemmProblem + Plan -> kernel launches: the parameters, the GEMM itself, and its reductions. Every launch is checked;
// nothing synchronises.
#include <algorithm>
#include <cmath>

#include "gemm_run.h"
#include "heuristics.h"
#include "kernels.h"
#include "reduce.cuh"

namespace conv1x1::cuda {
namespace {

Operand operand_of(const Matrix& matrix, const Axis& mn, const Axis& k, bool k_unit, int chunk) {
  Operand o;
  o.data = matrix.data;
  o.aux = matrix.aux;
  o.mn = device_axis(mn);
  o.k = device_axis(k);
  o.mn_count = matrix.data ? static_cast<uint32_t>(mn.count) : 0;
  o.k_unit = k_unit;
  o.chunk = chunk;
  o.group_stride = matrix.group_stride;
  o.aux_group_stride = matrix.aux_group_stride;
  return o;
}

GemmParams params_of(const GemmProblem& g, const Plan& plan, void* workspace) {
  GemmParams p;
  p.a = operand_of(g.a, g.a.row, g.a.col, plan.a_k_unit, plan.a_chunk);
  p.b = operand_of(g.b, g.b.col, g.b.row, plan.b_k_unit, plan.b_chunk);
  if (g.mask == Mask::kNone) p.a.aux = p.b.aux = nullptr;
  p.d.data = g.d.data;
  p.d.residual = g.d.aux;
  p.d.m = device_axis(g.d.row);
  p.d.n = device_axis(g.d.col);
  p.d.chunk = plan.d_chunk;
  p.d.group_stride = g.d.group_stride;
  p.d.residual_group_stride = g.d.aux_group_stride;
  p.m = static_cast<uint32_t>(g.m);
  p.n = static_cast<uint32_t>(g.n);
  p.k = static_cast<uint32_t>(g.k);
  p.groups = static_cast<uint32_t>(g.groups);
  p.tiles_m = static_cast<uint32_t>(plan.tiles_m);
  p.tiles_n = static_cast<uint32_t>(plan.tiles_n);
  p.m_fastest = plan.tiles_m <= plan.tiles_n;
  p.slices = static_cast<uint32_t>(plan.slices);
  p.slice = static_cast<uint32_t>(plan.slice);
  p.mask = g.mask;
  p.activation = g.activation;
  p.lower = g.activation == Activation::kNone ? -INFINITY : 0.0f;
  p.upper = g.activation == Activation::kReLU6 ? 6.0f : INFINITY;
  p.bias = g.bias.data;
  p.bias_stride = g.bias.stride;
  p.bias_along_m = g.bias_along_m;
  if (plan.partials) p.partials = workspace;
  if (plan.row_sums) p.row_sums = static_cast<char*>(workspace) + plan.partials;
  return p;
}

template <class T>
cudaError_t launch_gemm(const GemmParams& p, const Plan& plan, cudaStream_t stream) {
  const uint32_t blocks = p.tiles_m * p.tiles_n * p.groups * p.images * p.slices;
  if (blocks == 0) return cudaSuccess;
  if constexpr (sizeof(T) == 8) {
    return launch_simt<T>(p, plan, blocks, stream);
  } else {
    return plan.kernel == Kernel::kMma ? launch_mma<T>(p, plan, blocks, stream)
                                       : launch_simt<T>(p, plan, blocks, stream);
  }
}

uint32_t reduce_blocks(int64_t count) {
  return static_cast<uint32_t>(std::min<int64_t>((count + kReduceThreads - 1) / kReduceThreads, INT32_MAX));
}

template <class T>
cudaError_t run(const GemmProblem& g, const Plan& plan, void* workspace, cudaStream_t stream) {
  using Acc = typename Accumulator<T>::type;
  const GemmParams p = params_of(g, plan, workspace);
  cudaError_t error = launch_gemm<T>(p, plan, stream);
  const int64_t outputs = g.groups * g.m * g.n, rows = g.groups * g.m;
  if (error == cudaSuccess && p.partials && outputs > 0) {
    CONV1X1_LAUNCH((reduce_partials<T>), dim3(reduce_blocks(outputs)), dim3(kReduceThreads), 0, stream, p);
    error = cudaGetLastError();
  }
  if (error == cudaSuccess && p.row_sums && rows > 0) {
    CONV1X1_LAUNCH((reduce_row_sums<T>), dim3(reduce_blocks(rows)), dim3(kReduceThreads), 0, stream,
                   static_cast<const Acc*>(p.row_sums), static_cast<T*>(g.row_sums.data), g.row_sums.stride, rows,
                   p.slices, g.row_sums_accumulate);
    error = cudaGetLastError();
  }
  return error;
}

template <class T>
cudaError_t run_pooled(const GemmProblem& g, const Plan& plan, const Pooling& pooling, void* workspace,
                       cudaStream_t stream) {
  using Acc = typename Accumulator<T>::type;
  GemmParams p = params_of(g, plan, nullptr);
  p.images = static_cast<uint32_t>(pooling.images);
  (g.pool_along_n ? p.b : p.a).image_stride = pooling.image_stride;
  p.pooled = workspace;
  p.pool_along_n = g.pool_along_n;
  p.pool_slots = static_cast<uint32_t>(pool_slots(g, plan));
  cudaError_t error = launch_gemm<T>(p, plan, stream);
  const int64_t channels = g.groups * (g.pool_along_n ? g.m : g.n), count = pooling.images * channels;
  if (error == cudaSuccess && count > 0) {
    CONV1X1_LAUNCH((reduce_pooled<T>), dim3(reduce_blocks(count)), dim3(kReduceThreads), 0, stream,
                   static_cast<const Acc*>(p.pooled), static_cast<T*>(pooling.out), count, channels, p.pool_slots,
                   static_cast<double>(pooling.pixels));
    error = cudaGetLastError();
  }
  return error;
}

}  // namespace

DeviceAxis device_axis(const Axis& axis) {
  DeviceAxis out;
  out.nd = axis.nd;
  for (int d = 0; d < axis.nd; ++d) {
    const int from = axis.nd - 1 - d;
    out.stride[d] = axis.stride[from];
    out.aux_stride[d] = axis.aux_stride[from];
    if (d + 1 < axis.nd) out.size[d] = FastDivmod(static_cast<uint32_t>(axis.size[from]));
  }
  return out;
}

int64_t pool_slots(const GemmProblem& g, const Plan& plan) {
  const int64_t passes = plan.kernel == Kernel::kSimt ? plan.block_m / kSimtRows : 1;
  return g.pool_along_n ? plan.tiles_n : plan.tiles_m * passes;
}

cudaError_t run_gemm(const GemmProblem& g, const Plan& plan, void* workspace, cudaStream_t stream) {
  return for_dtype(g.dtype, [&](auto zero) { return run<decltype(zero)>(g, plan, workspace, stream); });
}

cudaError_t run_pooled_gemm(const GemmProblem& g, const Plan& plan, const Pooling& pooling, void* workspace,
                            cudaStream_t stream) {
  return for_dtype(g.dtype, [&](auto zero) { return run_pooled<decltype(zero)>(g, plan, pooling, workspace, stream); });
}

}  // namespace conv1x1::cuda
