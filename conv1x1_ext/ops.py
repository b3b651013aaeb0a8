"""The functional API, and how a call finds its way to a kernel.

Plain eager calls go to a private operator, or through a module-level ``torch.autograd.Function`` where a gradient is
needed: ``_eager.py``. Everything else (compile, export, functorch transforms, dispatch modes, tensor
subclasses) goes to the public operators, whose rules are in ``_registrations.py``. Both share the backward formulas
in ``_formulas.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import _library
from ._arguments import integer, stride_tuple
from ._autocast import cast as cast_in_region
from ._eager import (
    PLAIN,
    activation_name,
    allow_tf32,
    apply_activation,
    autocasting,
    compiling,
    config_of,
    dynamo_compiling,
    fast_avg_pool,
    function_modes,
    make_config,
    needs_grad,
    plain_conv1x1,
    transformed,
    unobstructed,
)
from ._formulas import MASKED

_ops = torch.ops.conv1x1_ext
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


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
        stride: one positive integer, or one per spatial dimension; NumPy's integers and 0-d tensors of integers too.
        groups: blocks of channels that do not mix, an integer; divides both channel counts.
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
    if not dynamo_compiling() and type(weight) in PLAIN and not function_modes():
        config = config_of(activation, stride, groups, weight)
        if config and unobstructed(input, bias, residual):
            return plain_conv1x1(input, weight, bias, residual, config)
    return _general(input, weight, bias, stride, groups, activation, residual)


def _public(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    groups: int,
    activation: str | None,
    residual: Tensor | None,
) -> Tensor:
    fused = activation is None or activation in MASKED or not needs_grad(input, weight, bias, residual)
    output: Tensor = _ops.conv1x1.default(
        input, weight, bias, residual, stride, groups,
        activation_name(activation if fused else None), allow_tf32(input),
    )  # fmt: skip
    return output if fused else apply_activation(output, activation)


def autocast(
    *tensors: Tensor | None, convert: Callable[[Tensor, torch.dtype], Tensor] = cast_in_region
) -> tuple[Tensor | None, ...]:
    """As torch casts a convolution's arguments in an autocast region: to the region's own dtype, differentiably."""
    device = next(t.device.type for t in tensors if t is not None)
    # Of other devices, such as meta, torch may know no autocast, and raises where it is asked.
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)

    def convert_one(t: Tensor | None) -> Tensor | None:
        eligible = t is not None and t.is_floating_point() and t.dtype != torch.float64 and t.device.type == device
        return convert(t, dtype) if eligible and t is not None and t.dtype != dtype else t

    return tuple(convert_one(t) for t in tensors)


def _general(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    groups: int,
    activation: str | None,
    residual: Tensor | None,
) -> Tensor:
    if has_torch_function_variadic(input, weight, bias, residual):  # first: a function mode sees what a check asks
        tensors = tuple(t for t in (input, weight, bias, residual) if t is not None)
        handled: Tensor = handle_torch_function(
            conv1x1, tensors, input, weight, bias, stride, groups=groups, activation=activation, residual=residual
        )
        return handled
    check_tensors(input=input, weight=weight, bias=bias, residual=residual)
    activation_name(activation)
    stride, groups = stride_tuple(stride), integer("groups", groups)
    if compiling() or autocasting():
        input, weight, bias, residual = autocast(input, weight, bias, residual)  # type: ignore[assignment]
    if forward_ad._current_level >= 0:  # torch's own operators have derivatives of any order and kind
        return reference_forward(input, weight, bias, stride, groups, activation, residual)
    if compiling():
        return _public(input, weight, bias, stride, groups, activation, residual)
    if transformed() or any(type(t) not in PLAIN for t in (input, weight, bias, residual) if t is not None):
        return _public(input, weight, bias, stride, groups, activation, residual)
    config = make_config(activation, stride, groups, weight.dim() - 2)
    if not config:  # a stride or a number of groups that does not fit, or an error to be raised
        return _public(input, weight, bias, stride, groups, activation, residual)
    return plain_conv1x1(input, weight, bias, residual, config)


def check_tensors(**tensors: object) -> None:
    """Raises:
    TypeError: for anything that is neither a tensor (or tensor-like) nor, for bias and residual, None.
    RuntimeError: for nested tensors.
    """
    for name, value in tensors.items():
        optional = name in ("bias", "residual")
        if not (isinstance(value, Tensor) or hasattr(value, "__torch_function__") or (optional and value is None)):
            expected = "a Tensor or None" if optional else "a Tensor"
            raise TypeError(f"conv1x1: {name}: expected {expected}, got {type(value).__name__}")
        if isinstance(value, Tensor) and value.is_nested:  # a subclass that would answer with an operator's name
            raise RuntimeError(f"conv1x1: {name}: expected a dense tensor, got a nested tensor: pad it")


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
    if isinstance(stride, Sequence) and len(stride) == 1:  # torch's batching rule takes a list for all dimensions
        stride = stride[0]
    z = conv(input, weight, bias, stride, groups=groups)  # type: ignore[operator]
    return apply_activation(z if residual is None else z + residual, activation)


def conv1x1_avg_pool(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, *, groups: int = 1, activation: str | None = "relu"
) -> Tensor:
    r"""1x1 convolution, activation and global average pooling: the article's replacement for a linear head.

    Equivalent to ``activation(F.conv2d(input, weight, bias)).mean((-2, -1))``, without ever holding the
    ``(N, C_out, H, W)`` tensor, forward or backward. What the backward needs to know of it is a bit for each element
    (ReLU and ReLU6 in eager mode on the CPU), or recomputed piece by piece. Without an activation the pixels are pooled
    first.

    Args:
        input, weight, bias, groups, activation: as for :func:`conv1x1`.

    Returns:
        ``(N, C_out)``, or ``(C_out,)`` for unbatched input; NaN where the images have no pixels, as torch's mean.

    Raises:
        RuntimeError, ValueError, TypeError: as :func:`conv1x1`.
    """
    if not dynamo_compiling() and activation is not None and type(weight) in PLAIN and not function_modes():
        config = config_of(activation, 1, groups, weight)
        if config:
            output = fast_avg_pool(input, weight, bias, config)
            if output is not None:
                return output
    if has_torch_function_variadic(input, weight, bias) and not compiling():
        tensors = tuple(t for t in (input, weight, bias) if t is not None)
        handled: Tensor = handle_torch_function(
            conv1x1_avg_pool, tensors, input, weight, bias, groups=groups, activation=activation
        )
        return handled
    check_tensors(input=input, weight=weight, bias=bias)
    name = activation_name(activation)
    groups = integer("groups", groups)
    input, weight, bias = autocast(input, weight, bias)  # type: ignore[assignment]
    spatial = tuple(range(2 - weight.dim(), 0))
    pools_first = activation is None and input.dim() in (weight.dim(), weight.dim() - 1) and weight.dim() > 2
    if pools_first and input.dtype in _DTYPES:
        return conv1x1(input.mean(spatial, keepdim=True), weight, bias, groups=groups).flatten(spatial[0] - 1)
    if forward_ad._current_level >= 0:
        return reference_forward(input, weight, bias, 1, groups, activation, None).mean(spatial)
    result: Tensor = _ops.conv1x1_avg_pool.default(input, weight, bias, groups, name, allow_tf32(input))
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

    It takes no memory either, but under autocast, for the operands that a call would cast.

    Args:
        input, weight, bias, stride, groups, activation, residual: as for :func:`conv1x1`. Real tensors: those on
            a GPU get the plan for that GPU.
        direction: ``"fprop"``, ``"dgrad"``, ``"wgrad"`` or ``"avg_pool"``.

    Raises:
        RuntimeError, ValueError, TypeError: as :func:`conv1x1` would, for an unknown direction, and for meta or fake
            tensors, for which no kernel runs.
    """
    check_tensors(input=input, weight=weight, bias=bias, residual=residual)
    name = activation_name(activation)
    from torch._subclasses.fake_tensor import is_fake

    if input.device.type not in ("cpu", "cuda") or is_fake(input):
        where = "a fake tensor" if is_fake(input) else f"one on {input.device.type}"
        raise RuntimeError(f"explain: input: expected a tensor on the CPU or a GPU, got {where}: no kernel would run")
    stride, groups = stride_tuple(stride), integer("groups", groups)
    with torch.no_grad():
        # Of what would be cast the plan needs no values.
        cast = autocast(input, weight, bias, residual, convert=lambda t, dtype: torch.empty_like(t, dtype=dtype))
        tf32 = allow_tf32(cast[0])  # type: ignore[arg-type]
        text = _ops._explain(*cast, stride, groups, name, tf32, direction)
    out = Explanation(_library.key_values(text))
    wants_grad = needs_grad(input, weight, bias, residual)
    if forward_ad._current_level >= 0:
        out["route"] = "torch's own convolution: a forward-mode AD level is active"
    elif transformed() or any(type(t) not in PLAIN for t in cast if t is not None):
        out["route"] = "public operator: a transform, a dispatch mode or a tensor subclass is involved"
    else:
        out["route"] = "eager fast path" + (", autograd function" if wants_grad else ", no gradient needed")
    if direction == "avg_pool" and wants_grad:
        kept = cast[0].device.type == "cpu" and activation in ("relu", "relu6") and out["route"].startswith("eager")  # type: ignore[union-attr]
        out["backward"] = "from a bit kept for each output" if kept else "recomputes the pre-activation"
    if wants_grad and direction != "avg_pool" and activation not in (None, *MASKED):
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
