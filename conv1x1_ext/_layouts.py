"""Tensors that no kernel reads (sparse, MKLDNN, quantized, nested): an error that names the argument, not an operator.

Registered as kernels for those tensors, so that no other call has to ask (_registrations.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_OPERATORS = (
    "conv1x1", "conv1x1_avg_pool", "_fprop", "_fprop_packed", "_avg_pool", "_avg_pool_masked", "_pack_weight",
    "_explain", "conv1x1_backward", "conv1x1_avg_pool_backward", "_backward", "_avg_pool_backward",
)  # fmt: skip
_KEYS = (
    "MkldnnCPU", "SparseCPU", "SparseCUDA", "SparseCsrCPU", "SparseCsrCUDA", "QuantizedCPU", "QuantizedCUDA",
    "NestedTensorCPU", "NestedTensorCUDA",
)  # fmt: skip
_PRIVATE_KEYS = ("AutogradNestedTensor",)  # the public operators have their own autograd rule in front


def _refuses(name: str) -> Callable[..., Any]:
    names = [argument.name for argument in getattr(torch.ops.conv1x1_ext, name).default._schema.arguments]

    def kernel(*args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        for argument, tensor in given.items():
            if not isinstance(tensor, Tensor):
                continue
            if tensor.is_quantized:
                dtype = str(tensor.dtype).removeprefix("torch.")
                raise RuntimeError(
                    f"conv1x1: {argument}: expected dtype float32, float64, bfloat16 or float16, got {dtype}: "
                    "call dequantize() on it"
                )
            if tensor.layout != torch.strided or tensor.is_nested:
                layout = "a nested tensor" if tensor.is_nested else f"layout {tensor.layout}"
                raise RuntimeError(
                    f"conv1x1: {argument}: expected a dense tensor, got {layout}: "
                    + ("pad it" if tensor.is_nested else "call to_dense() on it")
                )
        raise RuntimeError(f"conv1x1: expected dense tensors, got {', '.join(map(str, given.values()))}")

    return kernel


def register_all(rules: torch.library.Library) -> None:
    for name in _OPERATORS:
        kernel = _refuses(name)
        for key in _KEYS + _PRIVATE_KEYS * name.startswith("_"):
            rules.impl(name, kernel, key)
