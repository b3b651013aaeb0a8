"""Runs the emulated kernels of csrc/cuda on torch's CPU tensors, through entry.cpp.

`Emulator.run` does for one direction what the CUDA binding does. `placed` makes the tensors: in a storage whose other
elements are NaN, so that a read outside spoils the result, and `intact` tells whether a write outside happened.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import build

DIRECTIONS = ("fprop", "dgrad", "wgrad", "avg_pool", "avg_pool_backward", "masked_copy")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # in the order of problem.h
ACTIVATIONS = (None, "relu", "relu6", "silu", "hardswish", "gelu")
SANITIZED = os.environ.get("CONV1X1_EMULATE_SANITIZED") == "1"
# Elements on either side of a tensor. AddressSanitizer guards the storage itself.
GUARD = 0 if SANITIZED else 64
_CAPACITY = 1 << 14
_NAN = {2: (torch.int16, 0x7FDA), 4: (torch.int32, 0x7FDADADA), 8: (torch.int64, 0x7FDADADADADADADA)}


@dataclass(frozen=True)
class Gpu:
    arch: int  # compute capability, 10 * major + minor
    sm_count: int
    shared_memory: int  # bytes a block can opt in to
    only_tile: int = -1  # of heuristics.h's, to be chosen wherever it exists, and its slices of k
    only_slices: int = 0
    pooled_piece: int = 1 << 24  # elements that average pooling's backward recomputes at a time, or a quarter of all

    def __str__(self) -> str:
        return f"sm{self.arch}"


T4, A100, A10 = Gpu(75, 40, 64 << 10), Gpu(80, 108, 163 << 10), Gpu(86, 72, 99 << 10)
L4, H100, RTX5090 = Gpu(89, 58, 99 << 10), Gpu(90, 132, 227 << 10), Gpu(120, 170, 99 << 10)
GPUS = (T4, A100, A10, L4, H100, RTX5090)


def _spatial(sizes: Sequence[int], fill: int) -> list[int]:
    return [fill] * (3 - len(sizes)) + list(sizes)


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _activation(t: Tensor | None) -> list[int]:
    """(N, C, ...) or, of the pooled tensors, (N, C)."""
    return [_address(t), *([0] * 5 if t is None else [t.stride(0), t.stride(1), *_spatial(t.stride()[2:], 0)])]


def _weight(t: Tensor | None) -> list[int]:
    return [_address(t), *([0, 0] if t is None else t.stride()[:2])]


def _vector(t: Tensor | None) -> list[int]:
    return [_address(t), 0 if t is None else t.stride(0)]


class Emulator:
    def __init__(self) -> None:
        library = ctypes.CDLL(str(build.build_kernels(sanitize=SANITIZED)))
        self._run = library.conv1x1_emulated

    def run(
        self, direction: str, *, x: Tensor, w: Tensor, y: Tensor | None = None, residual: Tensor | None = None,
        bias: Tensor | None = None, dy: Tensor | None = None, dx: Tensor | None = None, dw: Tensor | None = None,
        dbias: Tensor | None = None, out: Tensor | None = None, dz: Tensor | None = None,
        stride: int | Sequence[int] = 1, groups: int = 1, activation: str | None = None, accumulate: bool = False,
        gpu: Gpu = A100, allow_tf32: bool = False, seed: int = 0, os_threads: int = 2,
    ) -> dict[str, str]:  # fmt: skip
        """Runs one direction and returns describe()'s text as a dict; empty for the directions without one plan.

        x, y, residual, dy, dx, dz: (N, C, W), (N, C, H, W) or (N, C, D, H, W); w, dw: (C_out, C_in / groups, ...);
        bias, dbias: (C_out,); out, and dy of avg_pool_backward: (N, C_out). All of one dtype, any strides. The results
        are written where y (fprop), dx (dgrad), dw and dbias (wgrad), out (avg_pool), dz (masked_copy) lie. `seed`
        shuffles the order in which threads run. Raises RuntimeError with the emulation's message.
        """
        spatial = x.dim() - 2
        steps = _spatial([stride] * spatial if isinstance(stride, int) else stride, 1)
        sizes = _spatial(x.shape[2:], 1)
        values = [
            DIRECTIONS.index(direction), seed, os_threads, gpu.arch, gpu.sm_count, gpu.shared_memory, gpu.only_tile,
            gpu.only_slices, gpu.pooled_piece, allow_tf32, DTYPES.index(x.dtype), ACTIVATIONS.index(activation),
            x.shape[0], x.shape[1], w.shape[0], groups,
            *sizes, *((n - 1) // s + 1 for n, s in zip(sizes, steps, strict=True)), *steps, accumulate,
            *_activation(x), *_activation(y), *_activation(residual), *_activation(dy), *_activation(dx),
            *_weight(w), *_weight(dw), *_vector(bias), *_vector(dbias), _address(out), *_activation(dz),
        ]  # fmt: skip
        error, description = (ctypes.create_string_buffer(_CAPACITY) for _ in range(2))
        self._run((ctypes.c_int64 * len(values))(*values), error, description, ctypes.c_int64(_CAPACITY))
        if error.value:
            raise RuntimeError(error.value.decode())
        return dict(line.split("=", 1) for line in description.value.decode().splitlines())


def _strides(shape: Sequence[int], layout: str) -> list[int]:
    order, pitch = list(range(len(shape))), list(shape)
    if layout == "channels_last":
        order = [0, *range(2, len(shape)), 1]
    elif layout == "padded":  # rows of pixels of an odd length
        pitch[-1] += 1 + pitch[-1] % 2
    elif layout == "sliced":  # every second channel and pixel
        pitch[1], pitch[-1] = 2 * pitch[1], 2 * pitch[-1]
    elif layout not in ("contiguous", "expanded"):
        raise ValueError(layout)
    strides, step = [0] * len(shape), 1
    for d in reversed(order):
        strides[d] = step
        step *= pitch[d]
    if layout == "sliced":
        strides[1], strides[-1] = 2 * strides[1], 2 * strides[-1]
    if layout == "expanded":  # the gradient of a mean over the pixels
        strides = [shape[1] if len(shape) > 1 else 1, 1, *[0] * (len(shape) - 2)]
    return strides


def placed(
    shape: Sequence[int], dtype: torch.dtype, layout: str = "contiguous", values: Tensor | None = None, offset: int = 0
) -> Tensor:
    """A tensor of a shape in a layout, `offset` elements behind an aligned address, of `values` or else of NaN."""
    strides = _strides(shape, layout)
    extent = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if math.prod(shape) else 0
    storage = torch.empty(GUARD + offset + extent + GUARD, dtype=dtype)
    integer, nan = _NAN[dtype.itemsize]
    storage.view(integer).fill_(nan)
    view = storage.as_strided(tuple(shape), strides, GUARD + offset)
    if values is not None:
        kept = tuple(slice(0, 1) if s == 0 else slice(None) for s in strides)
        view[kept].copy_(values[kept])
    return view


def randn_in(shape: Sequence[int], dtype: torch.dtype, layout: str = "contiguous", offset: int = 0) -> Tensor:
    """Normal random numbers as `placed`."""
    return placed(shape, dtype, layout, torch.randn(tuple(shape), dtype=torch.float64).to(dtype), offset)


def intact(t: Tensor) -> bool:
    """Whether everything around and between the elements of a tensor made by `placed` is as it was."""
    integer, nan = _NAN[t.element_size()]
    storage = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage())
    outside = torch.ones(storage.numel(), dtype=torch.bool)
    outside.as_strided(t.shape, t.stride(), t.storage_offset()).fill_(False)
    return bool((storage.view(integer)[outside] == nan).all())
