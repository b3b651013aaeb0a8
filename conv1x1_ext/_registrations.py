"""What torch must know about the public operators: fake tensors, autograd, vmap, FLOPs. Imported once, for effect."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import _library
from ._eager import ACTIVATIONS, activation_name, decode_config
from ._formulas import DERIVATIVES, MASKED, avg_pool_backward_formula, backward_formula
from ._functorch import call, register

_ops = torch.ops.conv1x1_ext
_aten = torch.ops.aten


assert set(DERIVATIVES) == {activation_name(a) for a in ACTIVATIONS}


# ---- fake tensors -------------------------------------------------------------------------------------------------


def _index(activation: str) -> int:
    """Its place in the kernels' list. An unknown name is the kernels' error."""
    names = [activation_name(a) for a in ACTIVATIONS]
    if activation not in names:
        known = ", ".join(f"'{name}'" for name in names)
        raise RuntimeError(f"conv1x1: activation: expected one of {known}, got '{activation}'")
    return names.index(activation)


def _empty_output(input: Tensor, weight: Tensor, stride: Sequence[int], groups: int) -> Tensor:
    spatial = weight.dim() - 2
    strides = list(stride) * spatial if len(stride) == 1 else list(stride)
    if any(s == 0 for s in input.shape[-spatial:]):  # torch's convolution raises here; ours is empty
        sizes = [0 if s == 0 else (s - 1) // t + 1 for s, t in zip(input.shape[-spatial:], strides, strict=True)]
        channels = 0 if input.shape[-spatial - 1] == 0 else weight.shape[0]
        return input.new_empty([*input.shape[: -spatial - 1], channels, *sizes])
    batched = input if input.dim() == weight.dim() else input.unsqueeze(0)
    if input.device.type == "cuda":
        return _empty_cuda_output(batched, weight, strides, input.dim() == weight.dim())
    zeros, ones = [0] * spatial, [1] * spatial
    if input.dtype in (torch.float16, torch.bfloat16):
        # For half types torch's choice of strides depends on the CPU; ours is always its choice for float32.
        batched, weight = batched.to(torch.float32), weight.to(torch.float32)
    output: Tensor = _aten.convolution.default(batched, weight, None, strides, zeros, ones, False, zeros, groups)
    output = output if input.dim() == weight.dim() else output.squeeze(0)
    return output if output.dtype == input.dtype else input.new_empty_strided(output.shape, output.stride())


def _empty_cuda_output(batched: Tensor, weight: Tensor, strides: Sequence[int], keep_batch: bool) -> Tensor:
    """csrc/strides.cpp's cuda_output_channels_last, which is cuDNN's rule.

    Not by torch's own convolution: on fake tensors that asks the machine's GPU and cuDNN, where there are any.
    """
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    sizes = [(s - 1) // t + 1 for s, t in zip(batched.shape[2:], strides, strict=True)]
    empty = any(guard_or_false(s == 0) for s in batched.shape[:2])
    shape = [batched.shape[0], 0 if guard_or_false(batched.shape[1] == 0) else weight.shape[0], *sizes]
    operands = [weight, batched]
    if weight.dim() == 3:  # torch's convolution sees (N, C, 1, L), after making the input contiguous
        shape.insert(2, 1)
        operands = [t.unsqueeze(2) for t in (operands if batched.is_contiguous() else operands[:1])]
    format = torch.contiguous_format
    if not empty and batched.dtype != torch.float64:
        suggested = [torch._prims_common.suggest_memory_format(t) for t in operands]
        format = next((f for f in suggested if f != torch.contiguous_format), format)
    output = torch.empty(shape, dtype=batched.dtype, device=batched.device, memory_format=format)
    output = output.squeeze(2) if len(strides) == 1 else output
    return output if keep_batch else output.squeeze(0)


def _empty_input_grad(input: Tensor) -> Tensor:
    return torch.empty(
        input.shape,
        dtype=input.dtype,
        device=input.device,
        memory_format=torch._prims_common.suggest_memory_format(input),
    )


def _empty_weight_grad(weight: Tensor) -> Tensor:
    (n_out, n_in), (s_out, s_in) = weight.shape[:2], weight.stride()[:2]
    row_major = (n_in == 1 or s_in == 1) and (n_out == 1 or s_out == n_in)
    column_major = (n_out == 1 or s_out == 1) and (n_in == 1 or s_in == n_out)
    if row_major or column_major:
        return weight.new_empty_strided(weight.shape, weight.stride())
    return weight.new_empty(weight.shape)


@torch.library.register_fake("conv1x1_ext::conv1x1")
def _conv1x1_fake(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    groups: int,
    activation: str,
    allow_tf32: bool,
) -> Tensor:
    _library.check_fake(input, weight, bias, residual, stride, groups, _index(activation))
    return _empty_output(input, weight, stride, groups)


@torch.library.register_fake("conv1x1_ext::conv1x1_backward")
def _conv1x1_backward_fake(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    output: Tensor | None,
    stride: Sequence[int],
    groups: int,
    activation: str,
    allow_tf32: bool,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
    need_residual: bool,
) -> tuple[Tensor | None, ...]:
    index = _index(activation)
    _library.check_fake(input, weight, None, None, stride, groups, index, grad_output=grad_output, output=output)
    return (
        _empty_input_grad(input) if need_input else None,
        _empty_weight_grad(weight) if need_weight else None,
        weight.new_empty(weight.shape[:1]) if need_bias else None,
        _empty_output(input, weight, stride, groups) if need_residual else None,
    )


@torch.library.register_fake("conv1x1_ext::conv1x1_avg_pool")
def _avg_pool_fake(
    input: Tensor, weight: Tensor, bias: Tensor | None, groups: int, activation: str, allow_tf32: bool
) -> Tensor:
    _library.check_fake(input, weight, bias, None, [1], groups, _index(activation))
    batch = input.shape[: input.dim() - weight.dim() + 1]
    return input.new_empty([*batch, 0 if input.shape[len(batch)] == 0 else weight.shape[0]])


@torch.library.register_fake("conv1x1_ext::conv1x1_avg_pool_backward")
def _avg_pool_backward_fake(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    groups: int,
    activation: str,
    allow_tf32: bool,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor | None, ...]:
    index = _index(activation)
    _library.check_fake(input, weight, bias, None, [1], groups, index, grad_output=grad_output, pools=True)
    return (
        _empty_input_grad(input) if need_input else None,
        _empty_weight_grad(weight) if need_weight else None,
        weight.new_empty(weight.shape[:1]) if need_bias else None,
    )


# The private operators meet fake or meta tensors where no mode announces them: a module on the meta device.
@torch.library.register_fake("conv1x1_ext::_fprop")
def _fprop_fake(input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, config: int) -> Tensor:
    output: Tensor = _conv1x1_fake(input, weight, bias, residual, *decode_config(config, weight))
    return output


@torch.library.register_fake("conv1x1_ext::_fprop_packed")
def _fprop_packed_fake(
    input: Tensor, weight: Tensor, packed: Tensor, bias: Tensor | None, residual: Tensor | None, config: int
) -> Tensor:
    output: Tensor = _fprop_fake(input, weight, bias, residual, config)
    return output


@torch.library.register_fake("conv1x1_ext::_backward")
def _backward_fake(
    grad_output: Tensor, input: Tensor, weight: Tensor, output: Tensor | None, config: int, wanted: int
) -> tuple[Tensor | None, ...]:
    need = [bool(wanted >> i & 1) for i in range(4)]
    grads: tuple[Tensor | None, ...] = _conv1x1_backward_fake(
        grad_output, input, weight, output, *decode_config(config, weight), *need
    )
    return grads


@torch.library.register_fake("conv1x1_ext::_avg_pool")
def _avg_pool_private_fake(input: Tensor, weight: Tensor, bias: Tensor | None, config: int) -> Tensor:
    _, *plain = decode_config(config, weight)
    output: Tensor = _avg_pool_fake(input, weight, bias, *plain)
    return output


@torch.library.register_fake("conv1x1_ext::_avg_pool_masked")
def _avg_pool_masked_fake(
    input: Tensor, weight: Tensor, bias: Tensor | None, config: int
) -> tuple[Tensor, Tensor | None]:
    output = _avg_pool_private_fake(input, weight, bias, config)
    if input.device.type != "cpu" or ACTIVATIONS[config & 7] not in ("relu", "relu6"):
        return output, None
    pooled = output.numel() * math.prod(input.shape[2 - weight.dim() :])
    return output, input.new_empty((pooled + 7) // 8 + 1, dtype=torch.uint8)


@torch.library.register_fake("conv1x1_ext::_avg_pool_backward")
def _avg_pool_backward_private_fake(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    config: int,
    wanted: int,
) -> tuple[Tensor | None, ...]:
    _, *plain = decode_config(config, weight)
    need = [bool(wanted >> i & 1) for i in range(3)]
    grads: tuple[Tensor | None, ...] = _avg_pool_backward_fake(grad_output, input, weight, bias, *plain, *need)
    return grads


# ---- autograd -----------------------------------------------------------------------------------------------------


def _conv1x1_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, bias, residual, *ctx.plain = inputs
    activation = ctx.plain[2]
    from_output = activation == "none" or activation in MASKED
    # The functional never lets SiLU and its like get here with a gradient; a direct call recomputes z.
    extra = (output if activation in MASKED else None,) if from_output else (bias, residual)
    ctx.save_for_backward(input, weight, *extra)


def _conv1x1_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, weight, *extra = ctx.saved_tensors
    stride, groups, activation, allow_tf32 = ctx.plain
    output = None
    if len(extra) == 2:
        z = call(_ops.conv1x1.default, input, weight, *extra, stride, groups, "none", allow_tf32)
        grad, activation = DERIVATIVES[activation](grad, z), "none"
    else:
        (output,) = extra
    need = tuple(ctx.needs_input_grad[:4])
    grads = backward_formula(grad, input, weight, output, stride, groups, activation, allow_tf32, need)
    return *grads, None, None, None, None


def _backward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
    grad_output, input, weight, y, *ctx.plain = inputs
    ctx.save_for_backward(grad_output, input, weight, y)


def _backward_autograd(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """Second derivatives. The mask is a constant almost everywhere, so the backward is linear in dz = dy * mask."""
    ddx, ddw, ddbias, ddz = grads
    grad_output, input, weight, output = ctx.saved_tensors
    stride, groups, activation, allow_tf32 = ctx.plain[:4]
    need_grad, need_input, need_weight = ctx.needs_input_grad[:3]

    def conv(x: Tensor, w: Tensor) -> Tensor:
        result: Tensor = call(_ops.conv1x1.default, x, w, None, None, stride, groups, "none", allow_tf32)
        return result

    def gradient(x: Tensor, w: Tensor, which: int) -> Tensor:
        wanted = [which == i for i in range(4)]
        grads = call(
            _ops.conv1x1_backward.default, grad_output, x, w, output, stride, groups, activation, allow_tf32, *wanted
        )
        result: Tensor = grads[which]
        return result

    d_grad = None
    if need_grad:
        terms = [] if ddz is None else [ddz]
        terms += [] if ddx is None else [conv(ddx, weight)]
        terms += [] if ddw is None else [conv(input, ddw)]
        terms += [] if ddbias is None else [ddbias.reshape([-1] + [1] * (weight.dim() - 2)).expand_as(grad_output)]
        d_grad = sum(terms[1:], start=terms[0]) if terms else torch.zeros_like(grad_output)
        d_grad = d_grad if output is None else DERIVATIVES[activation](d_grad, output)
    d_input = gradient(input, ddw, 0) if need_input and ddw is not None else None
    d_weight = gradient(ddx, weight, 1) if need_weight and ddx is not None else None
    return d_grad, d_input, d_weight, None, *([None] * 8)


def _avg_pool_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, bias, *ctx.plain = inputs
    ctx.save_for_backward(input, weight, bias)


def _avg_pool_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, weight, bias = ctx.saved_tensors
    groups, activation, allow_tf32 = ctx.plain
    need = ctx.needs_input_grad[:3]
    grads = avg_pool_backward_formula(grad, input, weight, bias, groups, activation, allow_tf32, need)
    return *grads, None, None, None


def _not_differentiable(ctx: Any, *grads: Any) -> None:
    raise RuntimeError(
        "conv1x1_avg_pool_backward: not differentiable itself; differentiate conv1x1_avg_pool with create_graph=True"
    )


# ---- vmap ---------------------------------------------------------------------------------------------------------


def _per_example(op: Any, info: Any, in_dims: tuple[Any, ...], args: tuple[Any, ...]) -> tuple[Any, Any]:
    """One call per example: right for any mixture of batched arguments."""
    results = []
    for i in range(info.batch_size):
        example = [a.select(d, i) if isinstance(d, int) else a for a, d in zip(args, in_dims, strict=True)]
        results.append(call(op, *example))
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    stacked = tuple(None if r[0] is None else torch.stack(r) for r in zip(*results, strict=True))
    return stacked, tuple(None if s is None else 0 for s in stacked)


def _fold_batch(op: Any, info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    """A batched input (and residual) with one weight: the vmapped dimension joins the images' in a single call."""
    input, weight = args[:2]
    unbatched = in_dims[0] is not None and input.dim() - 1 == weight.dim() - 1
    residual_dim = in_dims[3] if op is _ops.conv1x1.default else None
    residual = args[3] if op is _ops.conv1x1.default else None
    shared = in_dims[1] is None and in_dims[2] is None and (residual is None or residual_dim is not None)
    if in_dims[0] is None or not shared:  # weights of their own
        return _per_example(op, info, in_dims, args)

    def fold(t: Tensor, dim: Any) -> Tensor:
        t = t.movedim(dim, 0)
        return t if unbatched else t.flatten(0, 1)

    rest = list(args[2:])
    if residual is not None:
        rest[1] = fold(residual, residual_dim)
    output = call(op, fold(input, in_dims[0]), weight, *rest)
    return (output if unbatched else output.unflatten(0, (info.batch_size, -1))), 0


def _no_setup(ctx: Any, inputs: Any, output: Any) -> None:
    pass


def _register(name: str, setup: Callable[..., None], backward: Callable[..., Any], fold: bool) -> None:
    op = getattr(_ops, name).default

    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        return _fold_batch(op, info, in_dims, *args) if fold else _per_example(op, info, in_dims, args)

    torch.library.register_autograd(f"conv1x1_ext::{name}", backward, setup_context=setup)
    torch.library.register_vmap(f"conv1x1_ext::{name}", vmap)
    register(op, setup, backward, vmap)


_register("conv1x1", _conv1x1_setup, _conv1x1_autograd, fold=True)
_register("conv1x1_backward", _backward_setup, _backward_autograd, fold=False)
_register("conv1x1_avg_pool", _avg_pool_setup, _avg_pool_autograd, fold=True)
_register("conv1x1_avg_pool_backward", _no_setup, _not_differentiable, fold=False)


# ---- FLOPs: two a multiply-add, as torch counts a convolution -------------------------------------------------------


def _flops(input_shape: Sequence[int], weight_shape: Sequence[int], stride: Sequence[int]) -> int:
    spatial = len(weight_shape) - 2
    strides = list(stride) * spatial if len(stride) == 1 else stride
    flops = 2 * weight_shape[0] * weight_shape[1]
    for s in input_shape[: len(input_shape) - spatial - 1]:
        flops *= s
    for s, t in zip(input_shape[len(input_shape) - spatial :], strides, strict=True):
        flops *= 0 if s == 0 else (s - 1) // t + 1
    return flops


@register_flop_formula(_ops.conv1x1)
def _conv1x1_flops(input: Any, weight: Any, bias: Any, residual: Any, stride: Any, *args: Any, **kwargs: Any) -> int:
    return _flops(input, weight, stride)


@register_flop_formula(_ops.conv1x1_backward)
def _backward_flops(
    grad_output: Any, input: Any, weight: Any, output: Any, stride: Any, groups: Any, activation: Any, allow_tf32: Any,
    need_input: bool, need_weight: bool, *args: Any, **kwargs: Any,
) -> int:  # fmt: skip
    return _flops(input, weight, stride) * (need_input + need_weight)


@register_flop_formula(_ops.conv1x1_avg_pool)
def _avg_pool_flops(input: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    return _flops(input, weight, [1])


@register_flop_formula(_ops.conv1x1_avg_pool_backward)
def _avg_pool_backward_flops(grad_output: Any, input: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    need_input, need_weight = args[4:6]
    return _flops(input, weight, [1]) * (1 + int(need_input) + int(need_weight))  # the pre-activation is recomputed
