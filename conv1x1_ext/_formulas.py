"""Gradients by the public, differentiable operators: for create_graph, transforms, and every traced graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_ops = torch.ops.conv1x1_ext
_aten = torch.ops.aten

# Their derivative is a function of the saved output; the others need the pre-activation.
MASKED = ("relu", "relu6")


def _silu_derivative(grad: Tensor, z: Tensor) -> Tensor:
    s = torch.sigmoid(z)
    return grad * (s * (1 + z * (1 - s)))


# activation'(z) * grad by torch's own, differentiable functions.
DERIVATIVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "none": lambda grad, z: grad,
    "relu": lambda grad, z: _aten.threshold_backward(grad, z, 0),
    "relu6": lambda grad, z: _aten.hardtanh_backward(grad, z, 0.0, 6.0),
    "silu": lambda grad, z: _silu_derivative(grad, z),  # silu_backward has no derivative of its own
    "hardswish": lambda grad, z: _aten.hardswish_backward(grad, z),
    "gelu": lambda grad, z: _aten.gelu_backward(grad, z),
}


def needed(ctx: Any, count: int) -> tuple[bool, ...]:
    """``ctx.needs_input_grad`` of the first ``count`` inputs, less what this run of the backward leaves out.

    ``torch.autograd.grad(y, weight)`` does not want the input's gradient, whether or not the input requires one.
    torch's own functions know that; a Python function must ask the engine about the node behind each input.
    """
    need = list(ctx.needs_input_grad[:count])
    if torch.compiler.is_compiling():
        return tuple(need)
    behind = (node for node, _ in ctx.next_functions if node is not None)
    for i, node in zip([i for i, n in enumerate(need) if n], behind, strict=False):
        # It raises for a leaf of which torch.autograd.grad was asked, and where no engine is running.
        with suppress(RuntimeError):
            need[i] = torch._C._will_engine_execute_node(node)
    return tuple(need)


def backward_formula(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    output: Tensor | None,
    stride: Sequence[int],
    groups: int,
    activation: str,
    allow_tf32: bool,
    need: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of input, weight, bias and residual by the public, differentiable backward operator."""
    need_input, need_weight, need_bias, need_residual = need
    masked = activation in MASKED
    dx, dw, dbias, dz = _ops.conv1x1_backward.default(
        grad, input, weight, output if masked else None, stride, groups, activation,
        allow_tf32, need_input, need_weight, need_bias, need_residual and masked,
    )  # fmt: skip
    return dx, dw, dbias, (dz if masked else grad) if need_residual else None


def avg_pool_backward_formula(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    groups: int,
    activation: str,
    allow_tf32: bool,
    need: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of input, weight and bias, differentiable themselves where grad mode is on."""
    if not torch.is_grad_enabled() and forward_ad._current_level < 0:
        grads: tuple[Tensor | None, ...] = _ops.conv1x1_avg_pool_backward.default(
            grad, input, weight, bias, groups, activation, allow_tf32, *need
        )
        return grads
    # create_graph: by differentiable operators, which do hold the pre-activation
    z = _ops.conv1x1.default(input, weight, bias, None, [1], groups, "none", allow_tf32)
    spatial = weight.dim() - 2
    pixels = max(z.shape[-spatial:].numel(), 1)
    dz = DERIVATIVES[activation](grad.reshape([*grad.shape] + [1] * spatial).expand_as(z) / pixels, z)
    return backward_formula(dz, input, weight, None, [1], groups, "none", allow_tf32, (*need, False))[:3]
