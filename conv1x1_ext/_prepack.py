"""The freeze of a whole model: ``prepack`` and ``unpack``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ._layer import Layer
from ._packed import refuse_autocast


def prepack(model: nn.Module, example: Any, **kwargs: Any) -> Any:
    """Freezes a model for inference: packs the weights of its layers of conv1x1_ext, each for the input it gets.

    Runs the model once, without gradients, to see those inputs; of a layer that is called more than once, the one with
    most elements counts. Layers that the run does not reach stay as they are. Buffers are as before, also where the run
    writes them. What a frozen layer refuses, and the writes to a weight that nothing can see, is told at
    :meth:`conv1x1_ext.Conv1x1.prepack`. :func:`unpack` undoes it; ``prepack`` again packs the weights as they are then.

    Compiled graphs read the weights themselves, so a model that only runs compiled gains nothing.

    Args:
        model: in eval mode.
        example: the model's input: ``model(example, **kwargs)``, or ``model(*example, **kwargs)`` for a tuple.

    Returns:
        the model.

    Raises:
        RuntimeError: for a model with a module in training mode; where a layer is called in an autocast region. Then,
            and where the model raises, no layer has changed.
        ValueError: where the run reaches no layer of conv1x1_ext.
        TypeError: for a weight that a parametrization or pruning makes.
    """
    layers = {layer: name for name, layer in model.named_modules() if isinstance(layer, Layer)}
    for name, module in model.named_modules():
        if module.training:
            place = f"its module {name!r}" if name else "it"
            raise RuntimeError(
                f"prepack: model: expected eval mode, but {place} is in training mode: call model.eval()"
            )
    before = {layer: layer._packed for layer in layers}
    done = False
    try:
        for layer in layers:  # the run needs none of them, and a stale one would raise
            layer.unpack()
        with torch.no_grad(), _uncompiled(), _recorded(layers) as inputs, _buffers_kept(model):
            model(*(example if isinstance(example, tuple) else (example,)), **kwargs)
        if not inputs:
            raise ValueError("prepack: model: the example reaches no layer of conv1x1_ext: convert them by from_conv2d")
        packed = {}
        for layer, (shape, stride, dtype, device) in inputs.items():
            with _named(layers[layer]):
                # Of the input's layout, because its values are not read, and were not kept.
                packed[layer] = layer._pack(torch.empty_strided(shape, stride, dtype=dtype, device=device))
        for layer, weight in packed.items():
            layer._packed = weight
        done = True
    finally:
        if not done:
            for layer, known in before.items():
                layer._packed = known
    return model


def unpack(model: nn.Module) -> Any:
    """Undoes :func:`prepack`, and ``prepack`` of single layers, in a whole model.

    Returns:
        the model.
    """
    for module in model.modules():
        if isinstance(module, Layer):
            module.unpack()
    return model


def _uncompiled() -> AbstractContextManager[Any]:
    """Runs compiled modules as they were written: their graphs would pass the hooks by."""
    compiles = "torch._dynamo" in sys.modules  # which takes seconds to load
    return torch.compiler.set_stance("force_eager") if compiles else nullcontext()


@contextmanager
def _recorded(layers: dict[Layer, str]) -> Iterator[dict[Layer, tuple[Any, ...]]]:
    """Shape, strides, dtype and device of the layers' inputs while the model runs."""
    inputs: dict[Layer, tuple[Any, ...]] = {}

    def record(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        input = args[0] if args else kwargs.get("input")
        with _named(layers[layer]):
            refuse_autocast(type(layer).__name__)
        if not isinstance(input, Tensor):
            return  # the layer's own error comes next
        known = inputs.get(layer)
        if known is None or input.numel() > known[0].numel():
            inputs[layer] = (input.shape, input.stride(), input.dtype, input.device)

    handles = [layer.register_forward_pre_hook(record, with_kwargs=True) for layer in layers]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    kept = [
        (module, name, buffer, buffer.clone(), 0 if buffer.is_inference() else buffer._version)
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        for module, name, buffer, copy, version in kept:
            module._buffers[name] = buffer
            if buffer.is_inference() or buffer._version != version:
                buffer.copy_(copy)


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Says of which layer an error is."""
    try:
        yield
    except (RuntimeError, TypeError, ValueError) as error:
        raise type(error)(f"{error} (layer {name!r} of the model)" if name else str(error)) from None
