"""The eager fast path: plain calls, with and without gradients, by the private operators. Small calls are won here.

The vocabulary of all routes is here too: activations, the private operators' config, TF32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from ._arguments import integer, stride_tuple
from ._formulas import MASKED, avg_pool_backward_formula, backward_formula, needed

_ops = torch.ops.conv1x1_ext


def direct(op: Any) -> Any:
    """What OpOverload.__call__ forwards to, and does nothing else: a Python call less, 0.25 us. Dynamo needs the op."""
    return getattr(op, "_op", op)


_fprop = direct(_ops._fprop.default)
_backward = direct(_ops._backward.default)
_avg_pool = direct(_ops._avg_pool.default)
_avg_pool_masked = direct(_ops._avg_pool_masked.default)
_avg_pool_backward = direct(_ops._avg_pool_backward.default)

# Asked at every call, so looked up once.
compiling = torch.compiler.is_compiling
dynamo_compiling = torch.compiler.is_dynamo_compiling  # cheaper; what else compiles has a dispatch mode
autocasting = torch._C._is_any_autocast_enabled
_grad_enabled = torch.is_grad_enabled
_dispatch_modes = torch._C._len_torch_dispatch_stack
function_modes = torch._C._len_torch_function_stack
_functorch_active = torch._C._are_functorch_transforms_active
_tracing_state = torch._C._get_tracing_state
_unwrap_if_dead = torch._C._functorch.unwrap_if_dead

# The order is csrc/problem.h's.
ACTIVATIONS: tuple[str | None, ...] = (None, "relu", "relu6", "silu", "hardswish", "gelu")

_forward_functions: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "gelu": F.gelu,
}
PLAIN = (Tensor, torch.nn.Parameter)
_MAX_STRIDE, _MAX_GROUPS = 1 << 10, 1 << 28
TF32 = 1 << 3  # in the private operators' config


def apply_activation(x: Tensor, activation: str | None) -> Tensor:
    """torch's own activation function by our name for it."""
    return _forward_functions[activation](x)


def activation_name(activation: str | None) -> str:
    """The name that the operators' schemas use; checks it.

    Raises:
        ValueError: for an unknown name.
    """
    if not isinstance(activation, str | None) or activation not in ACTIVATIONS:
        known = ", ".join(map(repr, ACTIVATIONS))
        raise ValueError(f"conv1x1: activation: expected one of {known}, got {activation!r}")
    return "none" if activation is None else activation


@lru_cache(maxsize=4096)
def make_config(activation: str | None, stride: int | tuple[int, ...], groups: int, spatial: int) -> int:
    """The private operators' one integer (csrc/tensor_checks.h), or 0 where the arguments do not fit into it.

    Its cache takes True and np.int64(1) for 1, so callers pass what ``integer`` and ``stride_tuple`` return.
    """
    index = ACTIVATIONS.index(activation if activation is None else activation_name(activation))
    strides = (stride,) * spatial if isinstance(stride, int) else stride if len(stride) == spatial else stride * spatial
    fits = all(type(s) is int and 0 < s < _MAX_STRIDE for s in strides) and type(groups) is int
    if not fits or not 0 < groups < _MAX_GROUPS or not 0 < spatial <= 3 or len(strides) != spatial:
        return 0
    config = groups << 34 | index
    for d, s in enumerate((1,) * (3 - spatial) + strides):
        config |= s << (4 + 10 * d)
    return config


def decode_config(config: int, weight: Tensor) -> tuple[list[int], int, str, bool]:
    """Stride, groups, activation and allow_tf32 of a config."""
    stride = [config >> (4 + 10 * d) & 1023 for d in range(max(5 - weight.dim(), 0), 3)]
    return stride or [1], config >> 34, activation_name(ACTIVATIONS[config & 7]), bool(config & TF32)


def transformed() -> bool:
    """Is anything between us and the kernels that must see a public operator?"""
    return (
        _dispatch_modes() > 0 or _functorch_active() or _tracing_state() is not None or forward_ad._current_level >= 0
    )


def needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def conv_uses_tf32() -> bool:
    """torch's own question for its convolutions, Context::allowTF32CuDNN(Float32Op::CONV).

    The getter sees the older setting (torch.backends.cudnn.allow_tf32) and the newer ones (fp32_precision of conv, of
    cuDNN and of torch, inherited in that order), in any mixture; the older property raises once the newer are in use.
    Dynamo cannot trace it and has no guard for it: a compiled or exported graph keeps the answer of its trace.
    """
    return bool(torch._C._get_fp32_precision_getter("cuda", "conv") == "tf32")


# What torch.compiler.assume_constant_result does, after importing all of Dynamo and Inductor: seconds.
conv_uses_tf32._dynamo_marked_constant = True  # type: ignore[attr-defined]


def allow_tf32(input: Tensor) -> bool:
    # Only float32 CUDA kernels ask; TF32 is used exactly when torch's own convolutions would use it.
    return input.is_cuda and input.dtype == torch.float32 and conv_uses_tf32()


class _Conv1x1(torch.autograd.Function):
    """Saves input, weight and, where it is a mask, the output."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, config: int
    ) -> Tensor:
        output: Tensor = _fprop(input, weight, bias, residual, config)
        ctx.config = config
        ctx.save_for_backward(input, weight, output if config & 7 else None)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        input, weight, output = ctx.saved_tensors
        need_input, need_weight, need_bias, need_residual, _ = ctx.needs_input_grad
        config = _config_now(ctx, input)
        # create_graph: the gradients must be differentiable themselves; forward mode: they have tangents
        if _grad_enabled() or forward_ad._current_level >= 0:
            stride, groups, name, tf32 = decode_config(config, weight)
            need = needed(ctx, 4)
            return *backward_formula(grad, input, weight, output, stride, groups, name, tf32, need), None
        masked_residual = need_residual and output is not None
        wanted = need_input | need_weight << 1 | need_bias << 2 | masked_residual << 3
        run = _ops._backward.default if compiling() else _backward
        dx, dw, dbias, dz = run(grad, input, weight, output, config, wanted)
        return dx, dw, dbias, dz if masked_residual else grad if need_residual else None, None


class _AvgPool(torch.autograd.Function):
    """Saves input, weight, bias and, on the CPU with ReLU or ReLU6, a bit for each output that was pooled; without
    it the backward recomputes the pre-activation."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, config: int) -> Tensor:  # type: ignore[override]
        output: Tensor
        output, mask = _avg_pool_masked(input, weight, bias, config)
        ctx.config = config
        ctx.save_for_backward(input, weight, bias, mask)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        input, weight, bias, mask = ctx.saved_tensors
        need_input, need_weight, need_bias, _ = ctx.needs_input_grad
        config = _config_now(ctx, input)
        if _grad_enabled() or transformed():
            _, groups, name, tf32 = decode_config(config, weight)
            need = needed(ctx, 3)
            return *avg_pool_backward_formula(grad, input, weight, bias, groups, name, tf32, need), None
        run = _ops._avg_pool_backward.default if compiling() else _avg_pool_backward
        wanted = need_input | need_weight << 1 | need_bias << 2
        return *run(grad, input, weight, bias, mask, config, wanted), None


def _config_now(ctx: Any, input: Tensor) -> int:
    """The forward's, but TF32 as torch's backward has it: what is set now, not what was set in the forward."""
    config: int = ctx.config
    return config & ~TF32 | allow_tf32(input) * TF32 if input.is_cuda else config


# Function.apply does three things more: it binds default arguments, looks for transforms, of which there are none here,
# and unwraps tensors that outlived a torch.func transform, which the callers do.
_apply_conv1x1 = super(torch.autograd.Function, _Conv1x1).apply  # type: ignore[misc]
_apply_avg_pool = super(torch.autograd.Function, _AvgPool).apply  # type: ignore[misc]


def config_of(activation: Any, stride: Any, groups: Any, weight: Tensor) -> int:
    """make_config's, or 0 also where an argument is wrong: the general route then says what."""
    try:
        if type(stride) is type(groups) is int:
            return make_config(activation, stride, groups, weight.dim() - 2)
        return make_config(activation, stride_tuple(stride), integer("groups", groups), weight.dim() - 2)
    except (TypeError, ValueError):
        return 0


def plain_conv1x1(input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, config: int) -> Tensor:
    """The convolution, where nothing stands between us and the kernels: a plain weight, ``unobstructed``."""
    if input.is_cuda:
        config |= allow_tf32(input) * TF32
    if not _grad_enabled() or not (
        input.requires_grad
        or weight.requires_grad
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    ):
        output: Tensor = _fprop(input, weight, bias, residual, config)
        return output
    activation = ACTIVATIONS[config & 7]
    # The pre-activation is what other derivatives need, so it is what gets saved, by torch's own function.
    fused = activation is None or activation in MASKED
    output = _apply_conv1x1(
        _unwrap_if_dead(input),
        _unwrap_if_dead(weight),
        None if bias is None else _unwrap_if_dead(bias),
        None if residual is None else _unwrap_if_dead(residual),
        config if fused else config & ~7,
    )
    return output if fused else apply_activation(output, activation)


def fast_avg_pool(input: Tensor, weight: Tensor, bias: Tensor | None, config: int) -> Tensor | None:
    """conv1x1_avg_pool, with a plain weight, where nothing else stands between us and the kernels; else None."""
    if not unobstructed(input, bias, None):
        return None
    if input.is_cuda:
        config |= allow_tf32(input) * TF32
    if not _grad_enabled() or not needs_grad(input, weight, bias):
        output: Tensor = _avg_pool(input, weight, bias, config)
        return output
    unwrapped = None if bias is None else _unwrap_if_dead(bias)
    output = _apply_avg_pool(_unwrap_if_dead(input), _unwrap_if_dead(weight), unwrapped, config)
    return output


def unobstructed(input: Tensor, bias: Tensor | None, residual: Tensor | None) -> bool:
    """Does nothing but the weight, which the caller has asked about, stand between us and the kernels?"""
    return (
        type(input) in PLAIN
        and (bias is None or type(bias) in PLAIN)
        and (residual is None or type(residual) in PLAIN)
        and not autocasting()
        # transformed(), written out: a call costs what two of these tests cost
        and not _dispatch_modes()
        and not _functorch_active()
        and _tracing_state() is None
        and forward_ad._current_level < 0
    )
