// GemmProblem + Plan -> kernel launches: the parameters, the GEMM itself, and its reductions. Every launch is checked;
// nothing synchronises.
#include <algorithm>
#include <cmath>

#include "gemm_run.h"
#include "heuristics.h"
#include "kernels.h"
#include "reduce.cuh"
#include "repack.cuh"

namespace conv1x1::cuda {
namespace {

int log2_of(int power) {
  int log2 = 0;
  while ((1 << log2) < power) ++log2;
  return log2;
}

// A or B of a problem, and what the plan says about it. `images` > 1: each image is a GEMM of its own. They lie
// `image_stride` elements apart in the operand that is not the weight.
struct Side {
  const Matrix& matrix;
  const Axis &mn, &k;
  bool k_unit;
  int chunk;
  const Repack& repack;
  int64_t images, image_stride;
};

Side side_a(const GemmProblem& g, const Plan& plan, int64_t images, int64_t image_stride) {
  return {g.a,
          g.a.row,
          g.a.col,
          plan.a_k_unit,
          plan.a_chunk,
          plan.a_repack,
          g.a_is_weight ? 1 : images,
          g.a_is_weight ? 0 : image_stride};
}

Side side_b(const GemmProblem& g, const Plan& plan, int64_t images, int64_t image_stride) {
  return {g.b,
          g.b.col,
          g.b.row,
          plan.b_k_unit,
          plan.b_chunk,
          plan.b_repack,
          g.b_is_weight ? 1 : images,
          g.b_is_weight ? 0 : image_stride};
}

Operand operand_of(const GemmProblem& g, const Side& side, void* workspace) {
  Operand o;
  o.data = side.matrix.data;
  o.aux = g.mask == Mask::kNone ? nullptr : side.matrix.aux;
  o.mn = device_axis(side.mn);
  o.k = device_axis(side.k);
  o.mn_count = side.matrix.data ? static_cast<uint32_t>(side.mn.count) : 0;
  o.k_unit = side.k_unit;
  o.chunk_log2 = log2_of(side.chunk);
  o.group_stride = side.matrix.group_stride;
  o.aux_group_stride = side.matrix.aux_group_stride;
  o.image_stride = side.image_stride;
  if (side.repack.needed) {
    const int64_t pitch = side.repack.pitch;
    o.data = static_cast<char*>(workspace) + side.repack.at;
    o.aux = nullptr;
    o.mn = o.k = DeviceAxis();
    o.mn.stride[0] = side.k_unit ? pitch : 1;
    o.k.stride[0] = side.k_unit ? 1 : pitch;
    if (!side.k_unit && o.mn_count > 0) o.mn_count = static_cast<uint32_t>(pitch);
    const int64_t slab = (side.k_unit ? side.mn : side.k).count * pitch;
    o.image_stride = side.images > 1 ? slab : 0;
    o.group_stride = side.images * slab;
  }
  if (!side.matrix.data) {  // nothing is read; addresses stay aligned
    o.mn = o.k = DeviceAxis();
    o.group_stride = o.aux_group_stride = o.image_stride = 0;
  }
  const bool vectors = side.chunk == 16 / static_cast<int>(dtype_size(g.dtype));
  o.streams = (vectors || !side.k_unit) && o.k.nd == 1 && o.mn_count > 0;
  return o;
}

GemmParams params_of(const GemmProblem& g, const Plan& plan, void* workspace, int64_t images = 1,
                     int64_t image_stride = 0) {
  GemmParams p;
  p.a = operand_of(g, side_a(g, plan, images, image_stride), workspace);
  p.b = operand_of(g, side_b(g, plan, images, image_stride), workspace);
  p.images = static_cast<uint32_t>(images);
  p.mask = p.a.aux || p.b.aux ? g.mask : Mask::kNone;
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
  p.activation = g.activation;
  p.lower = g.activation == Activation::kNone ? -INFINITY : 0.0f;
  p.upper = g.activation == Activation::kReLU6 ? 6.0f : INFINITY;
  p.rare = g.pools || !masks_from_output(g.activation);
  p.bias = g.bias.data;
  p.bias_stride = g.bias.stride;
  p.bias_along_m = g.bias_along_m;
  if (plan.partials) p.partials = workspace;
  if (plan.row_sums) p.row_sums = static_cast<char*>(workspace) + plan.partials;
  return p;
}

template <class T>
cudaError_t launch_gemm(const GemmParams& params, const Plan& plan, cudaStream_t stream) {
  const uint32_t blocks = params.tiles_m * params.tiles_n * params.groups * params.images * params.slices;
  if (blocks == 0) return cudaSuccess;
  GemmParams p = params;
  p.inner_tiles = FastDivmod(p.m_fastest ? p.tiles_m : p.tiles_n);
  p.outer_tiles = FastDivmod(p.m_fastest ? p.tiles_n : p.tiles_m);
  p.per_group = FastDivmod(p.groups);
  p.per_image = FastDivmod(p.images);
  if constexpr (sizeof(T) == 8) {
    return launch_simt<T>(p, plan, blocks, stream);
  } else {
    return plan.kernel == Kernel::kMma ? launch_mma<T>(p, plan, blocks, stream)
                                       : launch_simt<T>(p, plan, blocks, stream);
  }
}

template <class T>
cudaError_t launch_repack(const GemmProblem& g, const Side& side, void* workspace, cudaStream_t stream) {
  if (!side.repack.needed || !side.matrix.data) return cudaSuccess;
  const Axis &unit = side.k_unit ? side.k : side.mn, &other = side.k_unit ? side.mn : side.k;
  RepackParams p;
  p.from = side.matrix.data;
  p.aux = g.mask == Mask::kNone ? nullptr : side.matrix.aux;
  p.to = static_cast<char*>(workspace) + side.repack.at;
  p.unit = device_axis(unit);
  p.other = device_axis(other);
  p.units = static_cast<uint32_t>(unit.count);
  p.others = static_cast<uint32_t>(other.count);
  p.chunks = static_cast<uint32_t>(side.repack.pitch * static_cast<int64_t>(sizeof(T)) / 16);
  p.images = static_cast<uint32_t>(side.images);
  p.rows = g.groups * side.images * other.count;
  p.group_stride = side.matrix.group_stride;
  p.aux_group_stride = side.matrix.aux_group_stride;
  p.image_stride = side.image_stride;
  p.mask = g.mask;
  const int64_t blocks = (p.rows * p.chunks + kRepackThreads - 1) / kRepackThreads;
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  CONV1X1_LAUNCH((repack<T>), dim3(static_cast<uint32_t>(blocks)), dim3(kRepackThreads), 0, stream, p);
  return cudaGetLastError();
}

// Copies the operands that need it into the workspace.
template <class T>
cudaError_t launch_repacks(const GemmProblem& g, const Plan& plan, int64_t images, int64_t image_stride,
                           void* workspace, cudaStream_t stream) {
  const cudaError_t error = launch_repack<T>(g, side_a(g, plan, images, image_stride), workspace, stream);
  return error != cudaSuccess ? error : launch_repack<T>(g, side_b(g, plan, images, image_stride), workspace, stream);
}

uint32_t reduce_blocks(int64_t count) {
  return static_cast<uint32_t>(std::min<int64_t>((count + kReduceThreads - 1) / kReduceThreads, INT32_MAX));
}

// The second passes, whose results are of type T.
template <class T>
cudaError_t join_slices(const GemmProblem& g, const GemmParams& p, cudaStream_t stream) {
  using Acc = typename Accumulator<T>::type;
  cudaError_t error = cudaSuccess;
  const int64_t outputs = g.groups * g.m * g.n, rows = g.groups * g.m;
  if (p.partials && outputs > 0) {
    constexpr int kCount = 16 / sizeof(Acc);
    if (p.n % kCount == 0)
      CONV1X1_LAUNCH((reduce_partials<T, kCount>), dim3(reduce_blocks(outputs / kCount)), dim3(kReduceThreads), 0,
                     stream, p);
    else
      CONV1X1_LAUNCH((reduce_partials<T, 1>), dim3(reduce_blocks(outputs)), dim3(kReduceThreads), 0, stream, p);
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
cudaError_t run(const GemmProblem& g, const Plan& plan, void* workspace, cudaStream_t stream) {
  const GemmParams p = params_of(g, plan, workspace);
  cudaError_t error = launch_repacks<T>(g, plan, 1, 0, workspace, stream);
  if (error == cudaSuccess) error = launch_gemm<T>(p, plan, stream);
  if (error != cudaSuccess) return error;
  return g.out_dtype == g.dtype ? join_slices<T>(g, p, stream)
                                : join_slices<typename Accumulator<T>::type>(g, p, stream);
}

template <class T>
cudaError_t run_pooled(const GemmProblem& g, const Plan& plan, const Pooling& pooling, void* workspace,
                       cudaStream_t stream) {
  using Acc = typename Accumulator<T>::type;
  GemmParams p = params_of(g, plan, workspace, pooling.images, pooling.image_stride);
  p.pooled = static_cast<char*>(workspace) + plan.workspace;
  p.pool_along_n = g.pool_along_n;
  p.pool_slots = static_cast<uint32_t>(pool_slots(g, plan));
  cudaError_t error = launch_repacks<T>(g, plan, pooling.images, pooling.image_stride, workspace, stream);
  if (error == cudaSuccess) error = launch_gemm<T>(p, plan, stream);
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
  // The stride of a single index is never used for data. Zero keeps the pointers that are computed with it aligned.
  if (axis.count == 1) out.stride[0] = out.aux_stride[0] = 0;
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
