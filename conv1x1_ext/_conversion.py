"""From nn.ConvNd to our layers and back: everything that a layer holds comes along, or the conversion is refused."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

from torch import nn

from ._arguments import check_edited

Conv = nn.modules.conv._ConvNd

# What nn.ConvNd.__init__ sets.
ATTRIBUTES = (
    "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "transposed", "output_padding",
    "groups", "padding_mode", "_reversed_padding_repeated_twice",
)  # fmt: skip
_OURS = ("activation", "_packed", "_configured")  # set by modules.py
_HOOKS = (
    "_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks", "_state_dict_hooks",
    "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip
# A subclass may define these and still be the same function with the same state.
_HARMLESS = {
    "__init__", "reset_parameters", "extra_repr", "__constants__", "__module__", "__qualname__", "__doc__",
    "__annotations__", "__annotate__", "__annotate_func__", "__annotations_cache__", "__parameters__",
    "__orig_bases__", "__firstlineno__", "__static_attributes__", "__dict__", "__weakref__",
}  # fmt: skip


@cache
def _standard(stock: Any) -> frozenset[str]:
    return frozenset(vars(stock(1, 1, 1, device="meta")))


def _extras(conv: nn.Module, stock: Any) -> list[str]:
    """Attributes that somebody gave this very layer."""
    ours = () if type(conv) is stock else _OURS
    return [key for key in vars(conv) if key not in _standard(stock) and key not in ours]


def _lost(conv: nn.Module, stock: type[Conv], kind: type[nn.Module]) -> Iterator[str]:
    """What a ``kind`` made of ``conv`` would not have, in words."""
    if nn.utils.parametrize.is_parametrized(conv):
        yield f"the parametrization of {', '.join(conv.parametrizations)}"  # type: ignore[arg-type]
        return
    for base in type(conv).__mro__:
        if base in (stock, nn.Module):
            break
        if not base.__module__.startswith("conv1x1_ext."):
            defined = sorted(vars(base).keys() - _HARMLESS)
            if defined:
                yield f"{', '.join(defined)} of {base.__module__}.{base.__qualname__}"
    for hooks in _HOOKS:
        if getattr(conv, hooks):
            yield f"its {hooks.strip('_').replace('_', ' ')}"
    parameters = sorted(conv._parameters)
    if parameters != ["bias", "weight"] or conv._parameters["weight"] is None:
        yield f"parameters {', '.join(parameters)} in place of weight and bias"
    if conv._buffers:
        yield f"the buffers {', '.join(conv._buffers)}"
    if conv._modules:
        yield f"the modules {', '.join(conv._modules)} inside it"
    overridden = [key for key in _extras(conv, stock) if hasattr(stock, key) or hasattr(kind, key)]
    if overridden:
        yield f"{', '.join(overridden)}, set on the layer itself"
    if getattr(conv, "_packed", None) is not None:
        yield "its prepacked weight (call unpack() first)"


def refuse_losses(conv: nn.Module, stock: type[Conv], kind: type[nn.Module], where: str) -> None:
    """Raises:
    ValueError: where ``conv`` holds what a conversion to ``kind`` would leave behind; the message names all of it.
    """
    lost = list(_lost(conv, stock, kind))
    if lost:
        raise ValueError(f"{where}: cannot keep {'; '.join(lost)}")


def refuse_other_convolutions(conv: Conv, spatial: int, where: str) -> None:
    """Raises:
    ValueError, TypeError: where ``conv`` is no 1x1 convolution without padding.
    """
    if any(k != 1 for k in conv.kernel_size) or any(k != 1 for k in conv.weight.shape[2:]):
        shape = "" if any(k != 1 for k in conv.kernel_size) else f" and a weight of shape {list(conv.weight.shape)}"
        raise ValueError(f"{where}: expected kernel_size 1, got {conv.kernel_size}{shape}")
    if not isinstance(conv.padding, str) and any(p != 0 for p in conv.padding):
        raise ValueError(f"{where}: expected padding 0, got {conv.padding}")
    check_edited(conv, spatial)


def take(layer: nn.Module, conv: nn.Module, stock: type[Conv]) -> Any:
    """Gives an empty ``layer`` what ``conv`` has: attributes, the Parameters themselves, training or evaluation."""
    for key in (*ATTRIBUTES, *_extras(conv, stock)):
        setattr(layer, key, getattr(conv, key))
    layer.register_parameter("weight", conv._parameters["weight"])
    layer.register_parameter("bias", conv._parameters["bias"])
    return layer.train(conv.training)


def empty(kind: type[nn.Module]) -> Any:
    """A module of this kind with nothing in it yet."""
    module = kind.__new__(kind)
    nn.Module.__init__(module)
    return module


def activation_module(activation: str) -> nn.Module:
    """torch's module by our name for it."""
    modules: dict[str, type[nn.Module]] = {
        "relu": nn.ReLU, "relu6": nn.ReLU6, "silu": nn.SiLU, "hardswish": nn.Hardswish, "gelu": nn.GELU,
    }  # fmt: skip
    return modules[activation]()


def stock_convolution(layer: nn.Module, stock: type[Conv]) -> Any:
    """The stock convolution of a layer's parameters, without its activation.

    Raises:
        ValueError: for what cannot be kept.
    """
    refuse_losses(layer, stock, stock, f"{type(layer).__name__}.to_conv2d")
    check_edited(layer, layer.weight.dim() - 2)  # type: ignore[union-attr, operator]
    return take(empty(stock), layer, stock)
