"""The input's gradient is stock's, for dy of any strides and every layout, stride, group and activation."""

import pytest
import torch
from covering import cover
from helpers import (
    ACTIVATIONS,
    DTYPES,
    FLOATS,
    FORMATS,
    GRAD_OUTPUT_CASES,
    GRADIENT_CASES,
    LAYOUT_CASES,
    LAYOUTS,
    WEIGHT_LAYOUTS,
    Case,
    check_gradients,
    laid_out,
    randn,
    weight_of,
)

import conv1x1_ext

ONLY_INPUT = (1, 0, 0, 0)


@cover(case=GRADIENT_CASES, layout=FORMATS, dtype=DTYPES)
def test_shapes(case, layout, dtype):
    x, w = laid_out(case.x_shape, dtype, layout, case.channel), weight_of(case.w_shape, dtype, layout)
    check_gradients(
        x, w, randn((case.c_out,), dtype), case.stride, groups=case.groups, activation="relu", need=ONLY_INPUT
    )
    (dx, *_) = check_gradients(x, w, None, case.stride, groups=case.groups, need=ONLY_INPUT)
    if case.batched and len(case.spatial) > 1:
        assert dx.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("c_out", [1, 2, 7, 8, 127, 128, 129, 255, 256, 257])
def test_channel_tails(c_out, layout, dtype):
    for c_in in (1, 2, 3, 4, 6, 7, 8, 9, 15, 17, 25, 47, 48, 49):
        x, w = laid_out((2, c_in, 3, 5), dtype, layout), weight_of((c_out, c_in, 1, 1), dtype)
        check_gradients(x, w, None, activation="relu", need=ONLY_INPUT)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layout", FORMATS)
def test_pixel_tails(layout, dtype):
    for pixels in range(1, 51):
        x, w = laid_out((1, 7, 1, pixels), dtype, layout), weight_of((5, 7, 1, 1), dtype)
        check_gradients(x, w, None, activation="relu6", need=ONLY_INPUT)


@cover(layout=FORMATS, dy_layout=LAYOUTS, activation=(None, "relu", "relu6"), dtype=DTYPES, threads=(1, 3))
def test_grad_output_of_any_layout(layout, dy_layout, activation, dtype, threads):
    torch.set_num_threads(threads)
    for case in GRAD_OUTPUT_CASES:
        x, w = laid_out(case.x_shape, dtype, layout), weight_of(case.w_shape, dtype)
        dy = laid_out(case.y_shape, dtype, dy_layout)
        check_gradients(x, w, None, case.stride, activation=activation, dy=dy, need=ONLY_INPUT)


@cover(layout=FORMATS, activation=(None, "relu", "silu"), dtype=DTYPES)
def test_grad_output_of_stride_zero(layout, activation, dtype):
    """What y.sum().backward() sends."""
    x, w = laid_out((2, 9, 6, 5), dtype, layout), weight_of((11, 9, 1, 1), dtype)
    dy = torch.ones((), dtype=dtype).expand(2, 11, 6, 5)
    assert dy.stride() == (0, 0, 0, 0)
    check_gradients(x, w, activation=activation, dy=dy, need=ONLY_INPUT)


@cover(weight_layout=WEIGHT_LAYOUTS, layout=LAYOUTS, dtype=DTYPES)
def test_layouts(weight_layout, layout, dtype):
    for case in LAYOUT_CASES:
        x, w = laid_out(case.x_shape, dtype, layout), weight_of(case.w_shape, dtype, weight_layout)
        check_gradients(x, w, None, case.stride, groups=case.groups, activation="relu", need=ONLY_INPUT)


@cover(stride=(1, 2), activation=ACTIVATIONS, dtype=DTYPES)
def test_activations(stride, activation, dtype):
    for layout in FORMATS:
        case = Case(2, 24, 18, (7, 9), stride, 2)
        x, w = laid_out(case.x_shape, dtype, layout), weight_of(case.w_shape, dtype)
        b, r = randn((18,), dtype), randn(case.y_shape, dtype)
        check_gradients(x, w, b, stride, groups=2, activation=activation, residual=r, need=ONLY_INPUT)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("stride", [2, 3, (1, 2), (4, 1)], ids=str)
def test_pixels_that_were_not_read_have_zero_gradient(stride, layout):
    sh, sw = (stride, stride) if isinstance(stride, int) else stride
    x, w = laid_out((2, 5, 11, 9), torch.float32, layout).requires_grad_(), weight_of((4, 5, 1, 1), torch.float32)
    conv1x1_ext.conv1x1(x, w, stride=stride).sum().backward()
    read = torch.zeros_like(x, dtype=torch.bool)
    read[:, :, ::sh, ::sw] = True
    assert (x.grad[~read] == 0).all() and (x.grad[read] != 0).all()


def test_gradient_reaches_the_base_of_an_expanded_input():
    base = torch.randn(1, 6, 1, 1, requires_grad=True)
    w = torch.randn(4, 6, 1, 1)
    conv1x1_ext.conv1x1(base.expand(3, 6, 5, 5), w).sum().backward()
    torch.testing.assert_close(base.grad, 75 * w.sum(0, keepdim=True))
