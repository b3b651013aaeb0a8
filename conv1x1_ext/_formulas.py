"""Gradients by the public, differentiable operators: for create_graph, transforms, and every traced graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ._functorch import call

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


def backward_formula(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    output: Tensor | None,
    stride: Sequence[int],
    groups: int,
    activation: str,
    allow_tf32: bool,
    need: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of input, weight, bias and residual by the public, differentiable backward operator."""
    need_input, need_weight, need_bias, need_residual = need
    masked = activation in MASKED
    dx, dw, dbias, dz = call(
        _ops.conv1x1_backward.default, grad, input, weight, output if masked else None, stride, groups, activation,
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
    need: tuple[bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of input, weight and bias, differentiable themselves where grad mode is on."""
    if not torch.is_grad_enabled():
        grads: tuple[Tensor | None, ...] = call(
            _ops.conv1x1_avg_pool_backward.default, grad, input, weight, bias, groups, activation, allow_tf32, *need
        )
        return grads
    # create_graph: by differentiable operators, which do hold the pre-activation
    z = call(_ops.conv1x1.default, input, weight, bias, None, [1], groups, "none", allow_tf32)
    spatial = weight.dim() - 2
    pixels = max(z.shape[-spatial:].numel(), 1)
    dz = DERIVATIVES[activation](grad.reshape([*grad.shape] + [1] * spatial).expand_as(z) / pixels, z)
    return backward_formula(dz, input, weight, None, [1], groups, "none", allow_tf32, (*need, False))[:3]
