"""First-class operators: opcheck, gradients, compile, export, fx, vmap, jvp, autocast, FLOPs, no hidden copies."""

import io
import itertools

import pytest
import torch
from covering import cover, full
from helpers import ACTIVATIONS, DEVICE, DTYPES, FLOATS, FORMATS, HALVES, conv, laid_out, opcheck, randn, stock_forward
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import conv1x1_ext
from conv1x1_ext import conv1x1, conv1x1_avg_pool

ops = torch.ops.conv1x1_ext


def operands(dtype=torch.float64, layout="contiguous", grad=True, stride=1, groups=2):
    x, w = laid_out((2, 4, 5, 3), dtype, layout), randn((6, 4 // groups, 1, 1), dtype)
    b, r = randn((6,), dtype), randn((2, 6, (5 - 1) // stride + 1, (3 - 1) // stride + 1), dtype)
    return [t.requires_grad_(grad) for t in (x, w, b, r)]


BOTH = (True, False)


@cover(
    whole=("dtype", "layout", "bias", "grad"),
    dtype=DTYPES,
    layout=FORMATS,
    bias=BOTH,
    residual=BOTH,
    activation=ACTIVATIONS,
    grad=BOTH,
)
def test_opcheck(dtype, layout, bias, residual, activation, grad):
    x, w, b, r = operands(dtype, layout, grad, 2)
    args = (x, w, b if bias else None, r if residual else None, [2], 2, activation or "none", False)
    opcheck(ops.conv1x1.default, args)


@cover(whole=("grad", "layout", "dtype"), grad=BOTH, activation=("none", "relu", "relu6"), layout=FORMATS, dtype=FLOATS)
def test_opcheck_of_backward(grad, activation, layout, dtype):
    x, w, _, r = operands(dtype, layout, grad)
    y = ops.conv1x1(x, w, None, None, [1], 2, activation, False).detach()
    args = (r, x, w, y, [1], 2, activation, False, True, True, True, activation != "none")
    opcheck(ops.conv1x1_backward.default, args)


@cover(activation=ACTIVATIONS, layout=FORMATS, dtype=FLOATS)
def test_opcheck_of_avg_pool(activation, layout, dtype):
    x, w, b, _ = operands(dtype, layout)
    opcheck(ops.conv1x1_avg_pool.default, (x, w, b, 2, activation or "none", False))


def test_opcheck_of_avg_pool_backward():
    x, w, b, _ = operands(grad=False)
    args = (torch.randn(2, 6, dtype=x.dtype), x, w, b, 2, "silu", False, True, True, True)
    opcheck(ops.conv1x1_avg_pool_backward.default, args)


def off_the_kinks(x, w, b, r, stride):
    """Moves the bias until finite differences do not step over a kink of the piecewise activations."""
    with torch.no_grad():
        for _ in range(100):
            z = stock_forward(x, w, b, stride, groups=2, residual=r)
            if min((z - kink).abs().min() for kink in (-3, 0, 3, 6)) > 1e-4:
                break
            b.copy_(torch.randn_like(b))


@cover(route=("eager", "public"), layout=FORMATS, stride=(1, 2), activation=ACTIVATIONS)
def test_first_and_second_derivatives(route, layout, stride, activation):
    x, w, b, r = operands(layout=layout, stride=stride)
    off_the_kinks(x, w, b, r, stride)

    def function(x, w, b, r):
        if route == "eager":
            return conv1x1(x, w, b, stride, groups=2, activation=activation, residual=r)
        return ops.conv1x1(x, w, b, r, [stride], 2, activation or "none", False)

    assert gradcheck(function, (x, w, b, r))
    assert gradgradcheck(function, (x, w, b, r))


@pytest.mark.parametrize("need", [n for n in itertools.product((0, 1), repeat=3) if any(n)], ids=str)
def test_second_derivatives_of_parts(need):
    x, w, b, r = operands()
    off_the_kinks(x, w, b, r, 1)
    x, w, b = (t.detach().requires_grad_(bool(n)) for t, n in zip((x, w, b), need, strict=True))
    function = lambda x, w, b: conv1x1(x, w, b, groups=2, activation="relu", residual=r.detach())  # noqa: E731
    assert gradgradcheck(function, (x, w, b))


class Net(nn.Module):
    def __init__(self, activation="relu"):
        super().__init__()
        self.a = conv1x1_ext.Conv1x1Act(4, 8, 1, 2, groups=2, activation=activation)
        self.b = conv1x1_ext.Conv1x1Act(8, 8, activation=activation)
        self.head = conv1x1_ext.Conv1x1AvgPool(8, 3)

    def forward(self, x):
        y = self.a(x)
        return self.head(self.b(y, y))


def gradients(function, x, module):
    leaves = [x, *module.parameters()]
    return torch.autograd.grad(function(x).square().sum(), leaves)


@pytest.mark.parametrize(
    "backend,layout,activation",
    [*itertools.product(["aot_eager"], FORMATS, [None, "relu", "silu"]), ("inductor", "contiguous", "silu")],
)
def test_compile_with_dynamic_shapes_and_gradients(backend, layout, activation):
    net = Net(activation)
    if backend == "inductor":
        if DEVICE.type == "cuda":
            pytest.importorskip("triton", reason="Inductor's CUDA kernels are Triton's")
        if not full():  # a layer alone, as the host's compiler takes most of half a minute for all of it
            net = net.a
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, dynamic=True, backend=backend)
    for n, h, w in ((2, 6, 5), (3, 9, 8)):
        x = laid_out((n, 4, h, w), torch.float32, layout).requires_grad_()
        torch.testing.assert_close(compiled(x), net(x))
        torch.testing.assert_close(gradients(compiled, x, net), gradients(net, x, net), atol=1e-4, rtol=1e-4)


def test_export_and_load():
    net, x = Net().eval(), torch.randn(2, 4, 6, 5)
    program = torch.export.export(net, (x,), dynamic_shapes={"x": {0: torch.export.Dim("n", min=1, max=64)}})
    assert [n.target for n in program.graph.nodes].count(ops.conv1x1.default) == 2
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    for n in (2, 7):
        x = torch.randn(n, 4, 6, 5)
        torch.testing.assert_close(loaded(x), net(x))


def test_fx_keeps_one_node():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = conv1x1_ext.Conv1x1Act(3, 4, activation="relu")

        def forward(self, x, r):
            return conv1x1(self.layer(x), r, activation="silu"), conv1x1_avg_pool(x, self.layer.weight)

    graph = torch.fx.symbolic_trace(Model())
    calls = [n.target for n in graph.graph.nodes if n.op == "call_function"]
    assert calls.count(conv1x1) == 2 and calls.count(conv1x1_avg_pool) == 1 and len(calls) == 3
    model, x, r = Model(), torch.randn(2, 3, 4, 4), torch.randn(5, 4, 1, 1)
    graph.load_state_dict(model.state_dict())
    torch.testing.assert_close(graph(x, r), model(x, r))


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("in_dims", [*list(itertools.product((0, None), repeat=4))[:-1], (1, 1, 0, 2)], ids=str)
def test_vmap(in_dims, activation):
    shapes = [(2, 4, 5, 3), (6, 4, 1, 1), (6,), (2, 6, 5, 3)]
    tensors = []
    for shape, dim in zip(shapes, in_dims, strict=True):
        tensors.append(torch.randn(shape if dim is None else (*shape[:dim], 3, *shape[dim:]), dtype=torch.float64))

    def run(f):
        return torch.vmap(lambda x, w, b, r: f(x, w, b, activation=activation, residual=r), in_dims)(*tensors)

    torch.testing.assert_close(run(conv1x1), run(stock_forward))


def test_vmap_of_unbatched_images_and_avg_pool():
    x, w, b = torch.randn(5, 4, 6, 3), torch.randn(7, 4, 1, 1), torch.randn(7)
    torch.testing.assert_close(torch.vmap(conv1x1, (0, None, None))(x, w, b), conv(x, w, b), atol=1e-5, rtol=1e-5)
    pooled = torch.vmap(lambda x: conv1x1_avg_pool(x, w, b))(x)
    torch.testing.assert_close(pooled, conv(x, w, b).relu().mean((2, 3)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("pool", [False, True])
def test_per_sample_gradients(pool, activation):
    x, w, b, _ = operands(grad=False)

    def ours(x, w, b):
        y = conv1x1_avg_pool(x, w, b, groups=2, activation=activation) if pool else None
        return (conv1x1(x, w, b, groups=2, activation=activation) if y is None else y).square().sum()

    def stock(x, w, b):
        y = stock_forward(x, w, b, groups=2, activation=activation)
        return (y.mean((-2, -1)) if pool else y).square().sum()

    def per_sample(f):
        return torch.vmap(torch.func.grad(f, argnums=(0, 1, 2)), in_dims=(0, None, None))(x, w, b)

    torch.testing.assert_close(per_sample(ours), per_sample(stock))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_functional_derivatives(activation):
    x, w, b, r = operands(grad=False)
    ours = lambda x, w: conv1x1(x, w, b, groups=2, activation=activation, residual=r)  # noqa: E731
    stock = lambda x, w: stock_forward(x, w, b, groups=2, activation=activation, residual=r)  # noqa: E731
    tangents = (torch.randn_like(x), torch.randn_like(w))
    for f in (ours, stock):
        f.jvp = torch.func.jvp(f, (x, w), tangents)
        f.vjp = torch.func.vjp(f, x, w)[1](r)
        inner = torch.func.grad(lambda x, f=f: f(x, w).square().sum())
        f.hessian = torch.func.grad(lambda x, inner=inner: inner(x).square().sum())(x)
    torch.testing.assert_close(ours.jvp, stock.jvp)
    torch.testing.assert_close(ours.vjp, stock.vjp)
    torch.testing.assert_close(ours.hessian, stock.hessian)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_dual_numbers(activation):
    x, w, b, r = operands(grad=False)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, torch.randn_like(t)) for t in (x, w, b, r)]
        for f, g in ((conv1x1, stock_forward), (conv1x1_avg_pool, None)):
            args = {"groups": 2, "activation": activation}
            ours = f(*duals[:3], **args, **({"residual": duals[3]} if g else {}))
            stock = g(*duals[:3], **args, residual=duals[3]) if g else stock_forward(*duals[:3], **args).mean((2, 3))
            for a, e in zip(forward_ad.unpack_dual(ours), forward_ad.unpack_dual(stock), strict=True):
                torch.testing.assert_close(a, e)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_as_conv2d(compiled, dtype):
    ours, stock = conv1x1_ext.Conv1x1Act(4, 6, activation="relu"), nn.Conv2d(4, 6, 1)
    stock.load_state_dict(ours.state_dict())
    torch._dynamo.reset()
    run = torch.compile(ours, fullgraph=True, backend="aot_eager") if compiled else ours
    for input_dtype in (torch.float32, dtype):
        x, z = (torch.linspace(-2, 2, 80).reshape(1, 4, 5, 4).to(input_dtype).requires_grad_() for _ in range(2))
        with torch.autocast(DEVICE.type, dtype):
            a, e = run(x), stock(z).relu()
            pooled = conv1x1_avg_pool(x, ours.weight, ours.bias)
        assert a.dtype == e.dtype == pooled.dtype == dtype
        a.sum().backward()
        e.sum().backward()
        assert x.grad.dtype == z.grad.dtype == input_dtype and ours.weight.grad.dtype == stock.weight.grad.dtype
        torch.testing.assert_close(a, e, atol=0.03, rtol=0.03)
        torch.testing.assert_close(ours.weight.grad, stock.weight.grad, atol=0.05, rtol=0.05)
        ours.zero_grad()
        stock.zero_grad()
    with torch.autocast(DEVICE.type, dtype), torch.autocast(DEVICE.type, enabled=False):
        assert ours(torch.randn(1, 4, 3, 3)).dtype == torch.float32


def test_autocast_leaves_float64_alone():
    x, w, b, r = operands(grad=False)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert conv(x, w, b, 1, 2).dtype == torch.float64
        assert conv1x1(x, w, b, groups=2, residual=r).dtype == torch.float64
        assert conv1x1_avg_pool(x, w, b, groups=2).dtype == torch.float64


def test_second_derivatives_with_a_stride_for_each_dimension():
    x, w, b, _ = operands()
    assert gradgradcheck(lambda x, w, b: conv1x1(x, w, b, (2, 1), groups=2), (x, w, b))


@pytest.mark.parametrize("activation", ["relu6", "hardswish"])
@pytest.mark.parametrize("pool", [False, True])
def test_functional_derivatives_beyond_both_kinks(pool, activation):
    x, w, b, _ = operands(grad=False)
    x *= 8
    z = stock_forward(x, w, b, groups=2)
    assert (z < -3).any() and ((z > 0) & (z < 3)).any() and (z > 6).any()

    def stock(x):
        y = stock_forward(x, w, b, groups=2, activation=activation)
        return (y.mean((-2, -1)) if pool else y).square().sum()

    def ours(x):
        return (conv1x1_avg_pool if pool else conv1x1)(x, w, b, groups=2, activation=activation).square().sum()

    torch.testing.assert_close(torch.func.grad(ours)(x), torch.func.grad(stock)(x))


def test_functionalize():
    layer, x = conv1x1_ext.Conv1x1Act(4, 6, activation="relu"), torch.randn(2, 4, 5, 5)
    assert torch.equal(torch.func.functionalize(layer)(x), layer(x))
    pooled = torch.func.functionalize(lambda x: conv1x1_avg_pool(x, layer.weight))
    assert torch.equal(pooled(x), conv1x1_avg_pool(x, layer.weight))


def test_jit_trace():
    net, x = conv1x1_ext.Conv1x1Act(4, 6, 1, 2, activation="relu").eval(), torch.randn(1, 4, 5, 5)
    traced = torch.jit.trace(net, (x,))
    x = torch.randn(2, 4, 7, 7)
    torch.testing.assert_close(traced(x), net(x))


def test_tensor_subclasses_see_the_functions():
    class Spy(torch.Tensor):
        seen = []  # noqa: RUF012

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            cls.seen.append(function)
            return super().__torch_function__(function, types, args, kwargs or {})

    x, w = torch.randn(1, 3, 4, 4).as_subclass(Spy), torch.randn(2, 3, 1, 1)
    assert torch.equal(conv1x1(x, w).as_subclass(torch.Tensor), conv1x1(x.as_subclass(torch.Tensor), w))
    conv1x1_avg_pool(x, w)
    assert conv1x1 in Spy.seen and conv1x1_avg_pool in Spy.seen


def test_a_function_mode_sees_the_function_once_with_its_arguments():
    class Names(torch.overrides.TorchFunctionMode):
        seen = []  # noqa: RUF012

        def __torch_function__(self, function, types, args=(), kwargs=None):
            self.seen.append((function, args, kwargs))
            return function(*args, **(kwargs or {}))

    x, w = torch.randn(1, 3, 4, 4), torch.randn(2, 3, 1, 1)
    layer, head = conv1x1_ext.Conv1x1Act(3, 2, stride=2, activation="relu"), conv1x1_ext.Conv1x1AvgPool(3, 2)
    calls = [
        (conv1x1, lambda: conv1x1(x, w, stride=2, activation="silu"), (2, "silu")),
        (conv1x1, lambda: layer(x), ((2, 2), "relu")),
        (conv1x1_avg_pool, lambda: conv1x1_avg_pool(x, w, activation="gelu"), ("gelu",)),
        (conv1x1_avg_pool, lambda: head(x), ("relu",)),
    ]
    for function, call, expected in calls:
        Names.seen.clear()
        with Names():
            y = call()
        assert torch.equal(y, call())
        ((found, args, kwargs),) = Names.seen
        assert found is function and args[0] is x and all(e in [*args, *kwargs.values()] for e in expected if e != 2)
        assert 2 not in expected or args[3] == 2


def test_meta_and_fake_tensors_have_no_plan_and_nothing_to_pack():
    for mode in (torch.device("meta"), FakeTensorMode()):
        with mode:
            layer = conv1x1_ext.Conv1x1(256, 128).eval()
            x = torch.randn(1, 256, 2, 2).to(memory_format=torch.channels_last)
            with pytest.raises(RuntimeError, match="explain: input: expected a tensor on the CPU or a GPU"):
                conv1x1_ext.explain(x, layer.weight)
        if x.is_meta:
            with torch.no_grad():
                assert not layer.prepack(x).prepacked and layer(x).shape == (1, 128, 2, 2)
            with pytest.raises(RuntimeError, match="channels"):
                layer.prepack(x[:, :5])


@pytest.mark.parametrize("stride,groups", [(1, 1), (2, 1), (1, 2), ((2, 3), 2)], ids=str)
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)], ids=str)
def test_flops_as_conv2d(needs, stride, groups):
    """With groups torch's formula multiplies the weight gradient's count by them; there the true count is asked for."""
    x, w, b = torch.randn(2, 8, 9, 7), torch.randn(6, 8 // groups, 1, 1), torch.randn(6)
    x.requires_grad_(needs[0])
    w.requires_grad_(needs[1])

    def count(f):
        with FlopCounterMode(display=False) as forward:
            y = f(x, w, b, stride, groups=groups)
        with FlopCounterMode(display=False) as backward:
            y.sum().backward()
        return forward.get_total_flops(), backward.get_total_flops()

    forward, backward = count(lambda *a, **k: conv1x1(*a, activation="relu", **k))
    stock_forward_flops, stock_backward_flops = count(nn.functional.conv2d)
    assert forward == stock_forward_flops
    assert backward == (stock_backward_flops if groups == 1 else sum(needs) * forward)


COPIES = ("aten::copy_", "aten::clone", "aten::contiguous", "aten::_to_copy", "aten::empty_like", "aten::zeros")


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("stride,groups", [(1, 1), (2, 1), (1, 4)])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_no_hidden_copies(activation, training, stride, groups, layout):
    x, w = laid_out((2, 16, 14, 14), torch.float32, layout), randn((8, 16 // groups, 1, 1), torch.float32)
    b, out = randn((8,), torch.float32), (14 - 1) // stride + 1
    r, dy = (laid_out((2, 8, out, out), torch.float32, layout) for _ in range(2))
    leaves = [t.requires_grad_(training) for t in (x, w, b, r)]

    def run():
        y = conv1x1(x, w, b, stride, groups=groups, activation=activation, residual=r)
        return torch.autograd.grad(y, leaves, dy) if training else y

    run()
    with profile(activities=[ProfilerActivity.CPU]) as prof:
        run()
    names = {event.key for event in prof.key_averages()}
    assert "conv1x1_ext::_fprop" in names and ("conv1x1_ext::_backward" in names) == training
    assert not names & set(COPIES), names
