"""vmap rules of the operators: one call for the whole batch, of more images or of more groups.

They serve torch.vmap and torch.func (key FuncTorchBatched), and batched gradients (key Batched), which are an older
vmap of torch: ``is_grads_batched``, ``torch.autograd.functional.jacobian(vectorize=True)``, ``gradcheck``. The backward
of an eager call meets those in the private operators.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._eager import decode_config

_ops = torch.ops.conv1x1_ext
Dims = tuple[Any, ...]


# By reshape and transpose, of all views those that the older vmap knows.


def _joined(t: Tensor, dim: int) -> Tensor:
    shape = t.shape
    return t.reshape([*shape[:dim], shape[dim] * shape[dim + 1], *shape[dim + 2 :]])


def _parted(t: Tensor, dim: int, size: int) -> Tensor:
    shape = t.shape
    return t.reshape([*shape[:dim], size, shape[dim] // size, *shape[dim + 1 :]])


class _Batch:
    """The arguments of a batch of ``size`` calls, and how they fit into one call."""

    def __init__(self, size: int, input: Tensor, input_dim: int | None, weight: Tensor, weight_dim: int | None) -> None:
        self.size = size
        self.spatial = weight.dim() - 2 - (weight_dim is not None)
        dims = input.dim() - (input_dim is not None)
        self.unbatched = dims == self.spatial + 1  # an example of the vmap is an image without a batch of its own

    def first(self, t: Tensor, dim: int | None) -> Tensor:
        """With the vmapped dimension in front, whether it has it or not."""
        output: Tensor = t.expand(self.size, *t.shape) if dim is None else t.movedim(dim, 0)
        return output

    # As more images: (B, N, C, ...) to (B * N, C, ...). The weight is shared.

    def images(self, t: Tensor | None, dim: int | None) -> Tensor | None:
        if t is None:
            return None
        t = self.first(t, dim)
        return t if self.unbatched else _joined(t, 0)

    def from_images(self, t: Tensor) -> Tensor:
        return t if self.unbatched else _parted(t, 0, self.size)

    # As more groups: (B, N, C, ...) to (N, B * C, ...). Each has weights of its own.

    def groups(self, t: Tensor | None, dim: int | None) -> Tensor | None:
        if t is None:
            return None
        t = self.first(t, dim)
        return _joined(t, 0) if self.unbatched else _joined(t.transpose(0, 1), 1)

    def from_groups(self, t: Tensor) -> Tensor:
        return _parted(t, 0, self.size) if self.unbatched else _parted(t, 1, self.size).transpose(0, 1)

    def rows(self, t: Tensor | None, dim: int | None) -> Tensor | None:
        """Weights or biases, of all groups one after the other."""
        return None if t is None else _joined(self.first(t, dim), 0)

    def from_rows(self, t: Tensor) -> Tensor:
        return _parted(t, 0, self.size)


def _unread(t: Tensor, dim: int | None, size: int) -> Tensor:
    """In place of ``size`` copies of a tensor of which the operator reads the shape alone."""
    shape = list(t.shape)
    if dim is not None:
        shape.pop(dim)
    return t.new_empty([size * shape[0], *shape[1:]])


def _conv1x1(size: int, dims: Dims, *args: Any) -> tuple[Any, Any]:
    input, weight, bias, residual, stride, groups, *rest = args
    at_input, at_weight, at_bias, at_residual = dims[:4]
    b, op = _Batch(size, input, at_input, weight, at_weight), _ops.conv1x1.default
    if at_weight is None and at_bias is None:
        x, r = b.images(input, at_input), b.images(residual, at_residual)
        return b.from_images(op(x, weight, bias, r, stride, groups, *rest)), 0
    w, c, r = b.rows(weight, at_weight), b.rows(bias, at_bias), b.groups(residual, at_residual)
    if at_input is None and groups == 1:  # all weights read the same images
        return b.from_groups(op(input, w, c, r, stride, 1, *rest)), 0
    return b.from_groups(op(b.groups(input, at_input), w, c, r, stride, groups * size, *rest)), 0


def _conv1x1_backward(size: int, dims: Dims, *args: Any) -> tuple[Any, Any]:
    grad, input, weight, output, stride, groups, activation, tf32, *need = args
    at_grad, at_input, at_weight, at_output = dims[:4]
    need_input, need_weight, need_bias, need_residual = need
    b, op, plain = _Batch(size, input, at_input, weight, at_weight), _ops.conv1x1_backward.default, (activation, tf32)
    dx = dw = dbias = dz = None
    shares_weight = at_weight is None and (need_input or need_residual)
    if shares_weight:
        # Neither reads the input; its strides say how dx is to lie.
        x = b.images(input, at_input)
        g, y = b.images(grad, at_grad), b.images(output, at_output)
        dx, _, _, dz = op(g, x, weight, y, stride, groups, *plain, need_input, False, False, need_residual)
        dx, dz = (None if t is None else b.from_images(t) for t in (dx, dz))
        need_input = need_residual = False
    if need_input or need_weight or need_bias or need_residual:
        w = b.rows(weight, at_weight) if need_input else _unread(weight, at_weight, size)
        g, y = b.groups(grad, at_grad), b.groups(output, at_output)
        shared = at_input is None and groups == 1 and not need_input
        x, n = (input, 1) if shared else (b.groups(input, at_input), groups * size)
        grads = op(g, x, w, y, stride, n, *plain, need_input, need_weight, need_bias, need_residual)
        dx = dx if grads[0] is None else b.from_groups(grads[0])
        dw, dbias = (None if t is None else b.from_rows(t) for t in grads[1:3])
        dz = dz if grads[3] is None else b.from_groups(grads[3])
    return _in_front((dx, dw, dbias, dz))


def _avg_pool(size: int, dims: Dims, *args: Any) -> tuple[Any, Any]:
    input, weight, bias, groups, *rest = args
    at_input, at_weight, at_bias = dims[:3]
    b, op = _Batch(size, input, at_input, weight, at_weight), _ops.conv1x1_avg_pool.default
    if at_weight is None and at_bias is None:
        return b.from_images(op(b.images(input, at_input), weight, bias, groups, *rest)), 0
    w, c = b.rows(weight, at_weight), b.rows(bias, at_bias)
    x, n = (input, 1) if at_input is None and groups == 1 else (b.groups(input, at_input), groups * size)
    return b.from_groups(op(x, w, c, n, *rest)), 0


def _avg_pool_backward(size: int, dims: Dims, *args: Any) -> tuple[Any, Any]:
    grad, input, weight, bias, groups, activation, tf32, need_input, need_weight, need_bias = args
    at_grad, at_input, at_weight, at_bias = dims[:4]
    b, op = _Batch(size, input, at_input, weight, at_weight), _ops.conv1x1_avg_pool_backward.default
    if at_weight is None and at_bias is None and not need_weight and not need_bias:
        x, g = b.images(input, at_input), b.images(grad, at_grad)
        dx, _, _ = op(g, x, weight, bias, groups, activation, tf32, need_input, False, False)
        return _in_front((None if dx is None else b.from_images(dx), None, None))
    shared = at_input is None and groups == 1 and not need_input
    x, n = (input, 1) if shared else (b.groups(input, at_input), groups * size)
    w, c = b.rows(weight, at_weight), b.rows(bias, at_bias)
    grads = op(b.groups(grad, at_grad), x, w, c, n, activation, tf32, need_input, need_weight, need_bias)
    dx = None if grads[0] is None else b.from_groups(grads[0])
    return _in_front((dx, *(None if t is None else b.from_rows(t) for t in grads[1:])))


def _backward_private(size: int, dims: Dims, *args: Any) -> tuple[Any, Any]:
    grad, input, weight, output, config, wanted = args
    need = [bool(wanted >> i & 1) for i in range(4)]
    plain = decode_config(config, weight if dims[2] is None else weight.select(dims[2], 0))
    return _conv1x1_backward(size, dims, grad, input, weight, output, *plain, *need)


def _avg_pool_backward_private(size: int, dims: Dims, *args: Any) -> tuple[Any, Any]:
    grad, input, weight, bias, _, config, wanted = args
    need = [bool(wanted >> i & 1) for i in range(3)]
    _, *plain = decode_config(config, weight if dims[2] is None else weight.select(dims[2], 0))
    return _avg_pool_backward(size, dims, grad, input, weight, bias, *plain, *need)


def _in_front(results: tuple[Tensor | None, ...]) -> tuple[Any, Any]:
    return results, tuple(None if t is None else 0 for t in results)


# ---- the two kinds of vmap ------------------------------------------------------------------------------------------

_Rule = Callable[..., tuple[Any, Any]]


def _examples_error(op: Any, rule: _Rule) -> _Rule:
    """``rule``, whose errors are those of the first example: of the shapes that the caller knows."""

    def checked(size: int, dims: Dims, *args: Any) -> tuple[Any, Any]:
        try:
            return rule(size, dims, *args)
        except (RuntimeError, IndexError):
            op(*(a.select(d, 0) if isinstance(d, int) else a for a, d in zip(args, dims, strict=True)))
            raise

    return checked


def _batched_gradients_kernel(op: Any, rule: _Rule) -> Callable[..., Any]:
    is_batched = torch._C._functorch.is_legacy_batchedtensor

    def kernel(*args: Any) -> Any:
        level, size = torch._C._vmapmode_increment_nesting() - 1, 1
        torch._C._vmapmode_decrement_nesting()
        batched = {i: a for i, a in enumerate(args) if isinstance(a, Tensor) and is_batched(a)}
        values, dims = list(args), [None] * len(args)
        while level and not any(d == 0 for d in dims):  # from the innermost level on, until an argument has it
            for i, t in batched.items():
                # To a tensor without this level torch gives a dimension of the size that is asked for.
                one, two = (torch._remove_batch_dim(t, level, size, 0) for size in (1, 2))
                if one.size(0) == two.size(0):
                    values[i], dims[i], size = one, 0, one.size(0)  # type: ignore[call-overload]
            level -= 1
        level += 1
        results, _ = rule(size, tuple(dims), *values)

        def batch(t: Tensor | None) -> Any:
            # Contiguous, as forward mode takes tangents only with the batch in front in memory, too.
            return None if t is None else torch._add_batch_dim(t.contiguous(), 0, level)

        return batch(results) if isinstance(results, Tensor) else tuple(map(batch, results))

    return kernel


def register_all(library: Any) -> None:
    """Gives the operators their rules; ``library`` keeps them."""
    rules: dict[str, _Rule] = {
        "conv1x1": _conv1x1,
        "conv1x1_backward": _conv1x1_backward,
        "conv1x1_avg_pool": _avg_pool,
        "conv1x1_avg_pool_backward": _avg_pool_backward,
        "_backward": _backward_private,
        "_avg_pool_backward": _avg_pool_backward_private,
    }
    for name, rule in rules.items():
        op = getattr(_ops, name).default
        rule = _examples_error(op, rule)

        def vmap(info: Any, dims: Dims, *args: Any, rule: _Rule = rule) -> tuple[Any, Any]:
            return rule(info.batch_size, dims, *args)

        torch.library.register_vmap(f"conv1x1_ext::{name}", vmap, lib=library)
        library.impl(name, _batched_gradients_kernel(op, rule), "Batched")
