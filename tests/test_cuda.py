"""What only CUDA has: streams, graphs, devices, TF32, the caching allocator, tensors of more than 2^31 elements.

The rest of the suite runs on CUDA with CONV1X1_TEST_DEVICE=cuda; these tests run wherever there is a GPU and the
library has kernels for it, whatever that variable says.
"""

import itertools

import pytest
import torch
from helpers import (
    ACTIVATIONS,
    DTYPES,
    FORMATS,
    HALVES,
    Case,
    activate,
    conv,
    exact,
    expect_ok,
    laid_out,
    opcheck,
    randn,
    run_python,
    same_bits,
    stock_forward,
    weight_of,
)  # fmt: skip

import conv1x1_ext
from conv1x1_ext import conv1x1, conv1x1_avg_pool

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU"),
    pytest.mark.skipif(
        conv1x1_ext.build_info()["cuda_archs"].startswith("none"), reason="the library was built without CUDA"
    ),
]
SHAPE = Case(4, 64, 96, (20, 20))  # a multiple of every tile's vector width
ODD = Case(3, 37, 51, (7, 9))  # of none
BUSY = 1_000_000_000  # cycles: about half a second
MIB = 1 << 20


@pytest.fixture(autouse=True)
def on_cuda():
    """Tensors are made on the GPU; float32 is IEEE unless a test says otherwise."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    with torch.device("cuda"):
        yield
    torch.cuda.synchronize()
    torch.backends.cudnn.allow_tf32 = before


def operands(case=SHAPE, dtype=torch.float32, layout="contiguous"):
    """x, w, b and dy."""
    return (
        laid_out(case.x_shape, dtype, layout), weight_of(case.w_shape, dtype, layout), randn((case.c_out,), dtype),
        laid_out(case.y_shape, dtype, layout),
    )  # fmt: skip


def step(x, w, b, dy, activation="relu", function=conv1x1):
    """Forward and backward: y, dx, dw, dbias."""
    leaves = [t.detach().requires_grad_() for t in (x, w, b)]
    y = function(*leaves, activation=activation)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def close(ours, stock, dtype):
    tolerance = {torch.float32: 1e-4, torch.float64: 1e-10, torch.bfloat16: 0.05, torch.float16: 0.01}[dtype]
    scale = max(stock.abs().max().item(), 1e-30)
    torch.testing.assert_close(ours, stock, rtol=tolerance, atol=tolerance * scale)


# ---- streams, graphs, devices -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", FORMATS)
def test_runs_on_the_current_stream(layout, dtype):
    """The default stream is busy, so a kernel launched there would come too late for the read on the side stream."""
    tensors = operands(SHAPE, dtype, layout)
    expected = [t.cpu() for t in step(*tensors)]
    side, ready = torch.cuda.Stream(), torch.cuda.Event()
    ready.record()
    side.wait_event(ready)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        poison = [torch.full_like(t, float("nan"), device="cuda") for t in expected]
        side.synchronize()
        del poison  # the allocator hands this memory to the outputs
    torch.cuda._sleep(BUSY)
    with torch.cuda.stream(side):
        found = [t.cpu() for t in step(*tensors)]
    assert all(same_bits(a, b) for a, b in zip(found, expected, strict=True))


def warm_up(function):
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("case", [SHAPE, ODD], ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_graph_capture_and_replay(training, case, layout, dtype):
    """Capture fails on any synchronisation, so this is also the proof that there is none."""
    x, w, b, dy = operands(case, dtype, layout)
    run = (lambda: step(x, w, b, dy)) if training else (lambda: [conv1x1(x, w, b, activation="silu")])
    warm_up(run)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(3):
        for t in (x, w, b, dy):
            t.copy_(torch.randn_like(t))
        for t in captured:
            t.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert all(same_bits(a, e) for a, e in zip(captured, run(), strict=True))


def test_graph_capture_of_avg_pool():
    x, w, b, _ = operands()
    dy = torch.randn(SHAPE.n, SHAPE.c_out)
    run = lambda: step(x, w, b, dy, "silu", conv1x1_avg_pool)  # noqa: E731
    warm_up(run)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    x.copy_(torch.randn_like(x))
    graph.replay()
    torch.cuda.synchronize()
    assert all(same_bits(a, e) for a, e in zip(captured, run(), strict=True))


@pytest.mark.parametrize("training", [False, True])
def test_no_hidden_synchronisation(training):
    tensors = operands()
    step(*tensors)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(*tensors) if training else conv1x1(*tensors[:3], activation="gelu")
        conv1x1_avg_pool(*tensors[:3])
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device_than_the_current_one():
    tensors = [t.to("cuda:1") for t in operands()]
    assert torch.cuda.current_device() == 0
    found = step(*tensors)
    assert torch.cuda.current_device() == 0 and all(t.device.index == 1 for t in found)
    expected = step(*(t.to("cuda:0") for t in tensors))
    assert all(same_bits(a.cpu(), e.cpu()) for a, e in zip(found, expected, strict=True))
    with pytest.raises(RuntimeError, match="weight: expected the input's device cuda:1, got cuda:0"):
        conv1x1(tensors[0], tensors[1].to("cuda:0"))


def test_an_error_leaves_the_device_and_the_next_call_alone():
    x, w, b, _ = operands()
    device = torch.cuda.current_device()
    with pytest.raises(RuntimeError, match="bias: expected shape"):
        conv1x1(x, w, b[1:])
    assert torch.cuda.current_device() == device
    close(conv1x1(x, w, b), conv(x, w, b), x.dtype)


@pytest.mark.parametrize("which", ["weight", "bias", "residual"])
def test_tensors_of_different_devices(which):
    x, w, b, r = operands()
    moved = {"weight": w, "bias": b, "residual": r} | {which: {"weight": w, "bias": b, "residual": r}[which].cpu()}
    with pytest.raises(RuntimeError, match=f"{which}: expected the input's device cuda:0, got cpu"):
        conv1x1(x, **moved)
    with pytest.raises(RuntimeError, match="weight: expected the input's device cpu, got cuda:0"):
        conv1x1(x.cpu(), w)


# ---- numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("case", [SHAPE, ODD, Case(32, 64, 64, (56, 56))], ids=str)
def test_the_same_bits_in_every_run(case, layout, dtype):
    tensors = operands(case, dtype, layout)
    first = step(*tensors)
    pooled = step(*tensors[:3], randn((case.n, case.c_out), dtype).fill_(0.5), "silu", conv1x1_avg_pool)
    for _ in range(4):
        assert all(same_bits(a, e) for a, e in zip(step(*tensors), first, strict=True))
        again = step(*tensors[:3], torch.full_like(pooled[0], 0.5), "silu", conv1x1_avg_pool)
        assert all(same_bits(a, e) for a, e in zip(again, pooled, strict=True))


def relative(found, truth):
    return ((exact(found) - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("case", [SHAPE, ODD, Case(2, 512, 256, (14, 14)), Case(16, 64, 64, (28, 28))], ids=str)
def test_tf32_is_as_accurate_as_stocks(case, layout):
    """No activation: a rounded pre-activation near 0 would change the mask."""
    tensors = operands(case, torch.float32, layout)
    truth = step(*(exact(t) for t in tensors), None, stock_forward)
    stock_ieee = [relative(t, e) for t, e in zip(step(*tensors, None, stock_forward), truth, strict=True)]
    torch.backends.cudnn.allow_tf32 = True
    ours = [relative(t, e) for t, e in zip(step(*tensors, None), truth, strict=True)]
    stock = [relative(t, e) for t, e in zip(step(*tensors, None, stock_forward), truth, strict=True)]
    # cuDNN may choose IEEE kernels for a small or odd shape: a TF32 product's rounding is allowed in any case.
    for a, s in zip(ours, stock, strict=True):
        assert a <= 2 * max(s, 2**-11), (ours, stock, stock_ieee)
    torch.backends.cudnn.allow_tf32 = False
    ieee = [relative(t, e) for t, e in zip(step(*tensors, None), truth, strict=True)]
    for a, s in zip(ieee, stock_ieee, strict=True):
        assert a <= 2 * s + torch.finfo(torch.float32).eps, (ieee, stock_ieee)


# 1 + 2^-12 is a float32 that TF32 rounds to 1, so the sums below are exact and differ between the two.
TF32 = """
import torch, conv1x1_ext
cudnn = torch.backends.cudnn
x, w = torch.full((4, 64, 32, 32), 1 + 2**-12, device="cuda"), torch.ones(128, 64, 1, 1, device="cuda")
for value, rounds in {settings}:
    {statement}
    for layout in (torch.contiguous_format, torch.channels_last):
        a, b = (t.to(memory_format=layout).requires_grad_() for t in (x, w))
        y = conv1x1_ext.conv1x1(a, b)
        assert (y == (64.0 if rounds else 64 + 2**-6)).all(), (value, layout, y.flatten()[0].item())
        dx, dw = torch.autograd.grad(y, (a, b), torch.full_like(y, 1 + 2**-12))
        assert (dx == (128.0 if rounds else 128 + 2**-5)).all(), (value, layout, dx.flatten()[0].item())
        exact = 4096 * (1 if rounds else (1 + 2**-12)**2)
        assert ((dw / exact - 1).abs() < 1e-5).all(), (value, layout, dw.flatten()[0].item())
        pooled = conv1x1_ext.conv1x1_avg_pool(a, b)
        assert (pooled == (64.0 if rounds else 64 + 2**-6)).all(), (value, layout, pooled.flatten()[0].item())
print("ok")
"""
APIS = {
    "cudnn.allow_tf32": ("cudnn.allow_tf32 = value", [(True, True), (False, False), (True, True)]),
    "cudnn.conv.fp32_precision": (
        "cudnn.conv.fp32_precision = value", [("tf32", True), ("ieee", False), ("tf32", True)],
    ),
    "cudnn.flags": ("torch.backends.cudnn.set_flags(_allow_tf32=value)", [(True, True), (False, False)]),
}  # fmt: skip


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0), reason="this GPU has no TF32"
)
@pytest.mark.parametrize("api", list(APIS))
def test_tf32_follows_torchs_settings(api):
    """A fresh process each: torch refuses to mix the two APIs."""
    if api == "cudnn.conv.fp32_precision" and not hasattr(torch.backends.cudnn, "conv"):
        pytest.skip("this torch has no fp32_precision")
    statement, settings = APIS[api]
    assert "ok" in expect_ok(run_python(TF32.format(statement=statement, settings=settings)))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("layout", FORMATS)
def test_autocast_as_conv2d(layout, dtype):
    ours = conv1x1_ext.Conv1x1Act(16, 24, activation="relu").to(memory_format=getattr(torch, _format(layout)))
    x = laid_out((2, 16, 9, 8), torch.float32, layout).requires_grad_()
    with torch.autocast("cuda", dtype):
        y, e = ours(x), torch.nn.functional.conv2d(x, ours.weight, ours.bias).relu()
        pooled = conv1x1_avg_pool(x, ours.weight, ours.bias)
    assert y.dtype == e.dtype == pooled.dtype == dtype and y.stride() == e.stride()
    close(y, e, dtype)
    close(pooled, e.mean((2, 3)), dtype)
    dx, dw = torch.autograd.grad(y.float().square().sum(), (x, ours.weight))
    ex, ew = torch.autograd.grad(e.float().square().sum(), (x, ours.weight))
    assert dx.dtype == dw.dtype == torch.float32
    close(dx, ex, dtype)
    close(dw, ew, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", FORMATS)
def test_prepack_keeps_nothing(layout, dtype):
    """The kernels read the weight as it lies."""
    x, w, b, _ = operands(SHAPE, dtype, layout)
    module = conv1x1_ext.Conv1x1Act(SHAPE.c_in, SHAPE.c_out, activation="relu", dtype=dtype).eval()
    module.load_state_dict({"weight": w, "bias": b})
    with torch.no_grad():
        expected = conv1x1(x, module.weight, module.bias, activation="relu")
        assert module.prepack(x) is module and not module.prepacked
        assert same_bits(module(x), expected)


def _format(layout):
    return {"contiguous": "contiguous_format", "channels_last": "channels_last"}[layout]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("layout,weight_layout", list(itertools.product(FORMATS, repeat=2)))
def test_output_strides_as_conv(layout, weight_layout, dims, dtype):
    for batched, n, groups in itertools.product((True, False), (1, 2), (1, 2)):
        x = laid_out((*((n,) if batched else ()), 4, *[5] * dims), dtype, layout, 1 if batched else 0)
        w = weight_of((6, 4 // groups, *[1] * dims), dtype, weight_layout)
        assert conv1x1(x, w, groups=groups).stride() == conv(x, w, groups=groups).stride(), (batched, n, groups)


# ---- tracing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_compile(activation, layout, backend):
    if backend == "inductor":
        pytest.importorskip("triton", reason="Inductor's CUDA kernels are Triton's")
    torch._dynamo.reset()
    tensors = operands(Case(2, 16, 24, (9, 8)), torch.float32, layout)
    compiled = torch.compile(conv1x1, fullgraph=True, backend=backend)
    for a, e in zip(step(*tensors, activation, compiled), step(*tensors, activation), strict=True):
        assert a.stride() == e.stride()
        close(a, e, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    x, w, b, r = (t.requires_grad_() for t in operands(Case(2, 4, 6, (5, 3)), dtype))
    ops = torch.ops.conv1x1_ext
    calls = [
        (ops.conv1x1.default, (x, w, b, r, [1], 1, "relu", True)),
        (ops.conv1x1_avg_pool.default, (x, w, b, 1, "silu", True)),
    ]
    for op, args in calls:
        opcheck(op, args)


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("layout", FORMATS)
def test_second_derivatives(layout, activation):
    x, w, b, _ = operands(Case(2, 4, 6, (3, 2)), torch.float64, layout)
    leaves = [t.requires_grad_() for t in (x, w, b)]
    for function in (conv1x1, conv1x1_avg_pool):
        run = lambda *t, f=function: f(*t, activation=activation)  # noqa: E731
        assert torch.autograd.gradcheck(run, leaves)
        assert torch.autograd.gradgradcheck(run, leaves)


# ---- memory -------------------------------------------------------------------------------------------------------


def peak_of(function):
    """Bytes above what was allocated before, and the result."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, result


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("activation", [a for a in ACTIVATIONS if a])
@pytest.mark.parametrize("n,size", [(8, 96), (2, 192)])
def test_avg_pool_never_holds_the_convolutions_output(n, size, activation, layout):
    """The backward holds a quarter of images as large as these at a time, or one where there are fewer than four.

    Beside it are the gradients that it returns and the partial sums of its GEMMs.
    """
    case = Case(n, 16, 1024, (size, size))
    x, w, b = (t.requires_grad_() for t in operands(case, torch.float32, layout)[:3])
    image = 4 * case.c_out * size * size
    full, piece = n * image, -(-n // 4) * image
    forward, y = peak_of(lambda: conv1x1_avg_pool(x, w, b, activation=activation))
    backward, grads = peak_of(lambda: torch.autograd.grad(y.sum(), (x, w, b)))
    returned = sum(g.nbytes for g in grads)
    assert forward < full / 16, (forward, full)
    assert backward < piece + returned + full / 16, (backward, piece, returned, full)
    z = stock_forward(x, w, b, activation=None)
    truth = activate(z, activation).mean((2, 3))
    close(y, truth, torch.float32)
    for a, e in zip(grads, torch.autograd.grad(truth.sum(), (x, w, b)), strict=True):
        assert ((a - e).norm() / e.norm()).item() < 1e-3


@pytest.mark.parametrize("activation", [None, "relu", "relu6"])
def test_autograd_saves_input_weight_and_output_only(activation):
    x, w, b, _ = (t.requires_grad_() for t in operands(Case(8, 64, 64, (56, 56))))
    saved = []
    before = torch.cuda.memory_allocated()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        y = conv1x1(x, w, b, activation=activation)
    assert set(saved) <= {x.data_ptr(), w.data_ptr(), y.data_ptr()}
    assert torch.cuda.memory_allocated() - before <= y.nbytes + 2 * MIB


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("case", [Case(16, 64, 256, (56, 56)), Case(16, 512, 512, (14, 14))], ids=str)
def test_training_step_needs_no_more_memory_than_stock(case, layout, dtype):
    tensors = operands(case, dtype, layout)
    for function in (conv1x1, stock_forward):
        step(*tensors, "relu", function)  # the handles and workspaces of libraries
    ours, _ = peak_of(lambda: step(*tensors))
    stock, _ = peak_of(lambda: step(*tensors, "relu", stock_forward))
    assert ours <= stock + 2 * MIB, (ours / MIB, stock / MIB)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("c_in,c_out", [(64, 8), (8, 64)])
def test_more_than_2_to_the_31_elements(c_in, c_out, layout):
    """Forward and gradients; the last rows against a call on them alone, the sums against the number of terms."""
    n, size = 3, 3500
    assert n * max(c_in, c_out) * size * size > 1 << 31
    needed = 4 * 2 * n * (c_in + c_out) * size * size
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed >> 30} GiB of free GPU memory")
    memory_format = getattr(torch, _format(layout))
    x = torch.empty(n, c_in, size, size, dtype=torch.bfloat16, memory_format=memory_format).fill_(1)
    x[-1, :, -2:].normal_()
    w = randn((c_out, c_in, 1, 1), torch.bfloat16)
    leaves = [t.requires_grad_() for t in (x, w)]
    y = conv1x1(*leaves, activation="relu")
    last = conv1x1(x.detach()[-1:, :, -2:], w.detach(), activation="relu")
    close(y.detach()[-1:, :, -2:], last, torch.bfloat16)
    close(y.detach()[0, :, 0, 0], w.detach().float().sum((1, 2, 3)).relu().bfloat16(), torch.bfloat16)
    dy = torch.ones_like(y.detach())
    dx, dw = torch.autograd.grad(y, leaves, dy)
    del dy
    mask = (last > 0).bfloat16()
    close(dx[-1:, :, -2:], conv(mask, w.detach().transpose(0, 1)), torch.bfloat16)
    on = (y.detach()[0, :, 0, 0] > 0).float() * n * size * size
    assert ((dw.squeeze() - on[:, None]).abs() <= 0.02 * n * size * size).all()
