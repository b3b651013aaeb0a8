"""Derivatives of the public operators: kernels for the Autograd key, in reverse and forward mode.

torch's own function is made one level at a time, as for its built-in operators, so it also works below torch.func's
transforms, eager or traced. ``torch.library.register_autograd`` makes one that torch.func refuses and that forward mode
passes by: its tangents would be zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ._formulas import DERIVATIVES, MASKED, avg_pool_backward_formula, backward_formula, needed

_ops = torch.ops.conv1x1_ext


def _unpack(t: Tensor) -> tuple[Tensor, Tensor | None]:
    """Primal and tangent. torch has one level of forward mode; torch.func nests by wrapping tensors."""
    primal, tangent = torch._VF._unpack_dual(t, level=0)  # type: ignore[attr-defined]
    return primal, tangent


def _is_dual(t: Any) -> bool:
    return isinstance(t, Tensor) and not t.is_inference() and _unpack(t)[1] is not None


def register(
    library: Any, name: str, setup: Callable[..., None], backward: Callable[..., Any], jvp: Callable[..., Any]
) -> None:
    """Gives the public operator ``name`` its derivatives.

    Args:
        library: the ``torch.library.Library`` that keeps them.
        setup: ``setup(ctx, inputs, output)`` saves what ``backward`` reads.
        backward: ``backward(ctx, *grads)`` to a gradient for each input.
        jvp: ``jvp(inputs, output, tangents)`` to the output's tangent, or a tuple of them.
    """
    op = getattr(_ops, name).default

    def below(keyset: Any, inputs: tuple[Any, ...]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)

    class Derivatives(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            inputs, (keyset, reverse, forward, dual) = args[:-1], args[-1]
            # Function turns both modes off for its forward; the transforms outside of this one have to find them as
            # they were.
            with torch.set_grad_enabled(reverse), forward_ad._set_fwd_grad_enabled(forward):
                output = below(keyset, inputs)
            setup(ctx, inputs, output)
            if dual:
                ctx.dual = inputs, output, reverse
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return *backward(ctx, *grads), None

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            # The rule is written in primals: what it calls would otherwise see this level's tangents again.
            inputs, output, reverse = ctx.dual
            del ctx.dual
            inputs = [_unpack(t)[0] if isinstance(t, Tensor) else t for t in inputs]
            with torch.set_grad_enabled(reverse), forward_ad._set_fwd_grad_enabled(True):
                return jvp(inputs, output, tangents[:-1])

    Derivatives.__name__ = Derivatives.__qualname__ = f"{name}_derivatives"
    # Function.apply would look for torch.func's transforms, which the dispatcher has dealt with already.
    apply = super(torch.autograd.Function, Derivatives).apply  # type: ignore[misc]
    functorch = torch._C._functorch

    def kernel(keyset: Any, *inputs: Any) -> Any:
        reverse, forward = torch.is_grad_enabled(), torch._C._is_fwd_grad_enabled()
        dual = forward and any(map(_is_dual, inputs))
        if not dual and not (reverse and torch._C._any_requires_grad(*inputs)):
            return below(keyset, inputs)
        allowed = functorch.get_single_level_autograd_function_allowed()
        functorch.set_single_level_autograd_function_allowed(True)
        try:
            return apply(*inputs, (keyset, reverse, forward, dual))
        finally:
            functorch.set_single_level_autograd_function_allowed(allowed)

    library.impl(name, kernel, "Autograd", with_keyset=True)


def _sum(terms: list[Any]) -> Any:
    terms = [t for t in terms if t is not None]
    return sum(terms[1:], start=terms[0]) if terms else None


# ---- conv1x1 ------------------------------------------------------------------------------------------------------


def _conv1x1_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, bias, residual, *ctx.plain = inputs
    activation = ctx.plain[2]
    from_output = activation == "none" or activation in MASKED
    # The functional never lets SiLU and its like get here with a gradient; a direct call recomputes z.
    extra = (output if activation in MASKED else None,) if from_output else (bias, residual)
    ctx.save_for_backward(input, weight, *extra)


def _conv1x1_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, weight, *extra = ctx.saved_tensors
    stride, groups, activation, allow_tf32 = ctx.plain
    output = None
    if len(extra) == 2:
        z = _ops.conv1x1.default(input, weight, *extra, stride, groups, "none", allow_tf32)
        grad, activation = DERIVATIVES[activation](grad, z), "none"
    else:
        (output,) = extra
    need = needed(ctx, 4)
    grads = backward_formula(grad, input, weight, output, stride, groups, activation, allow_tf32, need)
    return *grads, None, None, None, None


def _conv1x1_jvp(inputs: list[Any], output: Tensor, tangents: tuple[Any, ...]) -> Tensor:
    input, weight, bias, residual, stride, groups, activation, allow_tf32 = inputs
    d_input, d_weight, d_bias, d_residual = tangents[:4]
    dz = _linear(input, weight, d_input, d_weight, d_bias, d_residual, output, stride, groups, allow_tf32)
    if activation == "none":
        return dz
    z = output
    if activation not in MASKED:
        z = _ops.conv1x1.default(input, weight, bias, residual, stride, groups, "none", allow_tf32)
    return DERIVATIVES[activation](dz, z)


def _linear(
    input: Tensor,
    weight: Tensor,
    d_input: Tensor | None,
    d_weight: Tensor | None,
    d_bias: Tensor | None,
    d_residual: Tensor | None,
    like: Tensor,
    stride: Any,
    groups: int,
    allow_tf32: bool,
) -> Tensor:
    """conv(d_input, weight) + conv(input, d_weight) + d_bias + d_residual, of what is not None; else zeros."""
    total, rest = d_residual, (stride, groups, "none", allow_tf32)
    if d_input is not None:
        total, d_bias = _ops.conv1x1.default(d_input, weight, d_bias, total, *rest), None
    if d_weight is not None:
        total, d_bias = _ops.conv1x1.default(input, d_weight, d_bias, total, *rest), None
    if d_bias is not None:
        row = d_bias.reshape([-1] + [1] * (weight.dim() - 2))
        total = row.expand_as(like) if total is None else total + row
    return torch.zeros_like(like) if total is None else total


# ---- conv1x1_backward: linear in dz = dy under the mask, which is a constant almost everywhere ----------------------


def _backward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
    grad_output, input, weight, y, *ctx.plain = inputs
    ctx.save_for_backward(grad_output, input, weight, y)


def _backward_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    ddx, ddw, ddbias, ddz = grads
    grad_output, input, weight, output = ctx.saved_tensors
    stride, groups, activation, allow_tf32 = ctx.plain[:4]
    need_grad, need_input, need_weight = needed(ctx, 3)

    def gradient(x: Tensor, w: Tensor, which: int) -> Tensor:
        wanted = [which == i for i in range(4)]
        grads = _ops.conv1x1_backward.default(
            grad_output, x, w, output, stride, groups, activation, allow_tf32, *wanted
        )
        result: Tensor = grads[which]
        return result

    d_grad = None
    if need_grad:
        d_grad = _linear(input, weight, ddx, ddw, ddbias, ddz, grad_output, stride, groups, allow_tf32)
        d_grad = d_grad if output is None else DERIVATIVES[activation](d_grad, output)
    d_input = gradient(input, ddw, 0) if need_input and ddw is not None else None
    d_weight = gradient(ddx, weight, 1) if need_weight and ddx is not None else None
    return d_grad, d_input, d_weight, None, *([None] * 8)


def _backward_jvp(inputs: list[Any], output: Any, tangents: tuple[Any, ...]) -> tuple[Tensor | None, ...]:
    grad, input, weight, y, *plain = inputs
    d_grad, d_input, d_weight = tangents[:3]
    need_input, need_weight = plain[4:6]

    def gradients(g: Tensor, x: Tensor, w: Tensor, *wanted: bool) -> Any:
        return _ops.conv1x1_backward.default(g, x, w, y, *plain[:4], *wanted)

    nothing = (None,) * 4
    by_grad = nothing if d_grad is None else gradients(d_grad, input, weight, *plain[4:])
    by_weight = by_input = nothing
    if need_input and d_weight is not None:
        by_weight = gradients(grad, input, d_weight, True, False, False, False)
    if need_weight and d_input is not None:
        by_input = gradients(grad, d_input, weight, False, True, False, False)
    parts = zip(by_grad, by_weight, by_input, strict=True)
    sums = [_sum(list(p)) for p in parts]
    return tuple(
        None if o is None else torch.zeros_like(o) if s is None else s for s, o in zip(sums, output, strict=True)
    )


# ---- conv1x1_avg_pool ---------------------------------------------------------------------------------------------


def _avg_pool_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, bias, *ctx.plain = inputs
    ctx.save_for_backward(input, weight, bias)


def _avg_pool_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, weight, bias = ctx.saved_tensors
    groups, activation, allow_tf32 = ctx.plain
    grads = avg_pool_backward_formula(grad, input, weight, bias, groups, activation, allow_tf32, needed(ctx, 3))
    return *grads, None, None, None


def _avg_pool_jvp(inputs: list[Any], output: Tensor, tangents: tuple[Any, ...]) -> Tensor:
    input, weight, bias, groups, activation, allow_tf32 = inputs
    z = _ops.conv1x1.default(input, weight, bias, None, [1], groups, "none", allow_tf32)
    d_input, d_weight, d_bias = tangents[:3]
    dz = _linear(input, weight, d_input, d_weight, d_bias, None, z, [1], groups, allow_tf32)
    return DERIVATIVES[activation](dz, z).mean(tuple(range(2 - weight.dim(), 0)))


def _not_differentiable(*args: Any) -> Any:
    raise RuntimeError(
        "conv1x1_avg_pool_backward: not differentiable itself; differentiate conv1x1_avg_pool with create_graph=True"
    )


def _no_setup(ctx: Any, inputs: Any, output: Any) -> None:
    pass


def register_all(library: Any) -> None:
    register(library, "conv1x1", _conv1x1_setup, _conv1x1_backward, _conv1x1_jvp)
    register(library, "conv1x1_backward", _backward_setup, _backward_backward, _backward_jvp)
    register(library, "conv1x1_avg_pool", _avg_pool_setup, _avg_pool_backward, _avg_pool_jvp)
    register(library, "conv1x1_avg_pool_backward", _no_setup, _not_differentiable, _not_differentiable)
