"""The input's gradient is stock's, for dy of any strides and every layout, stride, group and activation."""

import pytest
import torch
from helpers import (
    ACTIVATIONS,
    FLOATS,
    HALVES,
    LAYOUTS,
    WEIGHT_LAYOUTS,
    Case,
    check_gradients,
    laid_out,
    randn,
    weight_of,
)

import conv1x1_ext

DTYPES = (*FLOATS, *HALVES)
ONLY_INPUT = (1, 0, 0, 0)
CASES = [
    Case(1, 64, 64, (10, 10)),
    Case(2, 5, 3, (9, 7)),
    Case(2, 33, 16, (13, 11), 2),
    Case(1, 16, 33, (12, 12), (2, 3)),
    Case(1, 12, 18, (5, 9), (1, 4), 3),
    Case(3, 24, 24, (6, 7), 2, 24),
    Case(1, 32, 130, (12, 12), 1, 1, False),
    Case(1, 40, 20, (7, 5), 2, 4, False),
    Case(5, 70, 130, (7, 7)),
    Case(4, 65, 257, (7, 7), 2),
    Case(7, 9, 10, (1, 1)),
    Case(2, 20, 24, (31,), 3, 4),
    Case(1, 19, 23, (50,), 1, 1, False),
    Case(2, 10, 15, (4, 5, 7), (2, 1, 3), 5),
    Case(1, 10, 15, (4, 5, 7), 2, 1, False),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_shapes(case, layout, dtype):
    x, w = laid_out(case.x_shape, dtype, layout, case.channel), weight_of(case.w_shape, dtype, layout)
    check_gradients(
        x, w, randn((case.c_out,), dtype), case.stride, groups=case.groups, activation="relu", need=ONLY_INPUT
    )
    (dx, *_) = check_gradients(x, w, None, case.stride, groups=case.groups, need=ONLY_INPUT)
    if case.batched and len(case.spatial) > 1:
        assert dx.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("c_out", [1, 2, 7, 8, 127, 128, 129, 255, 256, 257])
def test_channel_tails(c_out, layout, dtype):
    for c_in in (1, 2, 3, 4, 6, 7, 8, 9, 15, 17, 25, 47, 48, 49):
        x, w = laid_out((2, c_in, 3, 5), dtype, layout), weight_of((c_out, c_in, 1, 1), dtype)
        check_gradients(x, w, None, activation="relu", need=ONLY_INPUT)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_pixel_tails(layout, dtype):
    for pixels in range(1, 51):
        x, w = laid_out((1, 7, 1, pixels), dtype, layout), weight_of((5, 7, 1, 1), dtype)
        check_gradients(x, w, None, activation="relu6", need=ONLY_INPUT)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", [None, "relu", "relu6"])
@pytest.mark.parametrize("dy_layout", LAYOUTS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_grad_output_of_any_layout(layout, dy_layout, activation, dtype):
    for case in (Case(2, 24, 18, (7, 9)), Case(3, 65, 66, (6, 6), 2)):
        x, w = laid_out(case.x_shape, dtype, layout), weight_of(case.w_shape, dtype)
        dy = laid_out(case.y_shape, dtype, dy_layout)
        check_gradients(x, w, None, case.stride, activation=activation, dy=dy, need=ONLY_INPUT)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_grad_output_of_stride_zero(layout, activation, dtype):
    """What y.sum().backward() sends."""
    x, w = laid_out((2, 9, 6, 5), dtype, layout), weight_of((11, 9, 1, 1), dtype)
    dy = torch.ones((), dtype=dtype).expand(2, 11, 6, 5)
    assert dy.stride() == (0, 0, 0, 0)
    check_gradients(x, w, activation=activation, dy=dy, need=ONLY_INPUT)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("weight_layout", WEIGHT_LAYOUTS)
def test_layouts(layout, weight_layout, dtype):
    for case in (Case(3, 20, 12, (6, 9), 1, 2), Case(2, 66, 70, (8, 8), 2)):
        x, w = laid_out(case.x_shape, dtype, layout), weight_of(case.w_shape, dtype, weight_layout)
        check_gradients(x, w, None, case.stride, groups=case.groups, activation="relu", need=ONLY_INPUT)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("stride", [1, 2])
def test_activations(activation, stride, dtype):
    for layout in ("contiguous", "channels_last"):
        case = Case(2, 24, 18, (7, 9), stride, 2)
        x, w = laid_out(case.x_shape, dtype, layout), weight_of(case.w_shape, dtype)
        b, r = randn((18,), dtype), randn(case.y_shape, dtype)
        check_gradients(x, w, b, stride, groups=2, activation=activation, residual=r, need=ONLY_INPUT)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
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
