"""Public operators under torch.func transforms.

``torch.library.register_autograd`` makes an autograd function that torch.func's grad refuses, so below a transform each
operator goes through one of our own: same setup, same backward, same vmap rule.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_functions: dict[Any, Any] = {}


def call(op: Any, *args: Any) -> Any:
    """``op(*args)``, under whatever torch.func transforms are active."""
    top = None if torch.compiler.is_compiling() else torch._C._functorch.peek_interpreter_stack()
    if top is None or top.key() == torch._C._functorch.TransformType.Functionalize:  # which takes no autograd functions
        return op(*args)
    return _functions[op].apply(*args)


def register(op: Any, setup: Callable[..., None], backward: Callable[..., Any], vmap: Callable[..., Any]) -> None:
    """Gives ``op`` its autograd function; ``vmap(info, in_dims, *args)`` as torch.library.register_vmap takes it."""

    def forward(*args: Any) -> Any:
        return call(op, *args)  # one transform further down

    attributes = {
        "forward": staticmethod(forward),
        "setup_context": staticmethod(setup),
        "backward": staticmethod(backward),
        "vmap": staticmethod(vmap),
    }
    _functions[op] = type(f"{op._opname}_function", (torch.autograd.Function,), attributes)
