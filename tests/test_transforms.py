"""Transforms: torch.func, forward mode, vmap and batched gradients, eager and traced, of the API and of the operators.

Each gives what it gives of stock torch's convolution, or an error; never zeros.
"""

import itertools

import pytest
import torch
from covering import cover
from helpers import ACTIVATIONS, randn, stock_forward
from torch import nn
from torch.autograd import forward_ad, functional, gradcheck
from torch.func import functionalize, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils._python_dispatch import TorchDispatchMode

from conv1x1_ext import conv1x1, conv1x1_avg_pool

ops = torch.ops.conv1x1_ext
F64 = torch.float64
SHAPES = ((2, 4, 3, 2), (6, 2, 1, 1), (6,), (2, 6, 3, 2))  # input, weight of two groups, bias, residual


def operands(dtype=F64):
    return [randn(shape, dtype) for shape in SHAPES]


def direct(x, w, b, r, activation):
    return ops.conv1x1(x, w, b, r, [1], 2, activation or "none", False)


def api(x, w, b, r, activation):
    return conv1x1(x, w, b, groups=2, activation=activation, residual=r)


def stock(x, w, b, r, activation):
    return stock_forward(x, w, b, groups=2, activation=activation, residual=r)


def direct_pool(x, w, b, r, activation):
    return ops.conv1x1_avg_pool(x, w, b, 2, activation or "none", False)


def api_pool(x, w, b, r, activation):
    return conv1x1_avg_pool(x, w, b, groups=2, activation=activation)


def stock_pool(x, w, b, r, activation):
    return stock_forward(x, w, b, groups=2, activation=activation).mean((-2, -1))


FUNCTIONS = {
    "direct": (direct, stock),
    "api": (api, stock),
    "direct_pool": (direct_pool, stock_pool),
    "api_pool": (api_pool, stock_pool),
}


def scalar(f, args, activation):
    """Of input and weight; the sines keep second derivatives from vanishing."""
    return lambda x, w: f(x, w, *args[2:], activation).sin().sum()


TRANSFORMS = {
    "grad": lambda f, x, w: grad(f, (0, 1))(x, w),
    "vjp": lambda f, x, w: vjp(f, x, w)[1](torch.ones((), dtype=x.dtype)),
    "jvp": lambda f, x, w: jvp(f, (x, w), (x.cos(), w.cos()))[1],
    "jacrev": lambda f, x, w: jacrev(f, (0, 1))(x, w),
    "jacfwd": lambda f, x, w: jacfwd(f, 1)(x, w),
    "grad of grad": lambda f, x, w: grad(lambda w: grad(f)(x, w).square().sum())(w),
    "jvp of grad": lambda f, x, w: jvp(grad(f, (0, 1)), (x, w), (x.cos(), w.cos()))[1],
    "grad of jvp": lambda f, x, w: grad(lambda w: jvp(lambda x: f(x, w), (x,), (x.cos(),))[1])(w),
    "jvp of jvp": lambda f, x, w: jvp(lambda w: jvp(lambda x: f(x, w), (x,), (x.cos(),))[1], (w,), (w.cos(),))[1],
    "hessian": lambda f, x, w: hessian(f, 1)(x, w),
    "vmap of grad": lambda f, x, w: vmap(grad(f, (0, 1)), (0, None))(x.unsqueeze(1), w),
    "vmap of jvp": lambda f, x, w: vmap(lambda t: jvp(f, (x[:1], w), (t, w.cos()))[1])(x.unsqueeze(1)),
    "grad of vmap": lambda f, x, w: grad(lambda w: vmap(f, (0, None))(x.unsqueeze(1), w).sum())(w),
    "functionalize": lambda f, x, w: functionalize(f)(x, w),
    "functionalize of grad": lambda f, x, w: functionalize(grad(f))(x, w),
}


@cover(function=FUNCTIONS, transform=TRANSFORMS, activation=ACTIVATIONS)
def test_torch_func(function, transform, activation):
    args = operands()
    if "vmap" in transform:
        args[3] = args[3][:1]
    run = TRANSFORMS[transform]
    ours, theirs = (run(scalar(f, args, activation), *args[:2]) for f in FUNCTIONS[function])
    torch.testing.assert_close(ours, theirs)


COMPILED = [name for name in TRANSFORMS if "functionalize" not in name]  # not even of stock: Dynamo does not know it


@cover(function=("api", "direct_pool"), transform=COMPILED, activation=("relu", "silu"))
def test_torch_func_in_a_compiled_function(function, transform, activation):
    args = operands()
    if "vmap" in transform:
        args[3] = args[3][:1]
    run, (f, g) = TRANSFORMS[transform], FUNCTIONS[function]
    expected = run(scalar(g, args, activation), *args[:2])
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, w: run(scalar(f, args, activation), x, w), backend="aot_eager")
    torch.testing.assert_close(compiled(*args[:2]), expected)


# ---- forward mode of direct calls -----------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("function", [direct, direct_pool])
def test_dual_numbers_of_operators(function, activation):
    args = [t.requires_grad_() for t in operands()]
    off_the_kinks(args)
    args = args if function is direct else args[:3]
    run = lambda *args: function(*args, *[None] * (4 - len(args)), activation)  # noqa: E731
    assert gradcheck(run, args, check_forward_ad=True, check_batched_forward_grad=True)


def off_the_kinks(args):
    """Moves the bias until finite differences do not step over a kink."""
    with torch.no_grad():
        while min((stock(*args, None) - kink).abs().min() for kink in (-3, 0, 3, 6)) < 1e-4:
            args[2].copy_(torch.randn_like(args[2]))


@pytest.mark.parametrize("need", [(1, 1, 1, 1), (1, 0, 0, 0), (0, 1, 1, 0)], ids=str)
@pytest.mark.parametrize("activation", ["none", "relu", "relu6"])
def test_dual_numbers_of_the_backward_operator(activation, need):
    x, w, b, g = operands()
    y = direct(x, w, b, None, None if activation == "none" else activation)
    need = [bool(n) for n in need[:3]] + [bool(need[3]) and activation != "none"]

    def run(g, x, w):
        grads = ops.conv1x1_backward(g, x, w, y, [1], 2, activation, False, *need)
        return tuple(t for t in grads if t is not None)

    assert gradcheck(run, [t.requires_grad_() for t in (g, x, w)], check_forward_ad=True)


def test_the_pooling_backward_operator_has_no_tangent_but_an_error():
    x, w, b, _ = operands()
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="conv1x1_avg_pool_backward: not differentiable"):
        g = forward_ad.make_dual(randn((2, 6), F64), randn((2, 6), F64))
        ops.conv1x1_avg_pool_backward(g, x, w, b, 2, "relu", False, True, True, True)


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])  # torch's SiLU has no forward mode of its backward
@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_backward_in_forward_mode(function, activation):
    """The call was made before the level began, or in it."""
    args, results = operands(), []
    tangent = randn(stock(*args, activation).shape, F64)
    for f in FUNCTIONS[function]:
        x, w = (t.clone().requires_grad_() for t in args[:2])
        early = f(x, w, *args[2:], activation)
        v = tangent if early.dim() == 4 else tangent.mean((2, 3))
        with forward_ad.dual_level():
            late = f(x, w, *args[2:], activation)
            for y in (early, late):
                grads = torch.autograd.grad(y, (x, w), forward_ad.make_dual(v.cos(), v))
                results.append([t for g in grads for t in forward_ad.unpack_dual(g)])
    for found, expected in zip(results[:2], results[2:], strict=True):
        torch.testing.assert_close(found, expected)


def trace(f, x, w):
    return torch.jit.trace(f, (x, w), check_trace=False)


def export(f, x, w):
    class Module(nn.Module):
        def forward(self, x, w):
            return f(x, w)

    return torch.export.export(Module(), (x, w)).module()


def compiled(f, x, w):
    return torch.compile(f, backend="aot_eager", fullgraph=True)


@pytest.mark.parametrize("make", [trace, export, compiled])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_forward_mode_of_a_traced_graph_is_right_or_raises(function, make):
    args, (ours, theirs) = operands(), FUNCTIONS[function]
    x, w = args[:2]
    tangents = (x.cos(), w.cos())
    torch._dynamo.reset()
    _, expected = jvp(lambda x, w: theirs(x, w, *args[2:], "relu"), (x, w), tangents)
    graph = make(lambda x, w: ours(x, w, *args[2:], "relu"), x, w)
    try:
        _, found = jvp(graph, (x, w), tangents)
    except RuntimeError:  # torch's own: of a graph with no door for forward mode
        assert make is compiled
    else:
        torch.testing.assert_close(found, expected)
    with forward_ad.dual_level():
        try:
            dual = graph(forward_ad.make_dual(x, tangents[0]), forward_ad.make_dual(w, tangents[1]))
        except RuntimeError:
            assert make is compiled
        else:
            torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, expected)


# ---- vmap and batched gradients -----------------------------------------------------------------------------------


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "conv1x1_ext":
            self.seen.append(function)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("one_image", [False, True])
@pytest.mark.parametrize("batched", list(itertools.product((0, None), repeat=3))[:-1], ids=str)
def test_a_batch_is_one_call(batched, one_image, groups, pool):
    shapes = ((4, 3, 2) if one_image else (2, 4, 3, 2), (6, 4 // groups, 1, 1), (6,))
    args = [randn(s if d is None else (3, *s), F64) for s, d in zip(shapes, batched, strict=True)]

    def ours(x, w, b):
        return (conv1x1_avg_pool if pool else conv1x1)(x, w, b, groups=groups, activation="relu")

    def theirs(x, w, b):
        y = stock_forward(x, w, b, groups=groups, activation="relu")
        return y.mean((-2, -1)) if pool else y

    with Calls() as calls:
        y = vmap(ours, batched)(*args)
    assert len(calls.seen) == 1, calls.seen
    torch.testing.assert_close(y, vmap(theirs, batched)(*args))

    def gradients(f):
        return vmap(grad(lambda *a: f(*a).sin().sum(), (0, 1, 2)), batched)(*args)

    with Calls() as calls:
        ours_grads = gradients(ours)
    assert len(calls.seen) <= 3 + pool, calls.seen  # which recomputes the pre-activation
    torch.testing.assert_close(ours_grads, gradients(theirs))


def test_an_error_below_vmap_speaks_of_one_example():
    x, w, b, r = operands()
    with pytest.raises(RuntimeError, match=r"bias: expected shape \[6\], got \[5\]"):
        vmap(lambda x, w: conv1x1(x, w, b[:5], groups=2))(torch.stack([x, x]), torch.stack([w, w]))
    with pytest.raises(RuntimeError, match=r"residual: expected the output's shape \[2, 6, 3, 2\], got \[1, 6, 3, 2\]"):
        vmap(lambda x: conv1x1(x, w, b, groups=2, residual=r[:1]))(torch.stack([x, x]))


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("function", ["api", "api_pool", "direct", "direct_pool"])
def test_batched_gradients(function, activation):
    args = [t.requires_grad_() for t in operands()]
    off_the_kinks(args)
    x, w, b, r = args
    results = []
    for f in FUNCTIONS[function]:
        run = lambda x, w, f=f: f(x, w, b, r, activation).sin()  # noqa: E731
        y = run(x, w)
        v = torch.linspace(-1, 1, 3 * y.numel(), dtype=F64).reshape(3, *y.shape)
        one = torch.autograd.grad(y, (x, w, b), v, is_grads_batched=True, retain_graph=True)
        nested = torch._vmap_internals._vmap(
            lambda v, y=y: torch.autograd.grad(y, (x, w), v, is_grads_batched=True, retain_graph=True)
        )(torch.stack([v[:1], v[1:2]]))
        scalar = lambda x, w, run=run: run(x, w).sum()  # noqa: E731
        results.append(
            (
                one,
                nested,
                functional.jacobian(run, (x, w), vectorize=True),
                functional.jacobian(run, (x, w), vectorize=True, strategy="forward-mode"),
                functional.hessian(scalar, (x, w), vectorize=True),
            )
        )
    torch.testing.assert_close(*results)
    assert gradcheck(lambda x, w: FUNCTIONS[function][0](x, w, b, r, activation), (x, w), check_batched_grad=True)


def test_vmap_of_a_backward_whose_forward_is_outside():
    x, w, b, _ = operands()
    x.requires_grad_()
    for ours, theirs in ((api, stock), (api_pool, stock_pool)):
        ys = [f(x, w, b, None, "relu") for f in (ours, theirs)]
        v = randn((3, *ys[0].shape), F64)
        found, expected = (vmap(lambda v, y=y: torch.autograd.grad(y, x, v, retain_graph=True)[0])(v) for y in ys)
        torch.testing.assert_close(found, expected)


def test_export_of_a_model_that_calls_vmap():
    class Ensemble(nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = nn.Parameter(torch.randn(3, 6, 4, 1, 1))

        def forward(self, x):
            return vmap(lambda w: conv1x1(x, w, activation="relu"))(self.weights)

    model, x = Ensemble(), torch.randn(2, 4, 5, 3)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))
    expected = torch.stack([torch.conv2d(x, w).relu() for w in model.weights])
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)


def test_gradients_that_are_not_asked_for_are_not_computed():
    x, w, b, _ = operands()
    x.requires_grad_()
    w.requires_grad_()
    with Calls() as calls:
        (dw,) = torch.autograd.grad(api(x, w, b, None, "relu").square().sum(), w, create_graph=True)
        torch.autograd.grad(dw.square().sum(), w)
    backward = [c for c in calls.seen if "backward" in str(c)]
    assert len(backward) == 2, backward  # the weight's gradient, and of its norm by the forward's output
