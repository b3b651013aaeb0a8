"""conv1x1_avg_pool is the mean over the pixels of conv + activation, and never holds the (N, C_out, H, W) tensor."""

import pytest
import torch
from covering import cover
from helpers import (
    ACTIVATIONS,
    DEVICE,
    DTYPES,
    FLOATS,
    FORMATS,
    HALVES,
    LAYOUTS,
    Case,
    assert_close_to_reference,
    exact,
    expect_ok,
    laid_out,
    magnitude_of,
    opcheck,
    randn,
    run_python,
    stock_forward,
    weight_of,
)  # fmt: skip
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from conv1x1_ext import conv1x1, conv1x1_avg_pool, explain
from conv1x1_ext._eager import make_config

OP = torch.ops.conv1x1_ext.conv1x1_avg_pool
SMOOTH = (None, "silu", "gelu")
CASES = [
    Case(2, 24, 18, (7, 9)),
    Case(1, 64, 96, (14, 14)),
    Case(2, 72, 300, (9, 11)),  # with AMX several tiles a call, and a tail
    Case(3, 20, 12, (5, 6), 1, 4),
    Case(1, 130, 10, (8, 8), 1, 1, False),
    Case(2, 12, 7, (33,)),
    Case(1, 12, 7, (33,), 1, 1, False),
    Case(2, 12, 8, (3, 4, 5), 1, 2),
    Case(1, 12, 7, (3, 4, 5), 1, 1, False),
    Case(6, 257, 1, (1, 1)),
    Case(2, 1, 50, (3, 3)),
]


def stock(x, w, b=None, *, groups=1, activation="relu"):
    return stock_forward(x, w, b, groups=groups, activation=activation).mean(tuple(range(2 - w.dim(), 0)))


def compare(x, w, b, groups, activation):
    ours = conv1x1_avg_pool(x, w, b, groups=groups, activation=activation)
    ref = stock(exact(x), exact(w), exact(b), groups=groups, activation=activation)
    size = stock(magnitude_of(x), magnitude_of(w), magnitude_of(b), groups=groups, activation=None)
    pixels = x[(0,) * (x.dim() - w.dim() + 2)].numel()
    theirs = stock(x, w, b, groups=groups, activation=activation)
    assert_close_to_reference(ours, theirs, ref, size, w.shape[1] + pixels)
    return ours


@cover(case=CASES, layout=FORMATS, activation=ACTIVATIONS, dtype=DTYPES, threads=(1, 3))
def test_forward(case, layout, activation, dtype, threads):
    torch.set_num_threads(threads)
    x, w = laid_out(case.x_shape, dtype, layout, case.channel), weight_of(case.w_shape, dtype)
    y = compare(x, w, randn((case.c_out,), dtype), case.groups, activation)
    assert y.shape == (*case.y_shape[: case.channel], case.c_out)
    compare(x, w, None, case.groups, activation)


@cover(batched=(True, False), layout=LAYOUTS, dtype=FLOATS)
def test_layouts(batched, layout, dtype):
    case = Case(3, 20, 12, (6, 9), 1, 2, batched)
    x, w = laid_out(case.x_shape, dtype, layout, case.channel), weight_of(case.w_shape, dtype, "transposed")
    compare(x, w, randn((24,), dtype)[::2], 2, "relu")


def gradients(function, tensors, dy, **kwargs):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    return torch.autograd.grad(function(*leaves, **kwargs), leaves, dy)


def close(tensors, dy, **kwargs):
    """Compares with stock in float64, by the size that the sums would have without cancellation; returns our gradients.

    Not with stock in float32, whose derivative of GELU is off by up to 27 ulps of that size on some CPUs.
    """
    ours = gradients(conv1x1_avg_pool, tensors, dy, **kwargs)
    exact = gradients(stock, [t.double() for t in tensors], dy.double(), **kwargs)
    kwargs["activation"] = None
    sizes = gradients(stock, [t.double().abs() for t in tensors], dy.double().abs(), **kwargs)
    for tensor, a, b, size in zip(tensors, ours, exact, sizes, strict=True):
        assert a.shape == b.shape and a.dtype == tensor.dtype
        assert ((a - b).abs() <= 60 * torch.finfo(a.dtype).eps * size.max()).all()
    return ours


@cover(case=CASES, layout=FORMATS, activation=ACTIVATIONS, dtype=FLOATS, threads=(1, 3))
def test_gradients(case, layout, activation, dtype, threads):
    torch.set_num_threads(threads)
    x, w = laid_out(case.x_shape, dtype, layout, case.channel), weight_of(case.w_shape, dtype)
    b, dy = randn((case.c_out,), dtype), randn((*case.y_shape[: case.channel], case.c_out), dtype)
    kwargs = {"groups": case.groups, "activation": activation}
    if activation in ("relu", "relu6", "hardswish"):  # keep the pre-activation off the kinks
        z = stock_forward(x.double(), w.double(), b.double(), groups=case.groups)
        if min((z - kink).abs().min() for kink in (0, 3, -3, 6)) < 1e-4 * (dtype == torch.float32):
            x = (x.double() * 8).round() / 8
            w, b = (w.double() * 8).round() / 8, (b.double() * 4).round() / 4 + 1 / 512
            x, w, b = x.to(dtype), w.to(dtype), b.to(dtype)
    ours = close((x, w, b), dy, **kwargs)
    assert ours[1].stride() == w.stride()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("activation", SMOOTH)
@pytest.mark.parametrize("layout", FORMATS)
def test_gradients_of_half_types(layout, activation, dtype):
    """Against float64, as stock rounds its intermediate tensors to the half type."""
    x, w = laid_out((2, 24, 9, 7), dtype, layout), weight_of((18, 24, 1, 1), dtype)
    b, dy = randn((18,), dtype), randn((2, 18), dtype)
    ours = gradients(conv1x1_avg_pool, (x, w, b), dy, activation=activation)
    ref = gradients(stock, (x.double(), w.double(), b.double()), dy.double(), activation=activation)
    theirs = gradients(stock, (x, w, b), dy, activation=activation)
    for a, t, r in zip(ours, theirs, ref, strict=True):
        error = [((g.double() - r).norm() / r.norm()).item() for g in (a, t)]
        assert a.dtype == dtype and error[0] <= 2 * error[1] + torch.finfo(dtype).eps, error


@cover(
    shape=(
        (1, 4, 8, (500, 400)),  # one image, cut by rows
        (1, 2, 1 << 12, (3, 300)),  # one row does not fit
        (1, 2, 9000, (1, 700)),  # cut inside the only row
        (40, 8, 64, (30, 30)),  # several images a piece, and a rest
        (3, 4, 600, (70, 31)),  # less than one image a piece
        (2, 3, 300, (3, 50, 41)),
        (5, 3, 128, (3001,)),
    ),
    layout=FORMATS,
    activation=SMOOTH,
)
def test_backward_in_pieces(shape, layout, activation):
    n, c_in, c_out, spatial = shape
    x = laid_out((n, c_in, *spatial), torch.float32, layout).abs()  # no mean near zero
    w, b, dy = randn((c_out, c_in, *[1] * len(spatial)), x.dtype), randn((c_out,), x.dtype), randn((n, c_out), x.dtype)
    if activation is None:  # dx has one value a channel then: a sum of 9000 terms that must not happen to cancel
        w, dy = w.abs(), dy.abs()
    ours = gradients(conv1x1_avg_pool, (x, w, b), dy, activation=activation)
    ref = gradients(stock, (x.double(), w.double(), b.double()), dy.double(), activation=activation)
    for a, r in zip(ours, ref, strict=True):
        assert ((a.double() - r).norm() / r.norm()).item() < 2e-6


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("batched", [True, False])
def test_gradcheck(batched, activation):
    x = (torch.randn(2, 4, 3, 2, dtype=torch.float64) * 2)[0 if not batched else slice(None)].requires_grad_()
    w, b = torch.randn(6, 2, 1, 1, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    w, b = w.requires_grad_(), b.requires_grad_()
    function = lambda *t: conv1x1_avg_pool(*t, groups=2, activation=activation)  # noqa: E731
    assert torch.autograd.gradcheck(function, (x, w, b))
    assert torch.autograd.gradgradcheck(function, (x, w, b))


def test_needs_input_grad():
    x, w, b = torch.randn(2, 4, 3, 2), torch.randn(5, 4, 1, 1), torch.randn(5)
    for need in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)):
        leaves = [t.clone().requires_grad_(bool(n)) for t, n in zip((x, w, b), need, strict=True)]
        conv1x1_avg_pool(*leaves).sum().backward()
        assert [t.grad is not None for t in leaves] == [bool(n) for n in need]
        rest = (1, "relu", False, *map(bool, need))
        made = torch.ops.conv1x1_ext.conv1x1_avg_pool_backward(torch.ones(2, 5), x, w, b, *rest)
        assert [t is not None for t in made] == [bool(n) for n in need]


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("layout", FORMATS)
def test_grad_output_of_any_strides(layout, activation):
    x, w = laid_out((3, 4, 5, 6), torch.float64, layout), randn((7, 4, 1, 1), torch.float64)
    b = randn((7,), torch.float64)
    for dy in (
        torch.ones((), dtype=x.dtype).expand(3, 7),
        randn((7, 3), x.dtype).t(),
        randn((3, 15), x.dtype)[:, 1::2],
    ):
        close((x, w, b), dy, activation=activation)


@pytest.mark.parametrize("activation", ["relu", "relu6"])
@pytest.mark.parametrize("layout", FORMATS)
def test_a_nan_preactivation_passes_the_gradient(layout, activation):
    """As torch's ReLU lets it; its ReLU6 does so or not, from element to element."""
    x, w = laid_out((2, 4, 5, 7), torch.float32, layout), randn((21, 4, 1, 1), torch.float32)
    x[1, 2, 3, 4] = float("nan")
    x.requires_grad_()
    b, dy = randn((21,), torch.float32).requires_grad_(), randn((2, 21), torch.float32)
    z = torch.nn.functional.conv2d(x, w, b)
    held = (z <= 0) | (z >= 6) if activation == "relu6" else z <= 0
    dz = (dy / 35)[..., None, None] * ~held
    expected = torch.nn.functional.conv_transpose2d(dz, w), dz.sum((0, 2, 3))
    found = torch.autograd.grad(conv1x1_avg_pool(x, w, b, activation=activation), (x, b), dy)
    for a, e in zip(found, expected, strict=True):
        torch.testing.assert_close(a, e)
    assert found[0][1, :, 3, 4].abs().min() > 0


@cover(layout=FORMATS, activation=("relu", "relu6"), dtype=DTYPES, threads=(1, 2, 5))
def test_what_the_forward_keeps_gives_the_gradients_of_what_is_recomputed(layout, activation, dtype, threads):
    """A bit an output: rows of bits that begin within a byte, tiles and threads that share one."""
    torch.set_num_threads(threads)
    for n, c_in, c_out, groups, spatial in (
        (1, 3, 5, 1, (3, 3)),
        (4, 8, 21, 3, (5, 5)),
        (6, 9, 130, 1, (7, 7)),
        (16, 16, 70, 2, (6, 6)),
        (2, 5, 9, 1, (41, 31)),
        (3, 64, 65, 1, (2, 3, 3)),
        (2, 72, 300, 1, (9, 11)),
        (3, 2, 450, 1, (30, 31)),  # several pieces
    ):
        c_in *= groups
        c_out *= groups
        x = laid_out((n, c_in, *spatial), dtype, layout)
        w, b = randn((c_out, c_in // groups, *[1] * len(spatial)), dtype), randn((c_out,), dtype)
        leaves, dy = [t.requires_grad_() for t in (x, w, b)], randn((n, c_out), dtype)
        kept = torch.autograd.grad(conv1x1_avg_pool(*leaves, groups=groups, activation=activation), leaves, dy)
        op = torch.ops.conv1x1_ext.conv1x1_avg_pool
        recomputed = torch.autograd.grad(op(*leaves, groups, activation, False), leaves, dy)
        for a, e in zip(kept, recomputed, strict=True):
            assert torch.equal(a, e)


@pytest.mark.cpu_only(reason="CUDA kernels recompute")
def test_a_mask_of_other_arguments_is_refused():
    x, w, b = randn((4, 8, 6, 6), torch.float32), randn((24, 8, 1, 1), torch.float32), randn((24,), torch.float32)
    config, ops = make_config("relu", 1, 1, 2), torch.ops.conv1x1_ext
    mask = ops._avg_pool_masked(x, w, b, config)[1]
    dy = randn((4, 24), torch.float32)
    for wrong, what in (
        (mask[1:], config),
        (mask.view(1, -1), config),
        (mask.float(), config),
        (mask.repeat_interleave(2)[::2], config),
        (mask, make_config("silu", 1, 1, 2)),
    ):
        with pytest.raises(RuntimeError, match="mask: expected none, or what _avg_pool_masked returned"):
            ops._avg_pool_backward(dy, x, w, b, wrong, what, 7)


@pytest.mark.parametrize("route", [conv1x1_avg_pool, lambda x, w, b, activation: OP(x, w, b, 1, activation, False)])
@pytest.mark.parametrize("activation", ["relu", "relu6", "hardswish"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_holds_the_gradient_back_holds_nan_and_infinity_back(dtype, activation, route):
    x = randn((2, 3, 3, 5), dtype).abs().clamp(0.5, 2)
    w = torch.full((4, 3, 1, 1), -4.0, dtype=dtype)
    leaves = [t.requires_grad_() for t in (x, w, torch.zeros(4, dtype=dtype))]
    dy = torch.tensor([[float("nan"), float("inf"), -float("inf"), 1.0]] * 2, dtype=dtype)
    for grad in torch.autograd.grad(route(*leaves, activation=activation), leaves, dy):
        assert (grad == 0).all()


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_the_backward_is_explained(activation):
    x, w, b = leaves_of(1, 1, 1)
    how = explain(x, w, b, groups=2, activation=activation, direction="avg_pool")
    kept = activation == "relu" and x.device.type == "cpu"
    assert how["backward"] == ("from a bit kept for each output" if kept else "recomputes the pre-activation")
    assert how["activation"] == f"{activation}, in the kernel's epilogue"
    with torch.no_grad():
        assert "backward" not in explain(x, w, b, groups=2, activation=activation, direction="avg_pool")


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_fake_masks_are_as_the_real_ones(activation):
    args = (randn((4, 8, 5, 6), torch.float32), randn((24, 8, 1, 1), torch.float32), None)
    opcheck(torch.ops.conv1x1_ext._avg_pool_masked.default, (*args, make_config(activation, 1, 1, 2)))


# ---- routes -------------------------------------------------------------------------------------------------------


def operators_of(function):
    """The result, and which of our operators ran."""
    with profile(activities=[ProfilerActivity.CPU]) as prof:
        result = function()
    return result, {e.key.split("::")[1] for e in prof.key_averages() if e.key.startswith("conv1x1_ext::")}


def leaves_of(*need):
    tensors = (torch.randn(2, 4, 3, 2), torch.randn(6, 2, 1, 1), torch.randn(6))
    return [t.requires_grad_(bool(n)) for t, n in zip(tensors, need, strict=True)]


@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
@pytest.mark.parametrize("need", [(0, 0, 0), (1, 1, 1), (0, 1, 0), (1, 0, 0)], ids=str)
def test_plain_calls_go_to_the_private_operators(need, activation):
    x, w, b = leaves_of(*need)
    asked = [t for t in (x, w, b) if t.requires_grad]
    dy = torch.randn(2, 6)

    def run(function):
        y = function(x, w, b)
        return [y, *(torch.autograd.grad(y, asked, dy) if asked else ())]

    ours, names = operators_of(lambda: run(lambda *t: conv1x1_avg_pool(*t, groups=2, activation=activation)))
    assert names == ({"_avg_pool_masked", "_avg_pool_backward"} if asked else {"_avg_pool"})
    op = torch.ops.conv1x1_ext.conv1x1_avg_pool
    public, names = operators_of(lambda: run(lambda *t: op(*t, 2, activation, False)))
    assert names == {"conv1x1_avg_pool", *(["conv1x1_avg_pool_backward"] if asked else [])}
    assert all(torch.equal(a, e) for a, e in zip(ours, public, strict=True))
    assert explain(x, w, b, groups=2, activation=activation, direction="avg_pool")["route"].startswith("eager fast")


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "conv1x1_ext":
            self.names.add(func._opname)
        return func(*args, **(kwargs or {}))


def test_modes_and_transforms_see_the_public_operators():
    x, w, b = leaves_of(1, 1, 1)
    with Seen() as seen:
        y = conv1x1_avg_pool(x, w, b, groups=2)
    assert seen.names == {"conv1x1_avg_pool"}
    y = conv1x1_avg_pool(x, w, b, groups=2)
    with Seen() as seen:  # around the backward of a call that was made outside
        y.sum().backward(retain_graph=True)
    assert seen.names == {"conv1x1_avg_pool_backward"}
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 2 * 6 * (6 * 2)
    per_image = torch.vmap(torch.func.grad(lambda x: conv1x1_avg_pool(x, w, b, groups=2).square().sum()))
    _, names = operators_of(lambda: per_image(x.detach()))
    assert "conv1x1_avg_pool" in names and not any(n.startswith("_") for n in names)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert conv1x1_avg_pool(x, w, b, groups=2).dtype == torch.bfloat16


def test_create_graph_goes_through_differentiable_operators():
    x, w, b = leaves_of(1, 1, 1)
    y, names = operators_of(lambda: conv1x1_avg_pool(x, w, b, groups=2, activation="silu"))
    assert names == {"_avg_pool_masked"}
    (dx,), names = operators_of(lambda: torch.autograd.grad(y.square().sum(), x, create_graph=True))
    assert names == {"conv1x1", "conv1x1_backward"} and dx.requires_grad


@pytest.mark.parametrize("function", [conv1x1, conv1x1_avg_pool])
@pytest.mark.parametrize("which", ["input", "weight", "bias"])
def test_a_tensor_that_outlived_a_transform_keeps_its_gradient(which, function):
    leaves = dict(zip(("input", "weight", "bias"), leaves_of(1, 1, 1), strict=True))
    kept = []
    torch.func.grad(lambda t: kept.append(t * 1) or t.sum())(leaves[which])
    y = function(**{**leaves, which: kept[0]}, groups=2)
    torch.autograd.grad(y.sum(), list(leaves.values()))  # which raises where one of them does not matter


MEMORY = """
import resource, torch, conv1x1_ext
format = torch.{format}
x = torch.randn(1, 4, 256, 256).contiguous(memory_format=format).requires_grad_()
w = torch.randn(1024, 4, 1, 1).requires_grad_()
conv1x1_ext.conv1x1_avg_pool(x[:, :, :8, :8], w, activation="{activation}").sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
y = conv1x1_ext.conv1x1_avg_pool(x, w, activation="{activation}")
forward = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
y.sum().backward()
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
full = 1024 * 256 * 256 * 4 / 1024
print(forward - before, after - forward, full)
assert forward - before < full / 16 and after - forward < full / 8
"""


@pytest.mark.cpu_only(reason="measures the process; tests/test_cuda.py asks the allocator")
@cover(1, activation=("relu", "gelu"), format=("contiguous_format", "channels_last"))
def test_the_full_tensor_never_exists(activation, format):
    """It would be 256 MiB; peak memory grows by a fraction of that."""
    expect_ok(run_python(MEMORY.format(activation=activation, format=format)))
