"""Loads the compiled library and talks to the parts of it that are not operators on tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def _find() -> Path:
    here = Path(__file__).resolve().parent
    for path in sorted(here.glob("_C*.so")):
        return path
    raise ImportError(
        f"conv1x1_ext: the compiled library _C*.so is not in {here}. Install the package (pip install .) "
        "and import it from outside its source folder, or build in place: python setup.py build_ext --inplace"
    )


path = _find()
try:
    torch.ops.load_library(str(path))
except OSError as error:
    raise ImportError(
        f"conv1x1_ext: {path.name} does not load with torch {torch.__version__}; it needs torch >= 2.10. ({error})"
    ) from error


def registrations() -> torch.library.Library:
    """What holds the operators' rules that are written in Python, empty: those of an earlier import are taken back.

    The operators outlive this package's modules in a process, so their namespace keeps it.
    """
    kept = vars(torch.ops.conv1x1_ext)
    if "_rules" in kept:
        kept["_rules"]._destroy()
    rules = kept["_rules"] = torch.library.Library("conv1x1_ext", "IMPL")
    return rules


_check = ctypes.CDLL(str(path)).conv1x1_ext_check
_check.argtypes = [ctypes.POINTER(ctypes.c_int64), ctypes.c_char_p, ctypes.c_int64]
_check.restype = ctypes.c_int

# Values of c10::ScalarType and c10::DeviceType, as the stable ABI fixes them.
_SCALAR_TYPES = {
    torch.uint8: 0, torch.int8: 1, torch.int16: 2, torch.int32: 3, torch.int64: 4, torch.float16: 5, torch.float32: 6,
    torch.float64: 7, torch.complex32: 8, torch.complex64: 9, torch.complex128: 10, torch.bool: 11, torch.bfloat16: 15,
    torch.float8_e5m2: 23, torch.float8_e4m3fn: 24, torch.float8_e5m2fnuz: 25, torch.float8_e4m3fnuz: 26,
    torch.uint16: 27, torch.uint32: 28, torch.uint64: 29,
}  # fmt: skip
_DEVICE_TYPES = {"cpu": 0, "cuda": 1, "meta": 14}
_MAX_DIMS = 8


def _size(size: int | torch.SymInt) -> int | None:
    if isinstance(size, int):
        return size
    hint: int | None = size.node.hint if hasattr(size.node, "hint") else None
    return hint


def check_fake(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    groups: int,
    activation: int,
    *,
    grad_output: Tensor | None = None,
    output: Tensor | None = None,
    pools: bool = False,
) -> None:
    """Raises for fake or meta tensors exactly what the kernels raise for real ones.

    Symbolic sizes are checked by their example values, without guards: the kernel checks again at run time. Sizes with
    no example value (data-dependent ones) are left to the kernel alone.

    Args:
        input, weight, bias, residual, stride, groups: as the operators take them.
        activation: its place in csrc/problem.h's list.
        grad_output, output: of a backward operator.
        pools: is it the average pooling's operator?

    Raises:
        RuntimeError: as the operator would, with the same message.
    """
    values: list[int] = []
    for tensor in (input, weight, bias, residual, grad_output, output):
        if tensor is None:
            values += [0] * (5 + _MAX_DIMS)
            continue
        sizes = [_size(s) for s in tensor.shape[:_MAX_DIMS]]
        if any(s is None for s in sizes):
            return
        index = tensor.device.index
        values += [1, _SCALAR_TYPES.get(tensor.dtype, -1), _DEVICE_TYPES.get(tensor.device.type, -1)]
        values += [-1 if index is None else index, tensor.dim()]
        values += [s for s in sizes if s is not None] + [0] * (_MAX_DIMS - len(sizes))
    values += [len(stride), *list(stride[:3]), *([1] * (3 - len(stride))), groups, activation, pools]
    message = ctypes.create_string_buffer(1024)
    if not _check((ctypes.c_int64 * len(values))(*values), message, len(message) - 1):
        raise RuntimeError(message.value.decode())


def key_values(text: str) -> dict[str, Any]:
    """The "key=value" lines of the library's reports."""
    return dict(line.split("=", 1) for line in text.splitlines())
