// What is not one GEMM: the masked copy, dgrad's zeros, and average pooling forward and backward.
#include <algorithm>

#include "epilogue.cuh"
#include "gemm_run.h"

namespace conv1x1::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kAlignment = 256;  // of workspaces, and of what lies in them

int64_t block_count(int64_t threads) { return (threads + kThreads - 1) / kThreads; }

struct CopyParams {
  const void* dy = nullptr;
  const void* y = nullptr;
  void* dz = nullptr;
  DeviceAxis from_row, from_col, to_row, to_col;  // aux of `from`: y
  int64_t rows = 0, cols = 0;
  Mask mask = Mask::kNone;
};

template <class T, int kChunk>
__global__ void __launch_bounds__(kThreads) masked_copy(const __grid_constant__ CopyParams p) {
  const int64_t chunks = p.cols / kChunk, i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= p.rows * chunks) return;
  const uint32_t row = static_cast<uint32_t>(i / chunks), col = static_cast<uint32_t>(i % chunks) * kChunk;
  const Offsets from_row = p.from_row.at(row), from_col = p.from_col.at(col);
  const auto dy = load_chunk<kChunk>(static_cast<const T*>(p.dy) + from_row.data + from_col.data);
  Chunk<T, kChunk> dz = dy;
  if (p.y) {
    const auto y = load_chunk<kChunk>(static_cast<const T*>(p.y) + from_row.aux + from_col.aux);
#pragma unroll
    for (int j = 0; j < kChunk; ++j)
      if (!passes(widen(y.value[j]), p.mask)) dz.value[j] = narrow<T>(typename Accumulator<T>::type(0));
  }
  *reinterpret_cast<Chunk<T, kChunk>*>(static_cast<T*>(p.dz) + p.to_row.at(row).data + p.to_col.at(col).data) = dz;
}

// z = dy / pixels * activation'(z), z dense: channels last, or (N, C, pixels).
template <class T>
__global__ void __launch_bounds__(kThreads)
    pool_gradient(T* z, const T* dy, int64_t dy_image, int64_t dy_channel, int64_t images, int64_t channels,
                  int64_t pixels, bool channels_last, Activation activation) {
  using Acc = typename Accumulator<T>::type;
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= images * channels * pixels) return;
  const int64_t image = i / (channels * pixels), channel = channels_last ? i % channels : i / pixels % channels;
  const Acc gradient = widen(dy[image * dy_image + channel * dy_channel]) / static_cast<Acc>(pixels);
  z[i] = narrow<T>(activation_gradient<Acc>(gradient, widen(z[i]), activation));
}

// out(row, col) = sums(row, col), rounded.
template <class T>
__global__ void __launch_bounds__(kThreads)
    round_sums(const float* sums, T* out, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i < rows * cols) out[i / cols * row_stride + i % cols * col_stride] = narrow<T>(sums[i]);
}

template <class T>
bool copies_in_chunks(const MaskedCopy& copy, int chunk) {
  const auto fits = [&](const Axis& axis, const int64_t* stride, bool inner) {
    bool ok = !inner || (stride[axis.nd - 1] == 1 && axis.inner_size() % chunk == 0);
    for (int d = 0; d < axis.nd - (inner ? 1 : 0); ++d) ok = ok && (axis.size[d] == 1 || stride[d] % chunk == 0);
    return ok;
  };
  const auto aligned = [&](const void* data) { return reinterpret_cast<intptr_t>(data) % (chunk * sizeof(T)) == 0; };
  const Matrix &from = copy.from, &to = copy.to;
  return fits(from.col, from.col.stride, true) && fits(from.col, from.col.aux_stride, true) &&
         fits(to.col, to.col.stride, true) && fits(from.row, from.row.stride, false) &&
         fits(from.row, from.row.aux_stride, false) && fits(to.row, to.row.stride, false) && aligned(from.data) &&
         aligned(from.aux) && aligned(to.data);
}

// The images of avg_pool's backward, a piece at a time. In the workspace: the pre-activation of a piece; then, where
// half types have several pieces, dw and dbias in float32, to be rounded once; then what a GEMM needs.
struct Pieces {
  int64_t images = 0;               // of a piece
  int64_t weights = 0, biases = 0;  // elements of the gradients that are wanted
  int64_t bytes = 0, sums = 0;      // of the pre-activation, and of the sums
  bool channels_last = false;
};

int64_t aligned(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

Pieces pieces_of(const Conv1x1Problem& p, const Device& device) {
  Pieces pieces;
  const int64_t image = std::max<int64_t>(1, p.c_out * p.pixels());
  const int64_t least = (device.tuning ? *device.tuning : kUntuned).pooled_piece;
  pieces.images = std::min(p.batch, std::max({int64_t{1}, least / image, (p.batch + 3) / 4}));
  pieces.weights = p.dw.data ? p.c_out * (p.c_in / p.groups) : 0;
  pieces.biases = p.dbias.data ? p.c_out : 0;
  pieces.bytes = aligned(pieces.images * image * dtype_size(p.dtype));
  const int64_t sum = static_cast<int64_t>(sizeof(float));
  if (dtype_size(p.dtype) == 2 && pieces.images < p.batch)
    pieces.sums = aligned((pieces.weights + pieces.biases) * sum);
  pieces.channels_last = p.x.stride[1] == 1;
  return pieces;
}

// The problem of one piece: its images, with its pre-activation at `workspace`.
Conv1x1Problem piece_of(const Conv1x1Problem& p, const Pieces& pieces, int64_t first, void* workspace) {
  Conv1x1Problem q = p;
  q.batch = std::min(pieces.images, p.batch - first);
  const auto advance = [&](ActivationView& view) {
    if (view.data) view.data = static_cast<char*>(view.data) + first * view.stride[0] * dtype_size(p.dtype);
  };
  advance(q.x);
  advance(q.dx);
  const int64_t pixels = p.pixels(), channel = pieces.channels_last ? 1 : pixels;
  const int64_t pixel = pieces.channels_last ? p.c_out : 1;
  q.y.data = workspace;
  const int64_t strides[5] = {p.c_out * pixels, channel, pixel * p.out_size[1] * p.out_size[2], pixel * p.out_size[2],
                              pixel};
  std::copy(strides, strides + 5, q.y.stride);
  q.residual = ActivationView();
  q.activation = Activation::kNone;
  q.accumulate_dw = first > 0;
  if (pieces.sums > 0) {
    float* sums = reinterpret_cast<float*>(static_cast<char*>(workspace) + pieces.bytes);
    if (p.dw.data) q.dw = {sums, p.c_in / p.groups, 1};
    if (p.dbias.data) q.dbias = {sums + pieces.weights, 1};
  }
  return q;
}

GemmProblem weight_gradient(const Conv1x1Problem& piece, const Pieces& pieces) {
  GemmProblem g = lower_wgrad(piece);
  if (pieces.sums > 0) g.out_dtype = DType::kFloat32;
  return g;
}

template <class T>
cudaError_t launch_round_sums(const Conv1x1Problem& p, const Pieces& pieces, const float* sums, cudaStream_t stream) {
  const int64_t in = p.c_in / p.groups;
  if (std::max(block_count(pieces.weights), block_count(pieces.biases)) > INT32_MAX)
    return cudaErrorInvalidConfiguration;
  if (pieces.weights > 0)
    CONV1X1_LAUNCH((round_sums<T>), dim3(static_cast<uint32_t>(block_count(pieces.weights))), dim3(kThreads), 0, stream,
                   sums, static_cast<T*>(p.dw.data), p.c_out, in, p.dw.stride_out, p.dw.stride_in);
  if (pieces.biases > 0)
    CONV1X1_LAUNCH((round_sums<T>), dim3(static_cast<uint32_t>(block_count(pieces.biases))), dim3(kThreads), 0, stream,
                   sums + pieces.weights, static_cast<T*>(p.dbias.data), int64_t{1}, p.c_out, int64_t{0},
                   p.dbias.stride);
  return cudaGetLastError();
}

Conv1x1Problem one_image(const Conv1x1Problem& p) {
  Conv1x1Problem q = p;
  q.batch = 1;
  return q;
}

GemmProblem pooled_problem(const Conv1x1Problem& p) { return lower_avg_pool(one_image(p)); }

}  // namespace

cudaError_t run_masked_copy(const MaskedCopy& copy, DType dtype, cudaStream_t stream) {
  CopyParams p;
  p.dy = copy.from.data;
  p.y = copy.from.aux;
  p.dz = copy.to.data;
  p.from_row = device_axis(copy.from.row);
  p.from_col = device_axis(copy.from.col);
  p.to_row = device_axis(copy.to.row);
  p.to_col = device_axis(copy.to.col);
  p.rows = copy.to.row.count;
  p.cols = copy.to.col.count;
  p.mask = copy.mask;
  if (p.rows * p.cols == 0) return cudaSuccess;
  return for_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int kVector = 16 / sizeof(T);
    const bool vectors = copies_in_chunks<T>(copy, kVector);
    const int64_t blocks = block_count(p.rows * (vectors ? p.cols / kVector : p.cols));
    if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
    if (vectors)
      CONV1X1_LAUNCH((masked_copy<T, kVector>), dim3(static_cast<uint32_t>(blocks)), dim3(kThreads), 0, stream, p);
    else
      CONV1X1_LAUNCH((masked_copy<T, 1>), dim3(static_cast<uint32_t>(blocks)), dim3(kThreads), 0, stream, p);
    return cudaGetLastError();
  });
}

cudaError_t run_zero_fill(const Conv1x1Problem& p, cudaStream_t stream) {
  const int64_t bytes = p.batch * p.c_in * p.in_size[0] * p.in_size[1] * p.in_size[2] * dtype_size(p.dtype);
  return bytes == 0 ? cudaSuccess : cudaMemsetAsync(p.dx.data, 0, static_cast<size_t>(bytes), stream);
}

std::string describe_avg_pool(const Conv1x1Problem& p, const Device& device, bool allow_tf32) {
  const GemmProblem g = pooled_problem(p);
  return describe(g, device, make_plan(g, device, allow_tf32, p.batch, p.x.stride[0])) +
         "\nimages=" + std::to_string(p.batch) + ", each a GEMM of its own";
}

int64_t avg_pool_workspace(const Conv1x1Problem& p, const Device& device, bool allow_tf32) {
  const GemmProblem g = pooled_problem(p);
  const Plan plan = make_plan(g, device, allow_tf32, p.batch, p.x.stride[0]);
  return plan.workspace + p.batch * pool_slots(g, plan) * p.c_out * (p.dtype == DType::kFloat64 ? 8 : 4);
}

cudaError_t run_avg_pool(const Conv1x1Problem& p, void* out, const Device& device, bool allow_tf32, void* workspace,
                         cudaStream_t stream) {
  const GemmProblem g = pooled_problem(p);
  const Plan plan = make_plan(g, device, allow_tf32, p.batch, p.x.stride[0]);
  return run_pooled_gemm(g, plan, {out, p.batch, p.x.stride[0], p.pixels()}, workspace, stream);
}

int64_t avg_pool_backward_workspace(const Conv1x1Problem& p, const Device& device, bool allow_tf32) {
  const Pieces pieces = pieces_of(p, device);
  int64_t gemm = 0;
  const auto count = [&](const GemmProblem& g) { gemm = std::max(gemm, make_plan(g, device, allow_tf32).workspace); };
  // Every piece is planned: a smaller one may be split into more slices, and a piece may begin at an odd address.
  for (int64_t first = 0; first < std::max<int64_t>(1, p.batch); first += std::max<int64_t>(1, pieces.images)) {
    Conv1x1Problem q = piece_of(p, pieces, first, planned_address());
    count(lower_fprop(q));
    q.dy = q.y;
    if (p.dx.data) count(lower_dgrad(q));
    if (p.dw.data || p.dbias.data) count(weight_gradient(q, pieces));
  }
  return pieces.bytes + pieces.sums + gemm;
}

cudaError_t run_avg_pool_backward(const Conv1x1Problem& p, const Device& device, bool allow_tf32, void* workspace,
                                  cudaStream_t stream) {
  const Pieces pieces = pieces_of(p, device);
  char* const sums = static_cast<char*>(workspace) + pieces.bytes;
  void* gemm_workspace = sums + pieces.sums;
  const auto run = [&](const GemmProblem& g) {
    return run_gemm(g, make_plan(g, device, allow_tf32), gemm_workspace, stream);
  };
  return for_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    const int64_t pixels = p.pixels();
    for (int64_t first = 0; first < std::max<int64_t>(1, p.batch); first += std::max<int64_t>(1, pieces.images)) {
      Conv1x1Problem q = piece_of(p, pieces, first, workspace);
      cudaError_t error = run(lower_fprop(q));
      const int64_t elements = q.batch * p.c_out * pixels;
      if (error == cudaSuccess && elements > 0) {
        if (block_count(elements) > INT32_MAX) return cudaErrorInvalidConfiguration;
        CONV1X1_LAUNCH((pool_gradient<T>), dim3(static_cast<uint32_t>(block_count(elements))), dim3(kThreads), 0,
                       stream, static_cast<T*>(workspace), static_cast<const T*>(p.dy.data) + first * p.dy.stride[0],
                       p.dy.stride[0], p.dy.stride[1], q.batch, p.c_out, pixels, pieces.channels_last, p.activation);
        error = cudaGetLastError();
      }
      q.dy = q.y;
      q.bias = VectorView();
      if (error == cudaSuccess && p.dx.data) error = run(lower_dgrad(q));
      if (error == cudaSuccess && (p.dw.data || p.dbias.data)) error = run(weight_gradient(q, pieces));
      if (error != cudaSuccess) return error;
    }
    if constexpr (sizeof(T) == 2)
      if (pieces.sums > 0) return launch_round_sums<T>(p, pieces, reinterpret_cast<const float*>(sums), stream);
    return cudaSuccess;
  });
}

}  // namespace conv1x1::cuda
