// Conv1x1Problem -> GemmProblem: which tensor is A, B and D, and along which axes. No arithmetic happens here.
//
//            layout of D       m       n       k       A          B         D
//   fprop    NCHW              C_out   pixels  C_in    W          x         y
//            channels last     pixels  C_out   C_in    x          W^T       y
//   dgrad    NCHW              C_in    pixels  C_out   W^T        dz        dx
//            channels last     pixels  C_in    C_out   dz         W         dx
//   wgrad    any               C_out   C_in    pixels  dz         x^T       dw
// dz is dy under the mask of the saved output y: the mask is applied as dy is packed.
#include <initializer_list>

#include "gemm.h"

namespace conv1x1 {
namespace {

Axis make_axis(const int64_t* sizes, const int64_t* strides, const int64_t* aux, int nd) {
  Axis axis;
  axis.nd = 0;
  axis.count = 1;
  for (int d = 0; d < nd; ++d) {
    axis.count *= sizes[d];
    if (sizes[d] == 1) continue;
    const int64_t a = aux ? aux[d] : 0;
    const int last = axis.nd - 1;
    if (last >= 0 && axis.stride[last] == strides[d] * sizes[d] && axis.aux_stride[last] == a * sizes[d]) {
      axis.size[last] *= sizes[d];
      axis.stride[last] = strides[d];
      axis.aux_stride[last] = a;
    } else {
      axis.size[axis.nd] = sizes[d];
      axis.stride[axis.nd] = strides[d];
      axis.aux_stride[axis.nd] = a;
      ++axis.nd;
    }
  }
  if (axis.nd == 0) {  // one element: any stride is right, and 1 enables the fast paths
    axis.nd = 1;
    axis.size[0] = 1;
    axis.stride[0] = axis.aux_stride[0] = 1;
  }
  return axis;
}

Axis linear(int64_t count, int64_t stride, int64_t aux) { return make_axis(&count, &stride, &aux, 1); }

// The output's pixels as an axis of a tensor of the output's size or, with the convolution's stride, of the input's
// size.
Axis pixel_axis(const Conv1x1Problem& p, const ActivationView& t, const ActivationView* aux, bool input_sized) {
  const int64_t sizes[4] = {p.batch, p.out_size[0], p.out_size[1], p.out_size[2]};
  int64_t strides[4], aux_strides[4];
  for (int d = 0; d < 4; ++d) {
    const int64_t step = input_sized && d > 0 ? p.stride[d - 1] : 1;
    const int64_t from = d == 0 ? 0 : d + 1;
    strides[d] = t.stride[from] * step;
    aux_strides[d] = aux ? aux->stride[from] * step : 0;
  }
  return make_axis(sizes, strides, aux ? aux_strides : nullptr, 4);
}

// An activation tensor as a matrix, channels by pixels, of one group.
Matrix activation_matrix(const Conv1x1Problem& p, const ActivationView& t, const ActivationView* aux, int64_t channels,
                         bool input_sized) {
  Matrix matrix;
  if (aux && !aux->data) aux = nullptr;
  matrix.data = t.data;
  matrix.aux = aux ? aux->data : nullptr;
  matrix.row = linear(channels, t.stride[1], aux ? aux->stride[1] : 0);
  matrix.col = pixel_axis(p, t, aux, input_sized);
  matrix.group_stride = channels * t.stride[1];
  matrix.aux_group_stride = aux ? channels * aux->stride[1] : 0;
  return matrix;
}

Matrix weight_matrix(const WeightView& w, int64_t rows, int64_t row_stride, int64_t cols, int64_t col_stride,
                     int64_t group_stride) {
  Matrix matrix;
  matrix.data = w.data;
  matrix.row = linear(rows, row_stride, 0);
  matrix.col = linear(cols, col_stride, 0);
  matrix.group_stride = group_stride;
  return matrix;
}

Matrix transposed(Matrix matrix) {
  const Axis row = matrix.row;
  matrix.row = matrix.col;
  matrix.col = row;
  return matrix;
}

constexpr int64_t kNarrow = 16;

bool is_narrow(const Conv1x1Problem& p) { return p.c_in / p.groups <= kNarrow || p.c_out / p.groups <= kNarrow; }

// out(channel, pixel) = sum_k w(channel, k) * in(k, pixel), n, along which vectors run, is the index along which `unit`
// is contiguous.
GemmProblem pixelwise(const Conv1x1Problem& p, const Matrix& w, const Matrix& in, const Matrix& out,
                      const Matrix& unit) {
  GemmProblem g;
  g.dtype = g.out_dtype = p.dtype;
  g.groups = p.groups;
  g.k = in.row.count;
  g.narrow = is_narrow(p);
  const int64_t channels = w.row.count, pixels = in.col.count;
  const bool pixels_unit = unit.col.inner_stride() == 1, channels_unit = unit.row.inner_stride() == 1;
  const bool pixels_are_n = pixels_unit && channels_unit ? pixels >= channels : !channels_unit;
  if (pixels_are_n) {
    g.m = channels;
    g.n = pixels;
    g.a = w;
    g.b = in;
    g.d = out;
    g.m_segment = channels;
    g.n_segment = p.pixels();
    g.a_is_weight = true;
  } else {
    g.m = pixels;
    g.n = channels;
    g.a = transposed(in);
    g.b = transposed(w);
    g.d = transposed(out);
    g.m_segment = p.pixels();
    g.n_segment = channels;
    g.b_is_weight = true;
  }
  g.bias_along_m = pixels_are_n;
  return g;
}

Mask mask_of(Activation activation) {
  if (activation == Activation::kReLU) return Mask::kReLU;
  if (activation == Activation::kReLU6) return Mask::kReLU6;
  return Mask::kNone;
}

}  // namespace

GemmProblem lower_fprop(const Conv1x1Problem& p) {
  const int64_t in = p.c_in / p.groups, out = p.c_out / p.groups;
  const Matrix w = weight_matrix(p.w, out, p.w.stride_out, in, p.w.stride_in, out * p.w.stride_out);
  const Matrix x = activation_matrix(p, p.x, nullptr, in, true), y = activation_matrix(p, p.y, &p.residual, out, false);
  GemmProblem g = pixelwise(p, w, x, y, y);
  g.activation = p.activation;
  g.bias = p.bias;
  return g;
}

GemmProblem lower_avg_pool(const Conv1x1Problem& p) {
  const int64_t in = p.c_in / p.groups, out = p.c_out / p.groups;
  const Matrix w = weight_matrix(p.w, out, p.w.stride_out, in, p.w.stride_in, out * p.w.stride_out);
  const Matrix x = activation_matrix(p, p.x, nullptr, in, true);
  GemmProblem g = pixelwise(p, w, x, Matrix(), x);
  g.activation = p.activation;
  g.bias = p.bias;
  g.pools = true;
  g.pool_mask = p.pool_mask;
  g.pool_along_n = g.bias_along_m;
  return g;
}

GemmProblem lower_dgrad(const Conv1x1Problem& p) {
  const int64_t in = p.c_in / p.groups, out = p.c_out / p.groups;
  const Mask mask = mask_of(p.activation);
  const Matrix wt = weight_matrix(p.w, in, p.w.stride_in, out, p.w.stride_out, out * p.w.stride_out);
  const Matrix dz = activation_matrix(p, p.dy, mask == Mask::kNone ? nullptr : &p.y, out, false);
  const Matrix dx = activation_matrix(p, p.dx, nullptr, in, true);
  GemmProblem g = pixelwise(p, wt, dz, dx, dx);
  g.mask = mask;
  return g;
}

GemmProblem lower_wgrad(const Conv1x1Problem& p) {
  const int64_t in = p.c_in / p.groups, out = p.c_out / p.groups;
  GemmProblem g;
  g.dtype = g.out_dtype = p.dtype;
  g.groups = p.groups;
  g.mask = mask_of(p.activation);
  g.a = activation_matrix(p, p.dy, g.mask == Mask::kNone ? nullptr : &p.y, out, false);
  g.m = g.m_segment = out;
  g.k = g.a.col.count;
  g.split_k = true;
  g.narrow = is_narrow(p);
  if (p.dw.data) {
    g.b = transposed(activation_matrix(p, p.x, nullptr, in, true));
    g.d = weight_matrix(p.dw, out, p.dw.stride_out, in, p.dw.stride_in, out * p.dw.stride_out);
    g.n = g.n_segment = in;
    if (p.accumulate_dw) {  // the old dw is a residual at the address of the result
      g.d.aux = g.d.data;
      g.d.aux_group_stride = g.d.group_stride;
      for (Axis* axis : {&g.d.row, &g.d.col}) axis->aux_stride[0] = axis->stride[0];
    }
  }
  g.row_sums = p.dbias;
  g.row_sums_accumulate = p.accumulate_dw;
  return g;
}

MaskedCopy lower_mask(const Conv1x1Problem& p, const ActivationView& dz) {
  MaskedCopy copy{activation_matrix(p, p.dy, &p.y, p.c_out, false), activation_matrix(p, dz, nullptr, p.c_out, false),
                  mask_of(p.activation)};
  if (copy.to.col.inner_stride() != 1) {
    copy.from = transposed(copy.from);
    copy.to = transposed(copy.to);
  }
  return copy;
}

}  // namespace conv1x1
