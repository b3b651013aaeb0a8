"""The oracle, the error bound and the tensor factories that every test file uses.

The oracle is torch's own convolution: in the tensors' dtype on their device ("stock"), and in float64 on the CPU
("reference"), which shares no code with the device under test. DEVICE is CONV1X1_TEST_DEVICE; tensors are made there
without naming it, as it is torch's default device (conftest.py).
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import conv1x1_ext

ROOT = Path(__file__).resolve().parent.parent
ACTIVATIONS = (None, "relu", "relu6", "silu", "hardswish", "gelu")
FLOATS = (torch.float32, torch.float64)
HALVES = (torch.bfloat16, torch.float16)
# CONV1X1_TEST_DTYPES names those of them that covering arrays shall be made of: test_amx.py's processes take one.
_ASKED = os.environ.get("CONV1X1_TEST_DTYPES", "").split()
DTYPES = tuple(d for d in (*FLOATS, *HALVES) if not _ASKED or str(d).removeprefix("torch.") in _ASKED)
DEVICE = torch.device(os.environ.get("CONV1X1_TEST_DEVICE", "cpu"))
FORMATS = ("contiguous", "channels_last")  # the layouts that the kernels read in place
LAYOUTS = (
    "contiguous", "channels_last", "permuted", "sliced", "offset", "expanded_batch", "expanded_channel",
    "expanded_pixels", "overlapping",
)  # fmt: skip
WEIGHT_LAYOUTS = ("contiguous", "channels_last", "transposed", "sliced", "expanded_out", "expanded_in")
SLOPE = 1.5  # the activations' largest, hardswish's

_functions = {
    None: lambda z: z, "relu": F.relu, "relu6": F.relu6, "silu": F.silu, "hardswish": F.hardswish, "gelu": F.gelu,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    n: int
    c_in: int
    c_out: int
    spatial: tuple[int, ...]
    stride: int | tuple[int, ...] = 1
    groups: int = 1
    batched: bool = True

    @property
    def x_shape(self) -> tuple[int, ...]:
        return (*((self.n,) if self.batched else ()), self.c_in, *self.spatial)

    @property
    def w_shape(self) -> tuple[int, ...]:
        return (self.c_out, self.c_in // self.groups, *((1,) * len(self.spatial)))

    @property
    def y_shape(self) -> tuple[int, ...]:
        strides = (self.stride,) * len(self.spatial) if isinstance(self.stride, int) else self.stride
        out = tuple((s - 1) // t + 1 for s, t in zip(self.spatial, strides, strict=True))
        return (*((self.n,) if self.batched else ()), self.c_out, *out)

    @property
    def channel(self) -> int:
        return 1 if self.batched else 0

    @property
    def swapped(self) -> Case:
        """Input and output channels exchanged: for a gradient, what the case is for the forward."""
        return replace(self, c_in=self.c_out, c_out=self.c_in)

    def __str__(self) -> str:
        size = "x".join(map(str, self.spatial))
        return f"{self.n if self.batched else '-'}_{self.c_in}to{self.c_out}_{size}_s{self.stride}_g{self.groups}"


# Every dimensionality, stride, group count and tail, batched and not. The gradients run them with channels swapped.
CASES = [
    Case(1, 64, 64, (14, 14)),
    Case(2, 3, 5, (9, 7)),
    Case(2, 16, 33, (13, 11), 2),
    Case(1, 33, 16, (12, 12), (2, 3)),
    Case(1, 12, 18, (5, 9), (1, 4), 3),
    Case(3, 24, 24, (6, 7), 2, 24),
    Case(2, 24, 48, (6, 5), 1, 24),
    Case(1, 512, 32, (12, 12), 1, 1, False),
    Case(1, 40, 20, (7, 5), 2, 4, False),
    Case(5, 130, 70, (7, 7)),
    Case(4, 257, 65, (7, 7), 2),
    Case(3, 64, 128, (1, 1)),
    Case(7, 9, 10, (1, 1)),
    Case(2, 19, 23, (31,)),
    Case(2, 20, 24, (31,), 3, 4),
    Case(1, 19, 23, (50,), 1, 1, False),
    Case(2, 10, 15, (3, 5, 7)),
    Case(2, 10, 15, (4, 5, 7), (2, 1, 3), 5),
    Case(1, 10, 15, (4, 5, 7), 2, 1, False),
    Case(1, 8, 8, (1, 300)),
    Case(1, 8, 8, (300, 1), 5),
    Case(2, 6, 4, (3, 3), 7),
]
GRADIENT_CASES = [case.swapped for case in CASES]
# Few enough for the product with every layout of x, w or dy.
LAYOUT_CASES = (Case(3, 20, 12, (6, 9), 1, 2), Case(2, 66, 70, (8, 8), 2))
GRAD_OUTPUT_CASES = (Case(2, 24, 18, (7, 9)), Case(3, 65, 66, (6, 6), 2))


def randn(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.randn(tuple(shape), dtype=torch.float64 if dtype == torch.float64 else torch.float32).to(dtype)


def laid_out(shape: Sequence[int], dtype: torch.dtype, layout: str = "contiguous", channel: int = 1) -> Tensor:
    """Random values of a shape in a memory layout."""
    shape = tuple(shape)
    if layout == "contiguous":
        return randn(shape, dtype)
    if layout == "channels_last":
        return randn((*shape[:channel], *shape[channel + 1 :], shape[channel]), dtype).movedim(-1, channel)
    if layout == "permuted":
        return randn(shape[::-1], dtype).permute(*reversed(range(len(shape))))
    if layout == "sliced":
        steps = [2 if d in (channel, len(shape) - 1) else 1 for d in range(len(shape))]
        base = randn([s * t + 1 for s, t in zip(shape, steps, strict=True)], dtype)
        return base[tuple(slice(1, 1 + s * t, t) for s, t in zip(shape, steps, strict=True))]
    if layout == "offset":
        return randn((math.prod(shape) + 1,), dtype)[1:].view(shape)
    if layout == "overlapping":
        strides = [2 * (len(shape) - d) - 1 for d in range(len(shape))]
        size = sum((s - 1) * t for s, t in zip(shape, strides, strict=True)) + 1
        return randn((size,), dtype).as_strided(shape, strides)
    kept = list(shape)
    if layout == "expanded_batch":
        kept[0] = 1
    elif layout == "expanded_channel":
        kept[channel] = 1
    elif layout == "expanded_pixels":
        kept[channel + 1 :] = [1] * (len(shape) - channel - 1)
    else:
        raise ValueError(layout)
    return randn(kept, dtype).expand(shape)


def weight_of(shape: Sequence[int], dtype: torch.dtype, layout: str = "contiguous") -> Tensor:
    out, inner, *ones = shape
    if layout == "transposed":
        return randn((inner, out), dtype).t().reshape(shape)
    if layout == "expanded_out":
        return randn((1, inner, *ones), dtype).expand(*shape)
    if layout == "expanded_in":
        return randn((out, 1, *ones), dtype).expand(*shape)
    if layout == "sliced":
        return randn((out + 1, 2 * inner + 1, *ones), dtype)[1:, 1::2]
    return laid_out(shape, dtype, layout)


def conv(x: Tensor, w: Tensor, b: Tensor | None = None, stride: int | Sequence[int] = 1, groups: int = 1) -> Tensor:
    function = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[w.dim() - 2]
    return function(x, w, b, stride, groups=groups)


def activate(z: Tensor, activation: str | None) -> Tensor:
    return _functions[activation](z)


def stock_forward(x, w, b=None, stride=1, *, groups=1, activation=None, residual=None) -> Tensor:
    z = conv(x, w, b, stride, groups)
    return activate(z if residual is None else z + residual, activation)


def exact(t: Tensor | None) -> Tensor | None:
    """In float64 on the CPU, where the reference runs."""
    return None if t is None else t.detach().to("cpu", torch.float64)


def magnitude_of(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.detach().to("cpu", torch.float64).abs()


def chain_bound(k: int, dtype: torch.dtype) -> float:
    """Worst-case relative error of a sum of k products: chains of at most 128, joined in order, then the epilogue.

    (Half types' of 256 are longer, and their bound much wider.)
    """
    if dtype in HALVES:
        return chain_bound(k, torch.float32) + 2 * torch.finfo(dtype).eps  # float32 sums, rounded once or twice
    return (min(k, 128) + k / 128 + 8) * torch.finfo(dtype).eps


def assert_close_to_reference(ours: Tensor, stock: Tensor, ref64: Tensor, magnitude: Tensor, k: int) -> None:
    """Ours is at most twice as far (relative Frobenius) from float64 as stock is, and within the bound everywhere.

    `magnitude` is the same function of the operands' absolute values. Half an eps is forgiven, as stock's error may be
    zero; outputs of few elements are too few for a ratio of two random errors, so they are forgiven a random walk's.
    """
    assert ours.shape == stock.shape and ours.dtype == stock.dtype, (ours.shape, stock.shape, ours.dtype, stock.dtype)
    if ours.numel() == 0:
        return
    dtype, eps = ours.dtype, torch.finfo(ours.dtype).eps
    ours64, stock64 = ours.detach().cpu().double(), stock.detach().cpu().double()
    assert torch.isfinite(ours64).all()
    error = (ours64 - ref64).abs()
    # float64 against float64: the reference has such an error itself.
    twice = 2 if dtype == torch.float64 else 1
    allowed = twice * SLOPE * chain_bound(k, dtype) * magnitude + torch.finfo(dtype).tiny
    worst = (error / allowed).max().item()
    assert worst <= 1, f"componentwise: {worst:.3g} times the bound"
    if dtype == torch.float64:
        return
    norm = ref64.norm().item()
    if norm == 0:
        return
    few = ref64.unique().numel() < 512  # an expanded input repeats its outputs; one pixel shares its rounding
    # 0.6 eps sqrt(chain) is 3.5 standard deviations of a random walk along one chain.
    floor = eps * (magnitude.norm().item() / norm * max(1, 0.6 * min(k, 64) ** 0.5) if few else 0.5)
    ratio_ours, ratio_stock = error.norm().item() / norm, (stock64 - ref64).norm().item() / norm
    assert ratio_ours <= 2 * ratio_stock + floor, f"Frobenius: ours {ratio_ours:.3g}, stock {ratio_stock:.3g}"


def check_forward(x, w, b=None, stride=1, *, groups=1, activation=None, residual=None, ours=None) -> Tensor:
    """Runs ours and stock on the same tensors and compares; returns ours."""
    kwargs = {"groups": groups, "activation": activation}
    if ours is None:
        ours = conv1x1_ext.conv1x1(x, w, b, stride, residual=residual, **kwargs)
    stock = stock_forward(x, w, b, stride, residual=residual, **kwargs)
    ref = stock_forward(exact(x), exact(w), exact(b), stride, residual=exact(residual), **kwargs)
    sizes = [magnitude_of(t) for t in (x, w, b)]
    magnitude = stock_forward(*sizes, stride, residual=magnitude_of(residual), groups=groups)
    assert_close_to_reference(ours, stock, ref, magnitude, w.shape[1])
    return ours


def _oracle_gradients(tensors, dy, stride, groups, activation, z) -> list[Tensor | None]:
    """Gradients by torch's autograd. The activation's derivative is taken at `z`, our own rounded pre-activation: its
    jumps (ReLU at 0, hardswish at 3) would make an error of a value that rounds to the other side of them."""
    z = z.detach().requires_grad_()
    (dz,) = torch.autograd.grad(activate(z, activation), z, dy) if activation is not None else (dy,)
    # Contiguous copies: torch 2.13's own weight gradient is wrong for a grouped convolution of one (C, H, W) image
    # whose channels are last in memory.
    leaves = [None if t is None else t.detach().clone(memory_format=torch.contiguous_format) for t in tensors]
    x, w, b, r = (None if t is None else t.requires_grad_() for t in leaves)
    y = stock_forward(x, w, b, stride, groups=groups, residual=r)
    grads = iter(torch.autograd.grad(y, [t for t in leaves if t is not None], dz))
    return [None if t is None else next(grads) for t in leaves]


def check_gradients(
    x, w, b=None, stride=1, *, groups=1, activation=None, residual=None, dy=None, function=None, need=(1, 1, 1, 1)
) -> list[Tensor | None]:
    """Gradients of input, weight, bias and residual, ours against stock and float64; returns ours."""
    function = conv1x1_ext.conv1x1 if function is None else function
    tensors = (x, w, b, residual)
    leaves = [None if t is None else t.detach().requires_grad_(bool(n)) for t, n in zip(tensors, need, strict=True)]
    y = function(leaves[0], leaves[1], leaves[2], stride, groups=groups, activation=activation, residual=leaves[3])
    if dy is None:
        dy = torch.empty_like(y).copy_(randn(y.shape, y.dtype))  # in y's layout, as a network's next layer sends it
    asked = [t for t in leaves if t is not None and t.requires_grad]
    grads = iter(torch.autograd.grad(y, asked, dy))
    ours = [next(grads) if t is not None and t.requires_grad else None for t in leaves]

    with torch.no_grad():
        z = conv1x1_ext.conv1x1(x, w, b, stride, groups=groups, residual=residual)
    stock = _oracle_gradients(tensors, dy, stride, groups, activation, z)
    ref = _oracle_gradients([exact(t) for t in tensors], exact(dy), stride, groups, activation, exact(z))
    size = _oracle_gradients([magnitude_of(t) for t in tensors], magnitude_of(dy), stride, groups, None, exact(z))
    pixels = math.prod(y.shape) // max(w.shape[0], 1)
    lengths = (w.shape[0] // groups, pixels, pixels, 1)
    for mine, theirs, truth, magnitude, k in zip(ours, stock, ref, size, lengths, strict=True):
        if mine is not None:
            assert_close_to_reference(mine, theirs, truth, magnitude, k)
    return ours


def same_bits(a: Tensor, b: Tensor) -> bool:
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.shape == b.shape and torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))


class Guarded:
    """Memory that ends where the process may not go (Linux); an access beyond it ends the test run."""

    def __init__(self):
        self.kept, self.libc = [], ctypes.CDLL(None)

    def __call__(self, array):
        """A copy of `array` that ends at the end of the memory."""
        import numpy as np

        page = mmap.PAGESIZE
        size = -(-array.nbytes // page) * page
        memory = mmap.mmap(-1, size + page)
        whole = np.frombuffer(memory, np.uint8)
        self.kept.append((memory, whole))
        assert self.libc.mprotect(ctypes.c_void_p(whole.ctypes.data + size), ctypes.c_size_t(page), 0) == 0
        copy = whole[size - array.nbytes : size].view(array.dtype).reshape(array.shape)
        copy[...] = array
        return copy

    def tensor(self, t: Tensor) -> Tensor:
        """A contiguous copy of `t` that ends there."""
        return torch.from_numpy(self(t.contiguous().view(torch.uint8).reshape(-1).numpy())).view(t.dtype).view(t.shape)


def run_python(code: str, timeout: float = 120, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs a script in a fresh interpreter that can import the package and these helpers."""
    other = env.get("CONV1X1_TEST_AMX", os.environ.get("CONV1X1_TEST_AMX"))  # the folder of another library
    path = os.pathsep.join([*([other] if other else []), str(ROOT), str(ROOT / "tests")])
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path, **env},
        cwd=other or None,  # which Python looks in first
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def expect_ok(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def opcheck(op, args):
    """torch.library.opcheck, or a skip where it cannot be imported."""
    try:
        torch.library.opcheck(op, args)
    except ModuleNotFoundError as error:
        if error.name != "expecttest":
            raise
        pytest.skip("torch.library.opcheck needs expecttest, which is not installed")
