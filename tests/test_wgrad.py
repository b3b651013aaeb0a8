"""Gradients of weight, bias and residual are stock's; the weight's has the weight's strides; none is made unasked."""

import itertools

import pytest
import torch
from covering import cover
from helpers import (
    ACTIVATIONS,
    DEVICE,
    DTYPES,
    FLOATS,
    FORMATS,
    GRAD_OUTPUT_CASES,
    GRADIENT_CASES,
    HALVES,
    LAYOUT_CASES,
    LAYOUTS,
    WEIGHT_LAYOUTS,
    Case,
    check_gradients,
    laid_out,
    randn,
    weight_of,
)
from torch.profiler import ProfilerActivity, profile

import conv1x1_ext

PARAMETERS = (0, 1, 1, 0)
# And sums over many small images, and more tiles of dz than are packed at a time, line by line.
WGRAD_CASES = [*GRADIENT_CASES, Case(13, 65, 40, (7, 7), 2), Case(129, 9, 10, (1, 1)), Case(1, 24, 600, (5, 5))]


@cover(case=WGRAD_CASES, layout=FORMATS, dtype=DTYPES)
def test_shapes(case, layout, dtype):
    x, w = laid_out(case.x_shape, dtype, layout, case.channel), weight_of(case.w_shape, dtype, layout)
    b, r = randn((case.c_out,), dtype), laid_out(case.y_shape, dtype, layout, case.channel)
    plain = {"groups": case.groups}
    check_gradients(x, w, b, case.stride, activation="relu", residual=r, need=(0, 1, 1, 1), **plain)
    _, dw, *_ = check_gradients(x, w, b, case.stride, need=PARAMETERS, **plain)
    assert dw.stride() == w.stride()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("layout", FORMATS)
def test_lines_of_half_types_longer_than_are_masked_at_a_time(layout, dtype):
    x = laid_out((2, 8, 22, 23), dtype, layout)
    check_gradients(x, weight_of((12, 8, 1, 1), dtype), activation="relu", need=(0, 1, 0, 0))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("c_out", [1, 2, 3, 7, 8, 9, 16, 17])
def test_channel_tails(c_out, layout, dtype):
    for c_in in (1, 2, 3, 7, 8, 9, 15, 16, 17, 24, 25, 47, 48, 49):
        x, w = laid_out((2, c_in, 3, 5), dtype, layout), weight_of((c_out, c_in, 1, 1), dtype)
        check_gradients(x, w, randn((c_out,), dtype), activation="relu", need=PARAMETERS)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("batch", [1, 3])
def test_pixel_counts_around_the_blocks(batch, layout, dtype):
    for pixels in (1, 2, 15, 16, 17, 42, 43, 127, 128, 129, 255, 256, 257, 600):
        x, w = laid_out((batch, 10, 1, pixels), dtype, layout), weight_of((7, 10, 1, 1), dtype)
        check_gradients(x, w, randn((7,), dtype), activation="relu6", need=PARAMETERS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", [None, "relu", "relu6"])
@pytest.mark.parametrize(
    "case", [Case(2, 5, 40, (9, 7)), Case(3, 12, 66, (12, 13), 2, 2), Case(1, 33, 130, (17, 18))], ids=str
)
def test_dz_as_the_vector_operand(case, activation, dtype):
    """Channels last, more of them out than in: dw is made transposed, and dbias from columns of panels."""
    x = laid_out(case.x_shape, dtype, "channels_last")
    w, b = weight_of(case.w_shape, dtype), randn((case.c_out,), dtype)
    check_gradients(x, w, b, case.stride, groups=case.groups, activation=activation, need=PARAMETERS)
    check_gradients(x, w, b, case.stride, groups=case.groups, activation=activation, need=(0, 0, 1, 0))
    check_gradients(x, w, None, case.stride, groups=case.groups, activation=activation, need=(0, 1, 0, 0))


@pytest.mark.cpu_only(reason="the CPU's plan")
def test_which_operand_is_the_vector_one():
    for layout, c_in, c_out, exchanged in (
        ("channels_last", 5, 40, 1),
        ("channels_last", 40, 5, 0),
        ("contiguous", 5, 40, 0),
    ):
        x, w = laid_out((2, c_in, 9, 7), torch.float32, layout), weight_of((c_out, c_in, 1, 1), torch.float32)
        assert ("B dz" in conv1x1_ext.explain(x, w, direction="wgrad")["gemm"]) == exchanged


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("activation", [None, "relu"])
def test_long_sums_stay_accurate(layout, activation):
    """Sums over many pixels, where one chain of additions would lose digits; k is cut into slices here."""
    for n, c_in, c_out, size in ((2, 20, 24, 160), (16, 64, 8, 56), (64, 7, 9, 28)):
        x, w = laid_out((n, c_in, size, size), torch.float32, layout), weight_of((c_out, c_in, 1, 1), torch.float32)
        check_gradients(x, w, randn((c_out,), torch.float32), activation=activation, need=PARAMETERS)


@cover(layout=FORMATS, dy_layout=LAYOUTS, activation=(None, "relu"), dtype=DTYPES, threads=(1, 3))
def test_grad_output_of_any_layout(layout, dy_layout, activation, dtype, threads):
    torch.set_num_threads(threads)
    for case in GRAD_OUTPUT_CASES:
        x, w = laid_out(case.x_shape, dtype, layout), weight_of(case.w_shape, dtype)
        dy, r = laid_out(case.y_shape, dtype, dy_layout), laid_out(case.y_shape, dtype, layout)
        plain = {"activation": activation, "dy": dy}
        check_gradients(x, w, randn((case.c_out,), dtype), case.stride, residual=r, need=(0, 1, 1, 1), **plain)
        check_gradients(x, w, randn((case.c_out,), dtype), case.stride, need=PARAMETERS, **plain)


@cover(layout=FORMATS, activation=(None, "relu", "relu6", "gelu"), dtype=DTYPES)
def test_grad_output_of_stride_zero(layout, activation, dtype):
    x, w = laid_out((2, 9, 6, 5), dtype, layout), weight_of((11, 9, 1, 1), dtype)
    dy = torch.ones((), dtype=dtype).expand(2, 11, 6, 5)
    r = randn(dy.shape, dtype)
    check_gradients(x, w, randn((11,), dtype), activation=activation, residual=r, dy=dy, need=(1, 1, 1, 1))


@cover(weight_layout=WEIGHT_LAYOUTS, layout=LAYOUTS, dtype=DTYPES)
def test_layouts(weight_layout, layout, dtype):
    for case in LAYOUT_CASES:
        x, w = laid_out(case.x_shape, dtype, layout), weight_of(case.w_shape, dtype, weight_layout)
        check_gradients(x, w, randn((case.c_out,), dtype), case.stride, groups=case.groups, need=PARAMETERS)


@cover(
    residual_layout=("contiguous", "channels_last", "sliced", "expanded_batch"), activation=ACTIVATIONS, dtype=DTYPES
)
def test_residual(residual_layout, activation, dtype):
    for layout, stride in (("contiguous", 1), ("channels_last", 2)):
        case = Case(2, 24, 18, (7, 9), stride, 2)
        x, w = laid_out(case.x_shape, dtype, layout), weight_of(case.w_shape, dtype)
        r = laid_out(case.y_shape, dtype, residual_layout)
        check_gradients(x, w, randn((18,), dtype), stride, groups=2, activation=activation, residual=r)


@cover(
    3,
    spatial=(1, 2, 3),
    shape=((6, 4), (1, 4), (6, 1), (1, 1)),
    weight_layout=("contiguous", "channels_last", "transposed"),
    dtype=DTYPES,
)
def test_weight_gradient_has_the_weights_strides(spatial, shape, weight_layout, dtype):
    w = weight_of((*shape, *[1] * spatial), dtype, weight_layout).requires_grad_()
    x = laid_out((2, shape[1], *[5] * spatial), dtype, "channels_last")
    for activation in (None, "relu", "silu"):
        w.grad = None
        conv1x1_ext.conv1x1(x, w, activation=activation).sum().backward()
        assert w.grad.stride() == w.stride()
        dw = torch.autograd.grad(conv1x1_ext.conv1x1(x, w, activation=activation).sum(), w)[0]
        assert dw.stride() == w.stride()


def _wanted(function):
    """What the private backward operators were asked for, and what they ran."""
    calls = []
    original = conv1x1_ext._eager._backward

    def spy(*args):
        calls.append((args[-1], original(*args)))
        return calls[-1][1]

    conv1x1_ext._eager._backward = spy
    try:
        function()
    finally:
        conv1x1_ext._eager._backward = original
    return calls


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("need", [n for n in itertools.product((0, 1), repeat=4) if any(n)], ids=str)
def test_only_what_is_needed_is_computed(need, activation):
    shapes = ((2, 5, 4, 4), (6, 5, 1, 1), (6,), (2, 6, 4, 4))
    x, w, b, r = (randn(s, torch.float64).requires_grad_(bool(n)) for s, n in zip(shapes, need, strict=True))
    y = conv1x1_ext.conv1x1(x, w, b, activation=activation, residual=r)
    ((wanted, made),) = _wanted(lambda: y.backward(torch.ones_like(y)))
    masked = need[3] and activation == "relu"  # otherwise the residual's gradient is dy itself
    assert [bool(wanted >> i & 1) for i in range(4)] == [*map(bool, need[:3]), bool(masked)]
    assert [t is not None for t in made] == [*map(bool, need[:3]), bool(masked)]
    assert [t.grad is not None for t in (x, w, b, r)] == [*map(bool, need)]
    check_gradients(x, w, b, activation=activation, residual=r, need=need)


@pytest.mark.parametrize("need", [n for n in itertools.product((False, True), repeat=4) if any(n)], ids=str)
def test_public_backward_makes_only_what_is_needed(need):
    x, w, y = randn((2, 5, 4, 4), torch.float32), randn((6, 5, 1, 1), torch.float32), randn((2, 6, 4, 4), torch.float32)
    made = torch.ops.conv1x1_ext.conv1x1_backward(torch.ones_like(y), x, w, y, [1], 1, "relu", False, *need)
    assert [t is not None for t in made] == list(need)


def test_no_gradient_no_graph():
    x, w = randn((1, 3, 4, 4), torch.float32), randn((2, 3, 1, 1), torch.float32)
    assert conv1x1_ext.conv1x1(x, w).grad_fn is None
    with torch.no_grad():
        assert conv1x1_ext.conv1x1(x, w.requires_grad_(), activation="silu").grad_fn is None
    with torch.inference_mode():
        assert conv1x1_ext.conv1x1(x, w, activation="relu").is_inference()


def test_frozen_parameters_cost_no_kernel():
    """No operator beside the private backward runs for a frozen weight and bias."""
    x = randn((2, 5, 4, 4), torch.float32).requires_grad_()
    w, b = randn((6, 5, 1, 1), torch.float32), randn((6,), torch.float32)
    y = conv1x1_ext.conv1x1(x, w, b, activation="relu")
    dy = torch.ones_like(y)
    with profile(activities=[ProfilerActivity.CPU]) as prof:
        torch.autograd.grad(y, x, dy)
    names = {event.key for event in prof.key_averages() if "::" in event.key and "autograd" not in event.key}
    # On CUDA torch's allocator is behind an operator, which launches nothing; on the CPU it is called directly.
    allocations = {"aten::empty_strided"} if DEVICE.type == "cuda" else set()
    assert names - allocations == {"conv1x1_ext::_backward"}


def test_changing_the_saved_output_in_place_is_an_error():
    x, w = randn((1, 3, 4, 4), torch.float32), randn((2, 3, 1, 1), torch.float32).requires_grad_()
    y = conv1x1_ext.conv1x1(x, w, activation="relu")
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_gradients_accumulate_and_the_graph_can_be_kept():
    x, w = randn((1, 3, 4, 4), torch.float32), randn((2, 3, 1, 1), torch.float32).requires_grad_()
    y = conv1x1_ext.conv1x1(x, w, activation="relu").sum()
    y.backward(retain_graph=True)
    once = w.grad.clone()
    y.backward()
    torch.testing.assert_close(w.grad, 2 * once)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.backward()
