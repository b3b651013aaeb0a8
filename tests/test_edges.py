"""Empty tensors, NaN, infinities, signed zeros, denormals and extreme strides."""

import re

import pytest
import torch
from helpers import (
    ACTIVATIONS,
    DEVICE,
    DTYPES,
    FLOATS,
    FORMATS,
    HALVES,
    activate,
    check_forward,
    check_gradients,
    conv,
    expect_ok,
    laid_out,
    randn,
    run_python,
    stock_forward,
    weight_of,
)  # fmt: skip

import conv1x1_ext
from conv1x1_ext import conv1x1, conv1x1_avg_pool

NAN, INF = float("nan"), float("inf")


def gradients(y, *leaves):
    return torch.autograd.grad(y, leaves, torch.ones_like(y))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", FORMATS)
def test_empty_batch(layout, activation, dtype):
    x, w = laid_out((0, 3, 4, 5), dtype, layout).requires_grad_(), weight_of((6, 3, 1, 1), dtype).requires_grad_()
    b, r = randn((6,), dtype).requires_grad_(), torch.empty(0, 6, 2, 3, dtype=dtype, requires_grad=True)
    y = conv1x1(x, w, b, 2, activation=activation, residual=r)
    assert y.shape == (0, 6, 2, 3)
    dx, dw, dbias, dr = gradients(y, x, w, b, r)
    assert dx.shape == x.shape and dr.shape == r.shape
    assert dw.shape == w.shape and (dw == 0).all() and (dbias == 0).all()


@pytest.mark.parametrize("spatial", [(1, 1), (3, 2), (1,)], ids=str)
@pytest.mark.parametrize("layout", FORMATS)
def test_empty_batch_of_groups(layout, spatial):
    x = laid_out((0, 8, *spatial), torch.float32, layout).requires_grad_()
    w = weight_of((4, 4, *(1 for _ in spatial)), torch.float32).requires_grad_()
    y = conv1x1(x, w, groups=2, activation="relu")
    assert y.shape == (0, 4, *spatial)
    dx, dw = gradients(y, x, w)
    assert dx.shape == x.shape and (dw == 0).all()
    for direction in ("fprop", "dgrad", "wgrad"):
        conv1x1_ext.explain(x, w, groups=2, direction=direction)


@pytest.mark.cpu_only(reason="slices of the CPU's wgrad")
def test_wgrad_of_a_pixel_of_over_a_megabyte():
    c = 140_000
    x = laid_out((1, c, 2, 3), torch.float32, "channels_last")
    w = weight_of((c, 1, 1, 1), torch.float32).requires_grad_()
    (dw,) = torch.autograd.grad(conv1x1(x, w, groups=c), w, torch.ones(1, c, 2, 3))
    torch.testing.assert_close(dw.reshape(c), x.sum((0, 2, 3)))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("shape", [(2, 3, 0, 5), (2, 3, 4, 0), (2, 3, 0, 0), (3, 0, 5), (0, 3, 0, 0)], ids=str)
def test_zero_pixels(shape, activation, dtype):
    """An output of no pixels, where torch's convolution raises; the parameters' gradients are zero."""
    x, w = randn(shape, dtype).requires_grad_(), weight_of((6, 3, 1, 1), dtype).requires_grad_()
    b = randn((6,), dtype).requires_grad_()
    y = conv1x1(x, w, b, 2, activation=activation)
    assert y.shape == (*shape[:-3], 6, *((s + 1) // 2 for s in shape[-2:]))
    dx, dw, dbias = gradients(y, x, w, b)
    assert dx.shape == x.shape and (dw == 0).all() and (dbias == 0).all() and dw.shape == w.shape


@pytest.mark.parametrize("shape", [(2, 0, 4, 5), (0, 4, 5), (0, 0, 4, 5)], ids=str)
def test_zero_input_channels_as_stock(shape):
    x, w = torch.randn(shape, requires_grad=True), torch.randn(6, 0, 1, 1, requires_grad=True)
    b = torch.randn(6, requires_grad=True)
    expected, ours = conv(x, w, b), conv1x1(x, w, b, activation="relu")
    assert ours.shape == expected.shape and torch.equal(ours, torch.relu(expected))
    dx, dw, dbias = gradients(ours, x, w, b)
    assert dx.shape == x.shape and dw.shape == w.shape and (dbias == 0).all()


def test_zero_output_channels_is_an_error_as_in_stock():
    x, w = torch.randn(2, 3, 4, 4), torch.randn(0, 3, 1, 1)
    with pytest.raises(RuntimeError):
        conv(x, w)
    with pytest.raises(RuntimeError, match="at least 1 output channel"):
        conv1x1(x, w)


@pytest.mark.parametrize("activation", ["relu", "silu", None])
def test_avg_pool_of_no_pixels_is_nan(activation):
    x, w = torch.randn(2, 3, 0, 5, requires_grad=True), torch.randn(4, 3, 1, 1, requires_grad=True)
    y = conv1x1_avg_pool(x, w, activation=activation)
    assert y.shape == (2, 4) and y.isnan().all()
    empty = conv1x1_avg_pool(torch.randn(0, 3, 5, 5), w, activation=activation)
    assert empty.shape == (0, 4)


SPECIAL = [NAN, INF, -INF, 0.0, -0.0, 6.0, -1.0, 3.0, -3.0, 7.5, 1e-30, -1e-30, 100.0, -100.0]


def special(dtype):
    return torch.tensor(SPECIAL * 5, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", FORMATS)
def test_special_values_pass_the_activation_as_in_torch(layout, activation, dtype):
    values = special(dtype)
    x = values.reshape(1, 1, -1, 1).expand(2, 1, values.numel(), 3)
    x = x.contiguous(memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format)
    y = conv1x1(x, torch.ones(1, 1, 1, 1, dtype=dtype), activation=activation)
    expected = activate(x, activation)
    if activation == "hardswish" and dtype == torch.float64:  # torch's CUDA kernel multiplies by float32's 1/6
        expected = torch.where(x.isfinite(), activate(x.cpu(), activation).to(x.device), expected)
    if activation == "gelu":  # of infinities: NaN in some of torch's own code paths and the limit in others
        limit = torch.where(x > 0, x, torch.zeros_like(x))
        assert (y.isnan() | (y == limit))[x.isinf()].all()
        y, expected = y[x.isfinite()], activate(x[x.isfinite()].double(), activation).to(dtype)  # float32's errs at -3
    finfo = torch.finfo(dtype)
    atol = finfo.tiny if activation != "gelu" else 16 * finfo.eps  # 1 + erf cancels
    torch.testing.assert_close(y, expected, equal_nan=True, rtol=8 * finfo.eps, atol=atol)
    if activation in (None, "relu", "relu6"):
        assert torch.equal(y.isnan(), expected.isnan())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", FORMATS)
def test_special_values_in_the_gradient_mask(layout, activation, dtype):
    """A NaN output passes the gradient, the kinks fall where torch's do; dy itself may be NaN or infinite."""
    values = special(dtype)
    format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    x = values.reshape(1, 1, -1, 1).expand(2, 1, values.numel(), 3).contiguous(memory_format=format).requires_grad_()
    w = torch.ones(1, 1, 1, 1, dtype=dtype)
    r = torch.zeros_like(x).detach().requires_grad_()
    for dy in (torch.full_like(x, 2), torch.full_like(x, NAN), torch.full_like(x, INF)):
        dx, dr = torch.autograd.grad(conv1x1(x, w, activation=activation, residual=r), (x, r), dy)
        (expected,) = torch.autograd.grad(activate(x, activation), x, dy)
        if (
            activation == "relu6"
        ):  # torch passes or stops the gradient at NaN by code path; it should pass as ReLU's does
            expected = torch.where((x <= 0) | (x >= 6), torch.zeros_like(dy), dy)
        for grad in (dx, dr):
            torch.testing.assert_close(grad, expected, equal_nan=True, rtol=8 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_nan_and_inf_reach_exactly_the_outputs_that_read_them(bad, layout):
    x, w = laid_out((2, 20, 7, 9), torch.float32, layout), weight_of((18, 10, 1, 1), torch.float32)
    x[1, 3, 2, 4] = bad
    for activation in (None, "relu", "relu6"):
        y, expected = (
            conv1x1(x, w, groups=2, activation=activation),
            stock_forward(x, w, groups=2, activation=activation),
        )
        assert torch.equal(y.isnan(), expected.isnan())
        torch.testing.assert_close(y, expected, equal_nan=True, rtol=1e-4, atol=1e-4)
    y = conv1x1(x, w, groups=2)
    assert not y.isfinite()[1, :9, 2, 4].any() and y.isfinite().sum() == y.numel() - 9


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nan_reaches_weight_and_bias_gradients(dtype):
    x, w = randn((2, 5, 6, 6), dtype), randn((4, 5, 1, 1), dtype).requires_grad_()
    b = randn((4,), dtype).requires_grad_()
    x[0, 2, 3, 3] = NAN
    y = conv1x1(x, w, b, activation="relu")
    dw, db = torch.autograd.grad(y, (w, b), torch.ones_like(y))
    assert dw[:, 2].isnan().all() and dw[:, [0, 1, 3, 4]].isfinite().all() and db.isfinite().all()
    dy = torch.ones_like(y)
    dy[1, 2, 0, 0] = NAN
    y = conv1x1(randn((2, 5, 6, 6), dtype), w, b)
    dw, db = torch.autograd.grad(y, (w, b), dy)
    assert db.isnan().tolist() == [False, False, True, False] and dw[2].isnan().all() and dw[[0, 1, 3]].isfinite().all()


def test_padding_of_tails_does_not_meet_infinite_values():
    """A zero of a padded panel times infinity would be NaN."""
    for layout in ("contiguous", "channels_last"):
        for pixels in (1, 5, 17, 49):
            x = torch.full((2, 7, 1, pixels), INF).contiguous(
                memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format
            )
            w = torch.full((5, 7, 1, 1), 0.5, requires_grad=True)
            y = conv1x1(x.requires_grad_(), w)
            assert (y == INF).all()
            dx, dw = torch.autograd.grad(y, (x, w), torch.full_like(y, 1.0))
            assert (dw == INF).all() and (dx == 2.5).all()


@pytest.mark.parametrize("activation", [None, "relu"])
def test_signed_zero(activation):
    """torch's ReLU of -0 is a zero that stops the gradient; ours too."""
    x, w = torch.full((1, 1, 4, 4), -0.0, requires_grad=True), torch.ones(1, 1, 1, 1)
    y = conv1x1(x, w, activation=activation)
    assert (y == 0).all()
    (dx,) = gradients(y, x)
    assert torch.equal(dx, torch.ones_like(x) if activation is None else torch.zeros_like(x))


@pytest.mark.parametrize("dtype,smallest", [(torch.float32, 1e-40), (torch.float64, 1e-310)], ids=str)
def test_denormals_are_kept_by_default(dtype, smallest):
    x, w = torch.full((1, 1, 6, 6), smallest, dtype=dtype), torch.ones(1, 1, 1, 1, dtype=dtype)
    for activation in (None, "relu", "relu6"):
        assert torch.equal(conv1x1(x, w, activation=activation), x)


FLUSH = """
import torch, conv1x1_ext
assert torch.set_flush_denormal(True)
torch.set_num_threads(2)
x = torch.full((8, 64, 32, 32), 1e-39{layout}).requires_grad_()
torch.set_flush_denormal(False)
x.data.fill_(1e-39)
assert (x.detach().view(torch.int32) != 0).all()
w = torch.ones(64, 64, 1, 1, requires_grad=True)
assert "threads=2" in "threads=" + conv1x1_ext.explain(x, w)["threads"]
zero = lambda t: bool((t.detach().contiguous().view(torch.int32) << 1 == 0).all())
for flush in (False, True, False):
    torch.set_flush_denormal(flush)
    y = conv1x1_ext.conv1x1(x, w)
    assert zero(y) == flush, flush
    dx, dw = torch.autograd.grad(y, (x, w), torch.full_like(y, 1.0))
    assert zero(dw) == flush and bool((dx == 64).all()), flush
    torch.set_flush_denormal(False)
    assert not zero(torch.full((4,), 1e-39) * torch.ones(4))
print("ok")
"""


@pytest.mark.cpu_only(reason="a mode of the CPU")
@pytest.mark.parametrize("layout", ["", ").to(memory_format=torch.channels_last"], ids=FORMATS)
def test_flush_denormal_reaches_the_worker_threads(layout):
    assert "ok" in expect_ok(run_python(FLUSH.format(layout=layout)))


FLUSH_PASSES = """
import torch, conv1x1_ext
from conv1x1_ext import conv1x1, conv1x1_avg_pool
born, layout = {born}, {layout!r}
assert torch.set_flush_denormal(born)
torch.set_num_threads(2)
x = torch.randn(256, 64, 1, 1)
conv1x1(torch.randn(8, 64, 32, 32), torch.randn(64, 64, 1, 1))  # the worker comes to be
torch.set_flush_denormal(False)

def normal(*shape):
    t = torch.randn(*shape)
    return t.contiguous(memory_format=torch.channels_last) if layout == "channels_last" and len(shape) == 4 else t

# Denormal gradients, of which a derivative above 1 makes some normal, and a mean over pixels the others smaller.
x, w, images = normal(256, 64, 1, 1), normal(96, 64, 1, 1) * 1e10, normal(4, 64, 16, 16)
z = x[:, :, 0, 0] @ w[:, :, 0, 0].T
w, small = w / 1e10 * 0.4, torch.rand(256, 96) * 1.17e-38
y, dy = normal(4, 96, 16, 16) * 1e-39, normal(4, 96, 16, 16)

def gradients(x, dy, activation):
    leaves = [x.detach().requires_grad_(), w.detach().requires_grad_()]
    dx, dw = torch.autograd.grad(conv1x1_avg_pool(*leaves, activation=activation), leaves, dy)
    return [dx, dw]

def results():
    out = [g for activation in ("silu", "hardswish", "gelu") for g in gradients(x * 3, small, activation)]
    out += [g for activation in ("relu", "relu6", "silu") for g in gradients(images, small[:4] * 100, activation)]
    # The residual's gradient is dy under the mask of y, whose denormals are zeros or not.
    ones = torch.ops.conv1x1_ext.conv1x1_backward(
        dy, images, w, y, [1, 1], 1, "relu", False, True, True, True, True
    )
    return [*out, *ones]

for flush in (False, True, False):
    runs = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        torch.set_flush_denormal(flush)
        runs.append(results())
        torch.set_flush_denormal(False)
    same = [bool((a.view(torch.int32) == b.view(torch.int32)).all()) for a, b in zip(*runs, strict=True)]
    assert all(same), (flush, same)
    assert (runs[0][-1] == 0).all() if flush else (runs[0][-1] != 0).any()
print("ok")
"""


@pytest.mark.cpu_only(reason="a mode of the CPU")
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("born", [False, True])
def test_every_pass_of_a_worker_has_its_callers_floating_point_environment(born, layout):
    """Not that of its creation: pooled backward and the masked gradient have loops of their own beside the GEMM's."""
    assert "ok" in expect_ok(run_python(FLUSH_PASSES.format(born=born, layout=layout)))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_offsets_beyond_32_bits(dtype):
    """Strides of 2^32 elements and more, over sizes of one and over tensors that share pages never touched."""
    base = torch.randn(64, dtype=dtype)
    x = base.as_strided((1, 4, 3, 5), (1 << 40, 15, 5, 1))
    check_forward(x, weight_of((6, 4, 1, 1), dtype))
    check_forward(base.as_strided((2, 4, 1, 1), (4, 1, 1 << 41, 1 << 42)), weight_of((6, 4, 1, 1), dtype))


def test_pixels_more_than_4_gib_apart():
    """Reserved, mostly untouched memory: only the pages of the values read become real."""
    step = (1 << 30) + 3
    try:
        base = torch.empty(2 * step, dtype=torch.float32)
    except RuntimeError:
        pytest.skip("cannot reserve 8 GiB of address space")
    x = base.as_strided((2, 3, 2, 2), (step, 4, 2, 1))
    values = torch.randn(2, 3, 2, 2)
    x.copy_(values)
    w = torch.randn(5, 3, 1, 1)
    assert torch.equal(conv1x1(x, w), conv1x1(values, w))
    assert torch.equal(conv1x1(x.transpose(0, 2), w), conv1x1(values.transpose(0, 2).contiguous(), w))
    dx, dw, *_ = check_gradients(x, w, need=(1, 1, 0, 0))
    assert dx.is_contiguous() and dw.is_contiguous()


def test_explain_of_zero_channels_and_zero_pixels():
    assert conv1x1_ext.explain(torch.randn(1, 0, 4, 4), torch.randn(3, 0, 1, 1))["kernel"].startswith("none")
    explained = conv1x1_ext.explain(torch.randn(1, 3, 0, 4), torch.randn(3, 3, 1, 1))
    assert not explained["kernel"].startswith("none") and re.search(r"\b[mn] 0\b", explained["gemm"])
    assert {"cpu": "threads", "cuda": "grid"}[DEVICE.type] in explained


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("stride", [1, 2])
def test_halves_are_rounded_to_nearest_even(stride, layout, dtype):
    """One product for each result, exact in float32. Some are ties; with float16 some are denormal."""

    def small(t):
        return t * 2.0**-13 if dtype == torch.float16 else t

    x, w = small(laid_out((2, 1, 21, 23), dtype, layout)), weight_of((45, 1, 1, 1), dtype)
    w[::2] = small(w[::2])
    y = conv1x1(x, w, stride=stride)
    assert torch.equal(y, (x.float()[:, :, ::stride, ::stride] * w.float().reshape(1, 45, 1, 1)).to(dtype))
    x, w = laid_out((2, 45, 21, 23), dtype, layout).requires_grad_(), small(weight_of((1, 45, 1, 1), dtype))
    y = conv1x1(x, w, stride=stride)
    dy = small(laid_out(tuple(y.shape), dtype, layout))
    dy[:, :, ::2] = dy[:, :, ::2] * 16
    expected = torch.zeros(x.shape)
    expected[:, :, ::stride, ::stride] = dy.float() * w.float()
    assert torch.equal(torch.autograd.grad(y, x, dy)[0], expected.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("odd", ["c_in", "c_out"])
def test_what_an_earlier_call_left_in_the_workspace_does_not_show(odd, layout, dtype):
    """Panels end in zeros where k is no whole step. A call of NaN, with panels as large, wrote NaN there before."""

    def graph(channels, value=None):
        c_in, c_out = (channels, 40) if odd == "c_in" else (40, channels)
        tensors = laid_out((2, c_in, 9, 9), dtype, layout), weight_of((c_out, c_in, 1, 1), dtype, "sliced")
        leaves = [(t if value is None else torch.full_like(t, value)).requires_grad_() for t in tensors]
        return leaves, [*leaves, laid_out((2, c_out, 9, 9), dtype, layout)]

    def run(leaves, x, w, dy):
        y = conv1x1(x, w, activation="relu")
        return [y, *(torch.autograd.grad(y, leaf, dy, retain_graph=True)[0] for leaf in leaves)]

    noise, clean = graph(66, NAN), graph(65)
    for step in range(3):  # what follows a step's call of NaN is the same step, in memory that it has just given back
        run(noise[0][:step], *noise[1])
        assert all(torch.isfinite(t).all() for t in run(clean[0][:step], *clean[1]))
