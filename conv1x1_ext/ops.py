"""The functional API, and how a call finds its way to a kernel.

Plain eager calls go to a private operator, or through a module-level ``torch.autograd.Function`` where a gradient is
needed: small calls are won here. Everything else (compile, export, functorch transforms, dispatch modes, tensor
subclasses) goes to the public operators, whose rules are in ``_registrations.py``. Both share one backward formula.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import _library
from ._functorch import call

_ops = torch.ops.conv1x1_ext
_fprop = _ops._fprop.default
_backward = _ops._backward.default

# The order is csrc/problem.h's.
ACTIVATIONS: tuple[str | None, ...] = (None, "relu", "relu6", "silu", "hardswish", "gelu")
# Their derivative is a function of the saved output; the others need the pre-activation.
MASKED = ("relu", "relu6")

_forward_functions: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "gelu": F.gelu,
}
_PLAIN = (Tensor, torch.nn.Parameter)
_MAX_STRIDE, _MAX_GROUPS = 1 << 10, 1 << 28
_TF32 = 1 << 3  # in the private operators' config


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
def _config(activation: str | None, stride: int | tuple[int, ...], groups: int, spatial: int) -> int:
    """The private operators' one integer (csrc/tensor_checks.h), or 0 where the arguments do not fit into it."""
    index = ACTIVATIONS.index(activation if activation is None else activation_name(activation))
    strides = (stride,) * spatial if isinstance(stride, int) else stride if len(stride) == spatial else stride * spatial
    fits = all(type(s) is int and 0 < s < _MAX_STRIDE for s in strides) and type(groups) is int
    if not fits or not 0 < groups < _MAX_GROUPS or not 0 < spatial <= 3 or len(strides) != spatial:
        return 0
    config = groups << 34 | index
    for d, s in enumerate((1,) * (3 - spatial) + strides):
        config |= s << (4 + 10 * d)
    return config


def _stride_tuple(stride: Any) -> tuple[int, ...]:
    """One stride, or one per spatial dimension.

    Raises:
        TypeError: for anything else than integers.
    """
    strides = (stride,) if isinstance(stride, int | torch.SymInt) else stride
    if not isinstance(strides, Sequence) or not all(isinstance(s, int | torch.SymInt) for s in strides):
        raise TypeError(f"conv1x1: stride: expected an integer or a sequence of integers, got {stride!r}")
    return tuple(strides)


def _transformed() -> bool:
    """Is anything between us and the kernels that must see a public operator?"""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    )


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


@torch.compiler.assume_constant_result
def _conv_uses_tf32() -> bool:
    """torch's own question for its convolutions, Context::allowTF32CuDNN(Float32Op::CONV).

    The getter sees the older setting (torch.backends.cudnn.allow_tf32) and the newer ones (fp32_precision of conv, of
    cuDNN and of torch, inherited in that order), in any mixture; the older property raises once the newer are in use.
    Dynamo cannot trace it and has no guard for it: a compiled or exported graph keeps the answer of its trace.
    """
    return bool(torch._C._get_fp32_precision_getter("cuda", "conv") == "tf32")


def _allow_tf32(input: Tensor) -> bool:
    # Only float32 CUDA kernels ask; TF32 is used exactly when torch's own convolutions would use it.
    return input.is_cuda and input.dtype == torch.float32 and _conv_uses_tf32()


class _Conv1x1(torch.autograd.Function):
    """The eager fast path with gradients. Saves input, weight and, where it is a mask, the output."""

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
        config = ctx.config
        if input.is_cuda:  # as torch's: what is set now, not what was set in the forward
            config = config & ~_TF32 | _allow_tf32(input) * _TF32
        if torch.is_grad_enabled():  # create_graph: the gradients must be differentiable themselves
            spatial = weight.dim() - 2
            stride = [config >> (4 + 10 * d) & 1023 for d in range(3 - spatial, 3)]
            name = activation_name(ACTIVATIONS[config & 7])
            return *backward_formula(
                grad, input, weight, output, stride, config >> 34, name, bool(config & _TF32),
                (need_input, need_weight, need_bias, need_residual),
            ), None  # fmt: skip
        masked_residual = need_residual and output is not None
        wanted = need_input | need_weight << 1 | need_bias << 2 | masked_residual << 3
        dx, dw, dbias, dz = _backward(grad, input, weight, output, config, wanted)
        return dx, dw, dbias, dz if masked_residual else grad if need_residual else None, None


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


def conv1x1(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    *,
    groups: int = 1,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    r"""Fused 1x1 convolution: :math:`y = \mathrm{activation}(W x + b + \mathrm{residual})`.

    Equivalent to ``activation(F.conv2d(input, weight, bias, stride, groups=groups) + residual)``, as one kernel,
    forward and backward (Lin et al., Network in Network, 2013).

    Args:
        input: ``(N, C_in, *spatial)`` or unbatched ``(C_in, *spatial)``, with 1 to 3 spatial dimensions; any strides.
        weight: ``(C_out, C_in / groups, 1[, 1[, 1]])``: its dimensions decide whether the convolution is 1d, 2d or 3d.
        bias: ``(C_out,)``.
        stride: one positive integer, or one per spatial dimension.
        groups: blocks of channels that do not mix; divides both channel counts.
        activation: None, ``"relu"``, ``"relu6"``, ``"silu"``, ``"hardswish"`` or ``"gelu"`` (exact, by erf).
        residual: added before the activation; has the output's shape.

    All tensors are float32, float64, bfloat16 or float16, of one dtype and device. Half types accumulate in float32.

    Returns:
        ``(N, C_out, *spatial)`` with the strides that ``nn.Conv2d`` gives its output. Gradients of the weight have
        the weight's strides.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit; the message names the argument.
        ValueError: an unknown activation.
        TypeError: an argument of the wrong type.
    """
    if (
        not torch.compiler.is_compiling()
        and type(input) in _PLAIN
        and type(weight) in _PLAIN
        and (bias is None or type(bias) in _PLAIN)
        and (residual is None or type(residual) in _PLAIN)
        and not torch._C._is_any_autocast_enabled()
        and not _transformed()
    ):
        return _eager(input, weight, bias, stride, groups, activation, residual)
    return _general(input, weight, bias, stride, groups, activation, residual)


def _eager(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    groups: int,
    activation: str | None,
    residual: Tensor | None,
) -> Tensor:
    if activation.__class__ is not str and activation is not None:
        activation_name(activation)
    config = _config(activation, stride if type(stride) is int else _stride_tuple(stride), groups, weight.dim() - 2)
    if not config:  # a stride or a number of groups that does not fit, or an error to be raised
        return _public(input, weight, bias, stride, groups, activation, residual)
    if input.is_cuda:
        config |= _allow_tf32(input) * _TF32
    if torch.is_grad_enabled() and (
        input.requires_grad
        or weight.requires_grad
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    ):
        if activation is None or activation in MASKED:
            output: Tensor = _Conv1x1.apply(input, weight, bias, residual, config)
            return output
        # The pre-activation is what the derivative needs, so it is what gets saved, by torch's own function.
        return apply_activation(_Conv1x1.apply(input, weight, bias, residual, config & ~7), activation)
    result: Tensor = _fprop(input, weight, bias, residual, config)
    return result


def _public(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    groups: int,
    activation: str | None,
    residual: Tensor | None,
) -> Tensor:
    fused = activation is None or activation in MASKED or not _needs_grad(input, weight, bias, residual)
    output: Tensor = call(
        _ops.conv1x1.default, input, weight, bias, residual, _stride_tuple(stride), groups,
        activation_name(activation if fused else None), _allow_tf32(input),
    )  # fmt: skip
    return output if fused else apply_activation(output, activation)


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """As torch casts a convolution's arguments in an autocast region: to the region's own dtype, differentiably."""
    device = next(t.device.type for t in tensors if t is not None)
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)

    def cast(t: Tensor | None) -> Tensor | None:
        eligible = t is not None and t.is_floating_point() and t.dtype != torch.float64 and t.device.type == device
        return t.to(dtype) if eligible and t is not None else t

    return tuple(cast(t) for t in tensors)


def _general(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    groups: int,
    activation: str | None,
    residual: Tensor | None,
) -> Tensor:
    check_tensors(input=input, weight=weight, bias=bias, residual=residual)
    if has_torch_function_variadic(input, weight, bias, residual):
        tensors = tuple(t for t in (input, weight, bias, residual) if t is not None)
        handled: Tensor = handle_torch_function(
            conv1x1, tensors, input, weight, bias, stride, groups=groups, activation=activation, residual=residual
        )
        return handled
    activation_name(activation)
    input, weight, bias, residual = autocast(input, weight, bias, residual)  # type: ignore[assignment]
    if torch.compiler.is_compiling():
        return _public(input, weight, bias, stride, groups, activation, residual)
    if forward_ad._current_level >= 0:  # torch's own operators have the tangents' rules
        return reference_forward(input, weight, bias, stride, groups, activation, residual)
    if _transformed() or any(type(t) not in _PLAIN for t in (input, weight, bias, residual) if t is not None):
        return _public(input, weight, bias, stride, groups, activation, residual)
    return _eager(input, weight, bias, stride, groups, activation, residual)


def check_tensors(**tensors: object) -> None:
    """Raises:
    TypeError: for anything that is neither a tensor (or tensor-like) nor, for bias and residual, None.
    """
    for name, value in tensors.items():
        optional = name in ("bias", "residual")
        if not (isinstance(value, Tensor) or hasattr(value, "__torch_function__") or (optional and value is None)):
            expected = "a Tensor or None" if optional else "a Tensor"
            raise TypeError(f"conv1x1: {name}: expected {expected}, got {type(value).__name__}")


def reference_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    groups: int,
    activation: str | None,
    residual: Tensor | None,
) -> Tensor:
    """The same function by torch's own operators: what forward-mode AD runs, and what tests compare with."""
    conv = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[weight.dim() - 2]
    z = conv(input, weight, bias, stride, groups=groups)  # type: ignore[operator]
    return apply_activation(z if residual is None else z + residual, activation)


def conv1x1_avg_pool(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, *, groups: int = 1, activation: str | None = "relu"
) -> Tensor:
    r"""1x1 convolution, activation and global average pooling: the article's replacement for a linear head.

    Equivalent to ``activation(F.conv2d(input, weight, bias)).mean((-2, -1))``, without ever holding the
    ``(N, C_out, H, W)`` tensor, forward or backward: the backward recomputes it piece by piece. Without an activation
    the pixels are pooled first.

    Args:
        input, weight, bias, groups, activation: as for :func:`conv1x1`.

    Returns:
        ``(N, C_out)``, or ``(C_out,)`` for unbatched input; NaN where the images have no pixels, as torch's mean.

    Raises:
        RuntimeError, ValueError, TypeError: as :func:`conv1x1`.
    """
    check_tensors(input=input, weight=weight, bias=bias)
    if has_torch_function_variadic(input, weight, bias) and not torch.compiler.is_compiling():
        tensors = tuple(t for t in (input, weight, bias) if t is not None)
        handled: Tensor = handle_torch_function(
            conv1x1_avg_pool, tensors, input, weight, bias, groups=groups, activation=activation
        )
        return handled
    name = activation_name(activation)
    input, weight, bias = autocast(input, weight, bias)  # type: ignore[assignment]
    spatial = tuple(range(2 - weight.dim(), 0))
    pools_first = activation is None and input.dim() in (weight.dim(), weight.dim() - 1) and weight.dim() > 2
    if pools_first and input.is_floating_point():
        return conv1x1(input.mean(spatial, keepdim=True), weight, bias, groups=groups).flatten(spatial[0] - 1)
    if not torch.compiler.is_compiling() and forward_ad._current_level >= 0:
        return reference_forward(input, weight, bias, 1, groups, activation, None).mean(spatial)
    result: Tensor = call(_ops.conv1x1_avg_pool.default, input, weight, bias, groups, name, _allow_tf32(input))
    return result


class Explanation(dict[str, str]):
    """What a call would run: a dictionary that prints as a table."""

    def __str__(self) -> str:
        width = max(map(len, self), default=0)
        return "\n".join(f"{key:<{width}}  {value}" for key, value in self.items())

    __repr__ = __str__


def explain(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    *,
    groups: int = 1,
    activation: str | None = None,
    residual: Tensor | None = None,
    direction: str = "fprop",
) -> Explanation:
    """Which kernel, instruction set, tiles, blocking and threads a call would use, and why. Runs nothing.

    Args:
        input, weight, bias, stride, groups, activation, residual: as for :func:`conv1x1`. Real tensors: those on
            a GPU get the plan for that GPU.
        direction: ``"fprop"``, ``"dgrad"``, ``"wgrad"`` or ``"avg_pool"``.

    Raises:
        RuntimeError, ValueError, TypeError: as :func:`conv1x1` would, and for an unknown direction.
    """
    check_tensors(input=input, weight=weight, bias=bias, residual=residual)
    name = activation_name(activation)
    with torch.no_grad():
        cast = autocast(input, weight, bias, residual)
        allow_tf32 = _allow_tf32(cast[0])  # type: ignore[arg-type]
        text = _ops._explain(*cast, _stride_tuple(stride), groups, name, allow_tf32, direction)
    out = Explanation(_library.key_values(text))
    needs_grad = _needs_grad(input, weight, bias, residual)
    if forward_ad._current_level >= 0:
        out["route"] = "torch's own convolution: a forward-mode AD level is active"
    elif _transformed() or any(type(t) not in _PLAIN for t in cast if t is not None):
        out["route"] = "public operator: a transform, a dispatch mode or a tensor subclass is involved"
    else:
        out["route"] = "eager fast path" + (", autograd function" if needs_grad else ", no gradient needed")
    if needs_grad and activation not in (None, *MASKED):
        out["activation"] = f"{activation} by torch after the kernel: its gradient needs the pre-activation"
    elif direction in ("fprop", "avg_pool"):
        out["activation"] = f"{activation}, in the kernel's epilogue"
    return out


def build_info() -> dict[str, str]:
    """Version, torch targeted and torch running, compilers, instruction set found, microkernels, CUDA.

    Returns:
        ``cuda_archs`` and ``nvcc`` say what the library was built with, ``torch_cuda`` what the running torch has, and
        ``cuda_devices`` which GPUs it sees, each with its architecture.
    """
    from . import __version__

    info = {"version": __version__, "library": _library.path.name, "torch": torch.__version__}
    info.update(_library.key_values(_ops._build_info()))
    info["torch_cuda"] = torch.version.cuda or "none: this torch has no CUDA"
    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    info["cuda_devices"] = ", ".join(map(_device_text, gpus)) or "none"
    info["threads"] = str(torch.get_num_threads())
    return info


def _device_text(gpu: int) -> str:
    major, minor = torch.cuda.get_device_capability(gpu)
    return f"{torch.cuda.get_device_name(gpu)} ({major}.{minor})"
