#include "avg_pool.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <type_traits>

#include "parallel.h"

namespace conv1x1 {
namespace {

// Elements of the recomputed pre-activation held at a time. Fixed: the order in which dw is summed depends on it.
constexpr int64_t kChunk = 1 << 20;

constexpr int64_t kWorthThreads = 1 << 14, kBytesWorthThreads = 1 << 18;  // from which a pass starts threads

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<void, Free>;

Axis line(int64_t count, int64_t stride) {
  Axis axis;
  axis.count = axis.size[0] = count;
  axis.stride[0] = stride;
  return axis;
}

void* at(const Conv1x1Problem& p, void* base, int64_t offset) {
  return static_cast<char*>(base) + offset * dtype_size(p.dtype);
}

// The derivative at z, for a z at which the activation does not hold the gradient back.
template <Activation activation, class T>
T derivative(T z) {
  switch (activation) {
    case Activation::kSiLU: {
      const T s = T(1) / (T(1) + std::exp(-z));
      return s * (T(1) + z * (T(1) - s));
    }
    case Activation::kHardswish: return z < T(3) ? z / T(3) + T(0.5) : T(1);
    case Activation::kGELU: {
      const T cdf = T(0.5) * (T(1) + std::erf(z * T(0.70710678118654752440)));
      return cdf + z * T(0.39894228040143267794) * std::exp(T(-0.5) * z * z);
    }
    case Activation::kNone:
    case Activation::kReLU:
    case Activation::kReLU6: break;
  }
  return T(1);
}

// grad where z lets it pass, else zero, even if grad is NaN, as in torch. It masks the bits of grad, because compilers
// make a branch of a choice, which is mispredicted every other time.
template <Activation activation, class T>
T passed(T z, T grad) {
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  Bits bits;
  std::memcpy(&bits, &grad, sizeof bits);
  constexpr T lower = activation == Activation::kHardswish ? T(-3) : T(0);
  const int passes =
      static_cast<int>(!(z <= lower)) & static_cast<int>(activation != Activation::kReLU6 || !(z >= T(6)));
  bits &= Bits(0) - static_cast<Bits>(passes);
  std::memcpy(&grad, &bits, sizeof bits);
  return grad;
}

// z <- activation'(z) * grad * scale, with one gradient for each z or one for all. Each activation has a loop of its
// own: compilers do not vectorize a loop with a switch inside.
template <class T>
using DifferentiateFn = void (*)(T* z, const T* grad, bool one_grad, int64_t n, T scale);

template <Activation activation, class T>
void differentiate_row(T* z, const T* grad, bool one_grad, int64_t n, T scale) {
  const auto times = [scale](T at, T g) {
    const T grad = derivative<activation>(at) * g * scale;
    constexpr bool holds_back =
        activation == Activation::kReLU || activation == Activation::kReLU6 || activation == Activation::kHardswish;
    if constexpr (holds_back)
      return passed<activation>(at, grad);
    else
      return grad;
  };
  const T first = grad[0];
  if (one_grad)
    for (int64_t j = 0; j < n; ++j) z[j] = times(z[j], first);
  else
    for (int64_t j = 0; j < n; ++j) z[j] = times(z[j], grad[j]);
}

template <class T>
DifferentiateFn<T> differentiate_fn(Activation activation) {
  switch (activation) {
    case Activation::kReLU: return differentiate_row<Activation::kReLU, T>;
    case Activation::kReLU6: return differentiate_row<Activation::kReLU6, T>;
    case Activation::kSiLU: return differentiate_row<Activation::kSiLU, T>;
    case Activation::kHardswish: return differentiate_row<Activation::kHardswish, T>;
    case Activation::kGELU: return differentiate_row<Activation::kGELU, T>;
    case Activation::kNone: break;
  }
  return differentiate_row<Activation::kNone, T>;
}

// A piece of the batch: images [n0, n0 + n) and a box of their pixels.
struct Piece {
  int64_t begin[4], size[4];  // N D H W
};

// Cuts (N, D, H, W) into pieces of at most `limit` positions: whole inner dimensions where they fit.
template <class F>
void for_each_piece(const Conv1x1Problem& p, int64_t limit, const F& f) {
  const int64_t whole[4] = {p.batch, p.out_size[0], p.out_size[1], p.out_size[2]};
  int cut = 0;  // the dimension that is cut into runs; dimensions before it are cut into single indices
  int64_t inner = whole[1] * whole[2] * whole[3];
  while (cut < 3 && inner > limit) inner /= std::max<int64_t>(whole[++cut], 1);
  const int64_t run = std::max<int64_t>(limit / std::max<int64_t>(inner, 1), 1);
  int64_t outer = 1;
  for (int d = 0; d < cut; ++d) outer *= whole[d];
  for (int64_t o = 0; o < outer; ++o)
    for (int64_t i = 0; i < whole[cut]; i += run) {
      Piece piece;
      int64_t rest = o;
      for (int d = 3; d >= 0; --d) {
        piece.begin[d] = 0;
        piece.size[d] = d < cut ? 1 : whole[d];
        if (d < cut) {
          piece.begin[d] = rest % whole[d];
          rest /= whole[d];
        }
      }
      piece.begin[cut] = i;
      piece.size[cut] = std::min(run, whole[cut] - i);
      f(piece);
    }
}

int64_t offset_of(const ActivationView& t, const Piece& piece) {
  int64_t offset = piece.begin[0] * t.stride[0];
  for (int d = 1; d < 4; ++d) offset += piece.begin[d] * t.stride[d + 1];
  return offset;
}

// z <- activation'(z) * dy(image, channel) / pixels, z dense as rows of `width` that share an image, or a pixel. With
// the forward's mask, z is only written. `first` is the number of the piece's first pixel.
template <class T>
void differentiate(const Conv1x1Problem& p, void* z, int64_t images, int64_t first, int64_t pixels, bool channels_last,
                   int threads, const Microkernel& kernel) {
  const int storage = static_cast<int>(p.dtype);
  const int64_t of_group = p.c_out / p.groups;
  const T scale = T(1) / static_cast<T>(p.pixels());
  const DifferentiateFn<T> differentiate_row = differentiate_fn<T>(p.activation);
  const int64_t rows = images * (channels_last ? pixels : p.c_out), width = channels_last ? p.c_out : pixels;
  parallel_for(rows, rows * width > kWorthThreads ? threads : 1, [&](int64_t r) {
    constexpr int64_t kWidth = 256;
    T value[kWidth], grad[kWidth];
    const int64_t image = first / p.pixels() + r / (channels_last ? pixels : p.c_out),
                  channel = channels_last ? 0 : r % p.c_out;
    for (int64_t c = 0, n; c < width; c += n) {
      n = std::min(kWidth, width - c);
      if (p.pool_mask && channels_last) n = std::min(n, of_group - c % of_group);
      void* row = at(p, z, r * width + c);
      void* dy = at(p, p.dy.data, image * p.dy.stride[0] + (channel + (channels_last ? c : 0)) * p.dy.stride[1]);
      const Axis along = channels_last ? line(n, p.dy.stride[1]) : line(1, 1);
      kernel.gather[storage](grad, kWidth, dy, nullptr, line(1, 0), 0, 1, along, 0, along.count, Mask::kNone);
      if (p.pool_mask) {
        const int64_t bit = channels_last ? (c / of_group * p.batch * p.pixels() + first + r) * of_group + c % of_group
                                          : channel * p.batch * p.pixels() + first + r / p.c_out * pixels + c;
        kernel.take_bits(value, p.pool_mask, bit, n, grad, !channels_last, static_cast<double>(scale));
      } else {
        kernel.gather[storage](value, kWidth, row, nullptr, line(1, 0), 0, 1, line(n, 1), 0, n, Mask::kNone);
        differentiate_row(value, grad, !channels_last, n, scale);
      }
      kernel.unpack[storage](row, line(1, 0), 0, 1, line(n, 1), 0, n, value, kWidth);
    }
  });
}

}  // namespace

Status avg_pool(const Conv1x1Problem& p, void* out, int threads, const KernelSet& kernels) {
  const int64_t count = p.batch * p.c_out;
  if (count == 0) return kOk;
  Buffer memory(std::calloc(static_cast<size_t>(count), sizeof(double)));
  double* sums = static_cast<double*>(memory.get());
  if (!sums) return kOutOfMemory;
  GemmProblem g = lower_avg_pool(p);
  g.pool = sums;
  const Status status = run_gemm(g, threads, kernels);
  const double pixels = static_cast<double>(p.pixels());
  const UnpackFn unpack = kernels.for_dtype(p.dtype).unpack[static_cast<int>(p.dtype)];
  constexpr int64_t kTogether = 64;
  for (int64_t i = 0; i < count; i += kTogether) {
    const int64_t n = std::min(kTogether, count - i);
    double means[kTogether];
    float rounded[kTogether];
    for (int64_t j = 0; j < n; ++j) {
      means[j] = sums[i + j] / pixels;
      rounded[j] = static_cast<float>(means[j]);
    }
    const void* values = p.dtype == DType::kFloat64 ? static_cast<const void*>(means) : rounded;
    unpack(at(p, out, i), line(1, 0), 0, 1, line(n, 1), 0, n, values, n);
  }
  return status;
}

Status avg_pool_backward(const Conv1x1Problem& p, int threads, const KernelSet& kernels) {
  const Microkernel& kernel = kernels.for_dtype(p.dtype);
  const bool channels_last = !lower_avg_pool(p).pool_along_n;
  const bool recomputes = !p.pool_mask && p.activation != Activation::kNone;
  const int64_t limit = std::max<int64_t>(kChunk / p.c_out, 1);
  Buffer z(std::malloc(static_cast<size_t>(std::min(limit, p.batch * p.pixels()) * p.c_out * dtype_size(p.dtype))));
  // Pieces of half types are added up in float32 and rounded once.
  const int64_t weights = p.dw.data ? p.c_out * (p.c_in / p.groups) : 0, biases = p.dbias.data ? p.c_out : 0;
  const bool half = p.dtype != kernel.dtype;
  Buffer sums(half ? std::calloc(static_cast<size_t>(weights + biases) + 1, sizeof(float)) : nullptr);
  if ((!z && p.batch * p.pixels() > 0) || (half && !sums)) return kOutOfMemory;
  Status status = kOk;
  for_each_piece(p, limit, [&](const Piece& piece) {
    Conv1x1Problem q = p;
    q.batch = piece.size[0];
    for (int d = 0; d < 3; ++d) q.in_size[d] = q.out_size[d] = piece.size[d + 1];
    q.x.data = at(p, p.x.data, offset_of(p.x, piece));
    q.activation = Activation::kNone;
    const int64_t pixels = q.pixels();
    ActivationView dense;
    dense.data = z.get();
    dense.stride[0] = pixels * p.c_out;
    dense.stride[1] = channels_last ? 1 : pixels;
    dense.stride[4] = channels_last ? p.c_out : 1;
    dense.stride[3] = dense.stride[4] * q.out_size[2];
    dense.stride[2] = dense.stride[3] * q.out_size[1];
    q.y = dense;
    q.dy = dense;
    const auto gemm = [&](const GemmProblem& g) {
      if (status == kOk) status = run_gemm(g, threads, kernels);
    };
    if (recomputes) gemm(lower_fprop(q));
    if (status != kOk) return;
    const int64_t first = piece.begin[0] * p.pixels() +
                          (piece.begin[1] * p.out_size[1] + piece.begin[2]) * p.out_size[2] + piece.begin[3];
    if (kernel.dtype == DType::kFloat64)
      differentiate<double>(p, z.get(), q.batch, first, pixels, channels_last, threads, kernel);
    else
      differentiate<float>(p, z.get(), q.batch, first, pixels, channels_last, threads, kernel);
    if (p.dx.data) {
      q.dx.data = at(p, p.dx.data, offset_of(p.dx, piece));
      gemm(lower_dgrad(q));
    }
    if (weights + biases > 0) {
      q.accumulate_dw = true;
      if (half) {
        if (p.dw.data) q.dw = {sums.get(), p.c_in / p.groups, 1};
        if (p.dbias.data) q.dbias = {static_cast<float*>(sums.get()) + weights, 1};
      }
      GemmProblem g = lower_wgrad(q);
      g.out_dtype = kernel.dtype;
      gemm(g);
    }
  });
  if (status == kOk && half) {
    const UnpackFn unpack = kernel.unpack[static_cast<int>(p.dtype)];
    const int64_t in = p.c_in / p.groups;
    if (weights)
      unpack(p.dw.data, line(p.c_out, p.dw.stride_out), 0, p.c_out, line(in, p.dw.stride_in), 0, in, sums.get(), in);
    if (biases)
      unpack(p.dbias.data, line(1, 0), 0, 1, line(biases, 1), 0, biases, static_cast<float*>(sums.get()) + weights,
             biases);
  }
  return status;
}

void mask_grad(const Conv1x1Problem& p, const ActivationView& dz, int threads, const KernelSet& kernels) {
  const MaskedCopy copy = lower_mask(p, dz);
  const Microkernel& kernel = kernels.for_dtype(p.dtype);
  const int storage = static_cast<int>(p.dtype);
  const Mask mask = copy.from.aux ? copy.mask : Mask::kNone;
  constexpr int64_t kRows = 16, kCols = 128;
  const int64_t rows = copy.to.row.count, cols = copy.to.col.count, blocks = (rows + kRows - 1) / kRows;
  parallel_for(blocks, rows * cols > kWorthThreads ? threads : 1, [&](int64_t b) {
    alignas(64) double staged[kRows * kCols];
    const int64_t r = b * kRows, nr = std::min(kRows, rows - r);
    for (int64_t c = 0; c < cols; c += kCols) {
      const int64_t nc = std::min(kCols, cols - c);
      kernel.gather[storage](staged, kCols, copy.from.data, copy.from.aux, copy.from.row, r, nr, copy.from.col, c, nc,
                             mask);
      kernel.unpack[storage](copy.to.data, copy.to.row, r, nr, copy.to.col, c, nc, staged, kCols);
    }
  });
}

void zero_fill(const Conv1x1Problem& p, int threads) {
  const int64_t bytes = p.batch * p.c_in * p.in_size[0] * p.in_size[1] * p.in_size[2] * dtype_size(p.dtype);
  char* base = static_cast<char*>(p.dx.data);
  run_team(bytes > kBytesWorthThreads ? threads : 1, [&](int thread, int team, auto /*barrier*/) {
    const Range mine = share(bytes, team, thread);
    std::memset(base + mine.begin, 0, static_cast<size_t>(mine.end - mine.begin));
  });
}

}  // namespace conv1x1
