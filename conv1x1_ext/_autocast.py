"""Casts of an autocast region: a parameter's once in a region, as torch's own convolutions share one."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ._eager import PLAIN, compiling, transformed


class _SeeCast(TorchDispatchMode):
    """Keeps a weak reference to what a cast gives."""

    cast: Any = None

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default:
            self.cast = weakref.ref(result, _forget)
        return result


# torch keeps the casts of a region in a cache that Python cannot read, and drops them where the outermost region ends.
# So does this one: in each region torch is made to cast and keep a tensor of ours, which lives as long as the region.
_casts: dict[tuple[int, torch.dtype], tuple[Tensor, int, Tensor]] = {}
_tokens: dict[str, Any] = {}  # by device type: that tensor, weakly
_probes: dict[str, Tensor] = {}  # and what it is a cast of


_WORTH_IT = 1 << 14  # elements: fewer are cast sooner than a region is begun, which takes 50 us


def _forget(token: Any) -> None:
    _casts.clear()


def _begin(device: str) -> bool:
    """Is there a cache in this region? The first call in a region starts it."""
    token = _tokens.get(device)
    if token is not None and token() is not None:
        return True
    _casts.clear()
    if device == "cuda" and torch.cuda.is_current_stream_capturing():
        return False  # a tensor made here would be the graph's
    with torch.inference_mode(False), torch.no_grad():
        if device not in _probes:
            _probes[device] = torch.ones(1, 1, device=device, dtype=torch.float32).requires_grad_()
        with _SeeCast() as seen:
            torch.mm(_probes[device], _probes[device])
    _tokens[device] = seen.cast
    return seen.cast is not None and seen.cast() is not None


def cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """``t.to(dtype)``, differentiably, and the same tensor each time in a region, of what torch's cache takes:
    float32 leaves that need a gradient, if it is not small. A write that torch counts makes another."""
    if (
        compiling()
        or t.numel() < _WORTH_IT
        or not t.requires_grad
        or not t.is_leaf
        or t.dtype != torch.float32
        or type(t) not in PLAIN
        or t._is_view()
        or not torch.is_autocast_cache_enabled()
        or transformed()
        or not _begin(t.device.type)
    ):
        return t.to(dtype)
    key = (id(t), dtype)
    kept = _casts.get(key)
    if kept is not None and kept[1] == t._version:
        return kept[2]
    with torch.inference_mode(False), torch.enable_grad():
        result = t.to(dtype)
    _casts[key] = (t, t._version, result)
    return result
