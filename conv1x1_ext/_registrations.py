"""What torch must know about the operators: fake tensors and FLOPs; derivatives and vmap from their own files.

Imported for effect. A second import in a process replaces what the first registered.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

from . import _autograd, _layouts, _library, _vmap
from ._eager import ACTIVATIONS, activation_name, decode_config
from ._formulas import DERIVATIVES

_ops = torch.ops.conv1x1_ext
_aten = torch.ops.aten


assert set(DERIVATIVES) == {activation_name(a) for a in ACTIVATIONS}

_kept = _library.registrations()
_autograd.register_all(_kept)
_vmap.register_all(_kept)
_layouts.register_all(_kept)


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


@torch.library.register_fake("conv1x1_ext::conv1x1", lib=_kept)
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


@torch.library.register_fake("conv1x1_ext::conv1x1_backward", lib=_kept)
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


@torch.library.register_fake("conv1x1_ext::conv1x1_avg_pool", lib=_kept)
def _avg_pool_fake(
    input: Tensor, weight: Tensor, bias: Tensor | None, groups: int, activation: str, allow_tf32: bool
) -> Tensor:
    _library.check_fake(input, weight, bias, None, [1], groups, _index(activation))
    batch = input.shape[: input.dim() - weight.dim() + 1]
    return input.new_empty([*batch, 0 if input.shape[len(batch)] == 0 else weight.shape[0]])


@torch.library.register_fake("conv1x1_ext::conv1x1_avg_pool_backward", lib=_kept)
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
@torch.library.register_fake("conv1x1_ext::_fprop", lib=_kept)
def _fprop_fake(input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, config: int) -> Tensor:
    output: Tensor = _conv1x1_fake(input, weight, bias, residual, *decode_config(config, weight))
    return output


@torch.library.register_fake("conv1x1_ext::_fprop_packed", lib=_kept)
def _fprop_packed_fake(
    input: Tensor, weight: Tensor, packed: Tensor, bias: Tensor | None, residual: Tensor | None, config: int
) -> Tensor:
    output: Tensor = _fprop_fake(input, weight, bias, residual, config)
    return output


@torch.library.register_fake("conv1x1_ext::_pack_weight", lib=_kept)
def _pack_weight_fake(input: Tensor, weight: Tensor, config: int) -> Tensor:
    _fprop_fake(input, weight, None, None, config)
    return input.new_empty(0, dtype=torch.uint8)  # nothing to pack: a weight without values


@torch.library.register_fake("conv1x1_ext::_backward", lib=_kept)
def _backward_fake(
    grad_output: Tensor, input: Tensor, weight: Tensor, output: Tensor | None, config: int, wanted: int
) -> tuple[Tensor | None, ...]:
    need = [bool(wanted >> i & 1) for i in range(4)]
    grads: tuple[Tensor | None, ...] = _conv1x1_backward_fake(
        grad_output, input, weight, output, *decode_config(config, weight), *need
    )
    return grads


@torch.library.register_fake("conv1x1_ext::_avg_pool", lib=_kept)
def _avg_pool_private_fake(input: Tensor, weight: Tensor, bias: Tensor | None, config: int) -> Tensor:
    _, *plain = decode_config(config, weight)
    output: Tensor = _avg_pool_fake(input, weight, bias, *plain)
    return output


@torch.library.register_fake("conv1x1_ext::_avg_pool_masked", lib=_kept)
def _avg_pool_masked_fake(
    input: Tensor, weight: Tensor, bias: Tensor | None, config: int
) -> tuple[Tensor, Tensor | None]:
    output = _avg_pool_private_fake(input, weight, bias, config)
    if input.device.type != "cpu" or ACTIVATIONS[config & 7] not in ("relu", "relu6"):
        return output, None
    pooled = output.numel() * math.prod(input.shape[2 - weight.dim() :])
    return output, input.new_empty((pooled + 7) // 8 + 1, dtype=torch.uint8)


@torch.library.register_fake("conv1x1_ext::_avg_pool_backward", lib=_kept)
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


for _name in ("conv1x1", "conv1x1_backward", "conv1x1_avg_pool", "conv1x1_avg_pool_backward"):
    flop_registry.pop(getattr(_ops, _name), None)


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
