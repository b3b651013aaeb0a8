"""The candidates of ``bench.op --device cuda``, each computing relu(conv1x1(x, w) + b), and what they must give.

A peer builds a function of tensors once per layer; ``arrange`` turns a copy of the layer's tensors into that function's
arguments beforehand, so that only the call is timed. Training runs the same functions under autograd, with a given dy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import conv1x1_ext
from bench.cuda_harness import DTYPES
from bench.harness import Layer
from bench.peers import products

# Relative Frobenius errors that are always good enough; otherwise at most twice stock's.
BOUNDS = {"float32": 1e-5, "tf32": 2e-3, "bfloat16": 6e-3, "float16": 1e-3}
# dy is zero where |z| is below: rounding must not decide whether ReLU lets it through.
MARGINS = {"float32": 1e-4, "tf32": 2e-2, "bfloat16": 1e-3, "float16": 1e-3}


@dataclass
class Copy:
    """One copy of a layer's tensors: x (N, C_in, H, W) and dy (N, C_out, H', W') in a layout, w, b."""

    x: Tensor
    w: Tensor
    b: Tensor
    dy: Tensor | None


Args = tuple[Tensor, ...]
Function = Callable[..., Tensor]


def _plain(copy: Copy) -> Args:
    return copy.x, copy.w, copy.b


def _matrix(copy: Copy) -> Args:
    """Pixels by channels, views of the channels-last tensors."""
    return copy.x.permute(0, 2, 3, 1).reshape(-1, copy.x.shape[1]), copy.w.flatten(1), copy.b


@dataclass(frozen=True)
class Peer:
    """One candidate. ``build`` gives the function of ``arrange``'s tensors for a layer."""

    name: str
    layout: str
    build: Callable[[Layer, str], Function]
    arrange: Callable[[Copy], Args] = _plain
    matrix: bool = False
    """y and dy are (pixels, C_out) matrices."""
    trains: bool = True
    stride_1: bool = False

    @property
    def key(self) -> str:
        return f"{self.name} {self.layout}"

    def unavailable(self, layer: Layer, train: bool) -> str | None:
        """Why this layer cannot be run, or None."""
        if train and not self.trains:
            return "no gradient"
        if self.matrix and layer.groups != 1:
            return "one group only"
        return "stride 1 only" if self.stride_1 and layer.stride != 1 else None

    def call(self, function: Function, layer: Layer, copy: Copy, train: bool) -> Callable[[], tuple[Tensor, ...]]:
        """Without arguments: y; for training y, dx, dw and dbias."""
        args = self.arrange(copy)
        if not train:
            return lambda: (function(*args),)
        assert copy.dy is not None
        dy = copy.dy.permute(0, 2, 3, 1).reshape(-1, layer.c_out) if self.matrix else copy.dy
        leaves = tuple(t.detach().requires_grad_() for t in args)

        def step() -> tuple[Tensor, ...]:
            y = function(*leaves)
            return y, *torch.autograd.grad(y, leaves, dy)

        return step

    def outputs(self, results: tuple[Tensor, ...], layer: Layer) -> tuple[Tensor, ...]:
        """In nn.Conv2d's shapes."""
        if not self.matrix:
            return results
        y, *grads = results

        def image(t: Tensor) -> Tensor:
            return t.reshape(layer.n, layer.h, layer.w, -1).permute(0, 3, 1, 2)

        return (image(y), *((image(grads[0]), grads[1][:, :, None, None], grads[2]) if grads else ()))


def _ours(layer: Layer, dtype: str) -> Function:
    return lambda x, w, b: conv1x1_ext.conv1x1(x, w, b, layer.stride, groups=layer.groups, activation="relu")


def _stock(layer: Layer, dtype: str) -> Function:
    return lambda x, w, b: F.relu(F.conv2d(x, w, b, layer.stride, groups=layer.groups))


def _cudnn_fused(layer: Layer, dtype: str) -> Function:
    stride = [layer.stride] * 2
    fused: Any = torch.ops.aten.cudnn_convolution_relu.default
    return lambda x, w, b: fused(x, w, b, stride, [0, 0], [1, 1], layer.groups)  # type: ignore[no-any-return]


def _addmm_relu(layer: Layer, dtype: str) -> Function:
    """cuBLASLt with its bias and ReLU epilogue."""
    fused: Any = torch.ops.aten._addmm_activation.default
    return lambda x, w, b: fused(b, x, w.t())  # type: ignore[no-any-return]


def _linear(layer: Layer, dtype: str) -> Function:
    return lambda x, w, b: F.linear(x, w, b).relu_()


def _compiled(layer: Layer, dtype: str) -> Function:
    torch._dynamo.reset()
    stride, groups = layer.stride, layer.groups
    options = {"mode": "max-autotune-no-cudagraphs", "dynamic": False}  # graphs are timed for all alike
    return torch.compile(lambda x, w, b: F.relu(F.conv2d(x, w, b, stride, groups=groups)), **options)  # type: ignore[call-overload, no-any-return]


LAYOUTS = ("NCHW", "NHWC")
PEERS = [
    *(Peer("ours", layout, _ours) for layout in LAYOUTS),
    *(Peer("stock", layout, _stock) for layout in LAYOUTS),
    *(Peer("cudnn_fused", layout, _cudnn_fused, trains=False) for layout in LAYOUTS),
    Peer("addmm_relu", "NHWC", _addmm_relu, _matrix, matrix=True, trains=False, stride_1=True),
    Peer("linear", "NHWC", _linear, _matrix, matrix=True, stride_1=True),
    *(Peer("compile", layout, _compiled) for layout in LAYOUTS),
]
NAMES = tuple(dict.fromkeys(p.name for p in PEERS))


def make_copies(
    layer: Layer, dtype: str, layout: str, count: int, train: bool, device: str, seed: int = 1
) -> list[Copy]:
    """``count`` different copies, each with the same distributions, from a fixed seed."""
    generator = torch.Generator(device).manual_seed(seed)
    memory_format = torch.channels_last if layout == "NHWC" else torch.contiguous_format

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device).to(DTYPES[dtype])

    copies = []
    for _ in range(count):
        x = normal(layer.n, layer.c_in, layer.h, layer.w).contiguous(memory_format=memory_format)
        fan_in = layer.c_in // layer.groups
        w = (normal(layer.c_out, fan_in, 1, 1) * fan_in**-0.5).contiguous(memory_format=memory_format)
        b, dy = normal(layer.c_out), None
        if train:
            z = F.conv2d(x, w, b, layer.stride, groups=layer.groups)
            dy = normal(*z.shape).masked_fill_(z.abs() < MARGINS[dtype], 0).contiguous(memory_format=memory_format)
        copies.append(Copy(x, w, b, dy))
    return copies


def reference(copy: Copy, stride: int, train: bool, groups: int = 1) -> tuple[Tensor, ...]:
    """In float64 by matrix products: y, and for training dx, dw and dbias."""
    return products(copy.x, copy.w, copy.b, copy.dy if train else None, stride, groups)


def errors(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> list[float]:
    """Relative Frobenius error of each output."""
    if [f.shape for f in found] != [e.shape for e in expected]:
        raise AssertionError(f"shapes {[tuple(f.shape) for f in found]}, not {[tuple(e.shape) for e in expected]}")
    pairs = zip(found, expected, strict=True)
    return [float((f.detach().double() - e).norm() / e.norm().clamp_min(1e-300)) for f, e in pairs]
