"""Integers and sizes as nn.Conv2d takes them: one reading and one wording for functions and layers."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def integer(name: str, value: Any, owner: str = "conv1x1") -> int:
    """``value`` as an int: Python's and NumPy's integers, 0-d integer tensors; a SymInt stays one.

    Raises:
        TypeError: for anything else. A bool is no integer here: it is an argument in the wrong place.
    """
    found: int | None = _integer(value)
    if found is None:
        raise TypeError(f"{owner}: {name}: expected an integer, got {value!r}")
    return found


def integers(name: str, value: Any, owner: str = "conv1x1") -> tuple[int, ...]:
    """One integer, or a sequence of them, as a tuple.

    Raises:
        TypeError: for anything else, as :func:`integer`.
    """
    if type(value) is tuple or type(value) is list:  # what nearly every call has
        for item in value:
            if type(item) is not int:
                break
        else:
            return tuple(value)
    items = value if isinstance(value, Sequence) and not isinstance(value, str | bytes) else (value,)
    found = tuple(_integer(item) for item in items)
    if any(item is None for item in found):
        raise TypeError(f"{owner}: {name}: expected an integer or a sequence of integers, got {value!r}")
    return found


def _integer(value: Any) -> Any:
    if type(value) is int or isinstance(value, torch.SymInt):
        return value
    if isinstance(value, bool) or (isinstance(value, Tensor) and (value.dim() != 0 or value.dtype == torch.bool)):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def stride_tuple(stride: Any) -> tuple[int, ...]:
    """One stride, or one per spatial dimension.

    Raises:
        TypeError: for anything else than integers.
    """
    return integers("stride", stride)


def sizes(owner: str, name: str, value: Any, spatial: int) -> tuple[int, ...]:
    """A size for each of ``spatial`` dimensions, given as one integer, a sequence of one, or a sequence of all.

    Raises:
        TypeError: for anything else than integers.
        ValueError: for another number of them.
    """
    found = integers(name, value, owner)
    if len(found) not in (1, spatial):
        count = "1 integer" if spatial == 1 else f"1 or {spatial} integers"
        raise ValueError(f"{owner}: {name}: expected {count}, got {value!r}")
    return found * spatial if len(found) == 1 else found


def positive(owner: str, name: str, value: Any, spatial: int) -> tuple[int, ...]:
    """:func:`sizes` of at least 1.

    Raises:
        TypeError, ValueError: as :func:`sizes`, and for 0 and less.
    """
    found = sizes(owner, name, value, spatial)
    if any(size <= 0 for size in found):
        raise ValueError(f"{owner}: {name}: expected positive integers, got {value!r}")
    return found


def kernel_of_one(owner: str, value: Any, spatial: int) -> tuple[int, ...]:
    """Raises:
    TypeError, ValueError: for a kernel size other than 1.
    """
    found = sizes(owner, "kernel_size", value, spatial)
    if any(size != 1 for size in found):
        raise ValueError(f"{owner}: kernel_size: expected 1, got {value!r}")
    return found


def no_padding(owner: str, value: Any, spatial: int, stride: tuple[int, ...]) -> str | tuple[int, ...]:
    """``value`` where it means no padding: zeros, ``"valid"``, and ``"same"``, which a kernel of size 1 has anyway.

    Raises:
        TypeError, ValueError: for any other; for ``"same"`` with a stride, which nn.Conv2d refuses too.
    """
    if isinstance(value, str):
        if value not in ("valid", "same"):
            raise ValueError(f"{owner}: padding: expected 0, 'valid' or 'same', got {value!r}")
        if value == "same" and any(s != 1 for s in stride):
            raise ValueError(f"{owner}: padding: 'same' is not supported with a stride, got stride {stride}")
        return value
    found = sizes(owner, "padding", value, spatial)
    if any(size != 0 for size in found):
        raise ValueError(f"{owner}: padding: expected 0, 'valid' or 'same', got {value!r}")
    return found


def layer_arguments(
    owner: str,
    spatial: int,
    in_channels: Any,
    out_channels: Any,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: Any,
    bias: Any,
    padding_mode: Any,
) -> tuple[Any, ...]:
    """The positional arguments of nn.ConvNd, checked as those of a 1x1 layer.

    Raises:
        TypeError, ValueError: the message names ``owner`` and the argument. What nn.ConvNd checks is left to it.
    """
    strides = positive(owner, "stride", stride, spatial)
    return (
        integer("in_channels", in_channels, owner),
        integer("out_channels", out_channels, owner),
        kernel_of_one(owner, kernel_size, spatial),
        strides,
        no_padding(owner, padding, spatial, strides),
        positive(owner, "dilation", dilation, spatial),
        integer("groups", groups, owner),
        bias,
        padding_mode,
    )


def check_edited(layer: Any, spatial: int) -> None:
    """What a layer's call does not pass on, and an edit may have changed: its padding and dilation.

    Raises:
        TypeError, ValueError: for padding, or what nn.Conv2d would refuse.
    """
    owner = type(layer).__name__
    no_padding(owner, layer.padding, spatial, positive(owner, "stride", layer.stride, spatial))
    positive(owner, "dilation", layer.dilation, spatial)
