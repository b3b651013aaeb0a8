"""Modules: 1x1 nn.Conv{1,2,3}d with our kernels, the same with a fused activation, and the blocks built on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ._arguments import integer, layer_arguments, positive
from ._conversion import activation_module, stock_convolution, take
from ._eager import activation_name, compiling, function_modes
from ._layer import Layer
from .ops import conv1x1_avg_pool

_Sizes = int | Sequence[int]


class _Linear(Layer):
    """Without an activation. Comes before the nn.Conv class in the bases."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _Sizes = 1,
        stride: _Sizes = 1,
        padding: _Sizes | str = 0,
        dilation: _Sizes = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        **other: Any,
    ) -> None:
        name = type(self).__name__
        if "activation" in other:
            raise TypeError(f"{name}: it has no activation, as nn.{self._stock.__name__}: use {self._with_activation}")
        if other:
            raise TypeError(f"{name}: unexpected arguments: {', '.join(other)}")
        arguments = layer_arguments(
            name, self._spatial, in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode,
        )  # fmt: skip
        super().__init__(*arguments, device=device, dtype=dtype)

    _with_activation: str

    def _check(self) -> None:
        super()._check()
        if self.activation is not None:
            raise TypeError(
                f"{type(self).__name__}: it has no activation: use {self._with_activation}, got {self.activation!r}"
            )

    @classmethod
    def from_conv2d(cls, conv: nn.modules.conv._ConvNd, activation: None = None) -> Any:
        """The same layer with our kernels. It has the Parameters of ``conv`` themselves, nothing is copied.

        So dtype, device, ``requires_grad`` and gradients are shared; so is, at first, training or evaluation mode and
        every attribute that was set on ``conv``. What cannot come along is refused.

        Args:
            conv: an ``nn.Conv2d`` (for ``Conv1x1_1d`` and ``Conv1x1_3d``: Conv1d, Conv3d) with kernel size 1 and no
                padding. Dilation does nothing to a kernel of size 1.

        Raises:
            TypeError: another kind of module; an ``activation``, which :class:`Conv1x1Act` takes.
            ValueError: another kernel size; padding; or what would be lost, by name: methods of a subclass (its
                forward, ...), parametrizations, pruning, fake quantisers, hooks, buffers, modules inside ``conv``.
        """
        if activation is not None:
            raise TypeError(
                f"{cls.__name__}.from_conv2d: it has no activation: use {cls._with_activation}.from_conv2d, "
                f"got {activation!r}"
            )
        return cls._convert(conv)

    def to_conv2d(self) -> Any:
        """The stock layer: an ``nn.Conv2d`` (Conv1d, Conv3d) with the same Parameters, mode and attributes.

        Raises:
            ValueError: for what cannot be kept, as ``from_conv2d``, and for a prepacked layer.
        """
        self._check()
        return stock_convolution(self, self._stock)

    def __setstate__(self, state: dict[str, Any]) -> None:
        activation = state.get("activation")
        if activation is not None:
            raise RuntimeError(
                f"{type(self).__name__}: the pickle is of a version whose {type(self).__name__} had an activation, "
                f"{activation!r}: load its state_dict into {self._with_activation}(..., activation={activation!r})"
            )
        super().__setstate__({key: value for key, value in state.items() if key != "activation"})


class Conv1x1(_Linear, nn.Conv2d):
    """A 1x1 ``nn.Conv2d`` with our kernels and, in its call, a fused residual.

    Same signature, initialisation, ``state_dict`` keys and attributes as ``nn.Conv2d(in_channels, out_channels, 1)``;
    is one. Code that rebuilds, merges or fuses convolutions by ``isinstance`` does so rightly.

    Args:
        in_channels, out_channels, stride, groups, bias, device, dtype: as for ``nn.Conv2d``. Integers may be NumPy's.
        kernel_size: 1.
        padding: 0, ``"valid"`` or ``"same"``, all of which mean none.
        dilation, padding_mode: as for ``nn.Conv2d``; a kernel of size 1 without padding has no use for them.

    Shape:
        input ``(N, C_in, H, W)`` or ``(C_in, H, W)``; output ``(N, C_out, H', W')``, ``H' = (H - 1) // stride + 1``;
        residual: the output's.

    Attributes may be edited later: the next call heeds them, or raises.

    Raises:
        ValueError: another kernel size, padding, groups that do not divide the channels, a stride that is not positive.
        TypeError: no integer where one belongs, bools included; an ``activation``: see :class:`Conv1x1Act`.
    """

    _stock, _spatial, _with_activation = nn.Conv2d, 2, "Conv1x1Act"


class Conv1x1_1d(_Linear, nn.Conv1d):
    """:class:`Conv1x1` over ``nn.Conv1d``: ``(N, C, L)``."""

    _stock, _spatial, _with_activation = nn.Conv1d, 1, "Conv1x1Act_1d"


class Conv1x1_3d(_Linear, nn.Conv3d):
    """:class:`Conv1x1` over ``nn.Conv3d``: ``(N, C, D, H, W)``."""

    _stock, _spatial, _with_activation = nn.Conv3d, 3, "Conv1x1Act_3d"


class _Activated(Layer):
    """With an activation. No nn.Conv class: what goes by isinstance would take it for linear."""

    def _fill(self, arguments: tuple[Any, ...], activation: str | None, device: Any, dtype: torch.dtype | None) -> None:
        activation_name(activation)
        take(self, self._stock(*arguments, device=device, dtype=dtype), self._stock)  # type: ignore[misc]
        self.activation = activation

    @classmethod
    def _from(cls, conv: nn.modules.conv._ConvNd, activation: str | None) -> Any:
        activation_name(activation)
        layer = cls._convert(conv)
        layer.activation = activation
        return layer

    def reset_parameters(self) -> None:
        """Draws weight and bias anew, as ``nn.Conv2d`` does."""
        self._stock.reset_parameters(self)  # type: ignore[arg-type]

    def _stock_layers(self) -> list[nn.Module]:
        activation_name(self.activation)
        layers = [] if self.activation is None else [activation_module(self.activation).train(self.training)]
        return [stock_convolution(self, self._stock), *layers]

    def extra_repr(self) -> str:
        return f"{self._stock.extra_repr(self)}, activation={self.activation!r}"  # type: ignore[arg-type]


class _Fused(_Activated):
    """With the signature and the call of a convolution."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _Sizes = 1,
        stride: _Sizes = 1,
        padding: _Sizes | str = 0,
        dilation: _Sizes = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | None,
    ) -> None:
        super().__init__()
        arguments = layer_arguments(
            type(self).__name__, self._spatial, in_channels, out_channels, kernel_size, stride, padding, dilation,
            groups, bias, padding_mode,
        )  # fmt: skip
        self._fill(arguments, activation, device, dtype)

    @classmethod
    def from_conv2d(cls, conv: nn.modules.conv._ConvNd, activation: str | None) -> Any:
        """``conv`` and the activation behind it as one layer, with the Parameters of ``conv`` themselves.

        Args:
            conv: an ``nn.Conv2d`` or :class:`Conv1x1` (for ``_1d`` and ``_3d``: theirs).
            activation: see :class:`Conv1x1Act`.

        Raises:
            TypeError, ValueError: as ``Conv1x1.from_conv2d``, which also says what is shared; an unknown activation.
        """
        return cls._from(conv, activation)

    def to_conv2d(self) -> nn.Sequential:
        """The same function by stock layers: ``nn.Sequential`` of the convolution and the activation's module.

        The convolution has the same Parameters; its keys in the ``state_dict`` become ``0.weight`` and ``0.bias``.
        ``to_conv2d()[0]`` is the convolution alone, without the activation.

        Raises:
            ValueError: as ``Conv1x1.to_conv2d``.
        """
        return nn.Sequential(*self._stock_layers()).train(self.training)


class Conv1x1Act(_Fused):
    """A 1x1 convolution with fused bias, residual and activation.

    Parameters, their initialisation and the ``state_dict`` keys are those of :class:`Conv1x1` and ``nn.Conv2d``. But it
    is no ``nn.Conv2d``: tools that go by ``isinstance`` (weight initialisation, quantization, LoRA, folding of
    BatchNorm) pass it by, where they would lose or misplace the activation.

    Args:
        in_channels, ..., dtype: as for :class:`Conv1x1`.
        activation: ``"relu"``, ``"relu6"``, ``"silu"``, ``"hardswish"``, ``"gelu"`` (exact, by erf) or None.

    Shape:
        as for :class:`Conv1x1`.

    Raises:
        ValueError, TypeError: an unknown activation, or as :class:`Conv1x1`.
    """

    _stock, _spatial = nn.Conv2d, 2


class Conv1x1Act_1d(_Fused):
    """:class:`Conv1x1Act` over ``nn.Conv1d``: ``(N, C, L)``."""

    _stock, _spatial = nn.Conv1d, 1


class Conv1x1Act_3d(_Fused):
    """:class:`Conv1x1Act` over ``nn.Conv3d``: ``(N, C, D, H, W)``."""

    _stock, _spatial = nn.Conv3d, 3


class Conv1x1AvgPool(_Activated):
    """1x1 convolution, activation and global average pooling: ``(N, C_in, H, W)`` to ``(N, num_classes)``.

    The article's replacement for flatten + linear (Lin et al., Network in Network, 2013, section 3.2), without the
    ``(N, num_classes, H, W)`` tensor; see :func:`conv1x1_ext.conv1x1_avg_pool`. The ``state_dict`` is that of an
    ``nn.Conv2d``; the layer is none. ``prepack`` freezes it like the others, but there is nothing to pack:
    ``prepacked`` stays False.

    Args:
        in_channels: C_in.
        num_classes: C_out.
        groups, bias, activation, device, dtype: as for :class:`Conv1x1Act`; ReLU unless said otherwise.

    Raises:
        ValueError, TypeError: as :class:`Conv1x1Act`.
    """

    _stock, _spatial, _packs = nn.Conv2d, 2, False

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        groups: int = 1,
        bias: bool = True,
        activation: str | None = "relu",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name, channels = type(self).__name__, integer("num_classes", num_classes, type(self).__name__)
        self._fill(
            layer_arguments(name, 2, in_channels, channels, 1, 1, 0, 1, groups, bias, "zeros"),
            activation,
            device,
            dtype,
        )

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
        """``activation(conv1x1(input) + bias).mean((-2, -1))``; see :func:`conv1x1_ext.conv1x1_avg_pool`."""
        if compiling() or function_modes():  # _configured would be a guard that eager calls break; or be seen
            self._check()
        else:
            stride, padding, dilation, *_ = self._configured
            if stride is not self.stride or padding is not self.padding or dilation is not self.dilation:
                self._configure(self.weight)  # type: ignore[arg-type]
        weight: Any
        bias: Any
        try:  # as in Layer.forward
            weight, bias = self._parameters["weight"], self._parameters["bias"]
        except KeyError:
            weight, bias = self.weight, self.bias
        if self._packed is not None:
            self._packed.refuse_gradients(input, weight, bias)
        return conv1x1_avg_pool(input, weight, bias, groups=self.groups, activation=self.activation)  # type: ignore[arg-type]

    def _check(self) -> None:
        super()._check()
        if any(s != 1 for s in positive("Conv1x1AvgPool", "stride", self.stride, 2)):
            raise ValueError(f"{type(self).__name__}: stride: expected 1, got {self.stride}")

    @classmethod
    def from_conv2d(cls, conv: nn.modules.conv._ConvNd, activation: str | None = "relu") -> Any:
        """``conv``, the activation and the pooling behind it as one layer, with the Parameters of ``conv`` themselves.

        Args:
            conv: an ``nn.Conv2d`` or :class:`Conv1x1` with stride 1.
            activation: ReLU unless said otherwise, as in the constructor.

        Raises:
            TypeError, ValueError: as ``Conv1x1Act.from_conv2d``; a stride.
        """
        layer = cls._from(conv, activation)
        layer._check()
        return layer

    def to_conv2d(self) -> nn.Sequential:
        """The same function by stock layers: convolution, activation, ``AdaptiveAvgPool2d(1)`` and ``Flatten``.

        Raises:
            ValueError: as ``Conv1x1.to_conv2d``.
        """
        return nn.Sequential(*self._stock_layers(), nn.AdaptiveAvgPool2d(1), nn.Flatten(-3)).train(self.training)


class MLPConv(nn.Sequential):
    """Network in Network's block: a k x k convolution and 1x1 convolutions, each followed by an activation.

    ``in_channels -(k x k)-> mlp_channels[0] -(1x1)-> ... -(1x1)-> out_channels``; the 1x1 layers and
    their activations are fused (:class:`Conv1x1Act`, which is no ``nn.Conv2d``).

    Args:
        in_channels, out_channels: of the whole block.
        kernel_size: of the first convolution.
        mlp_channels: widths inside the block, at least one; ``(out_channels, out_channels)`` by default, which gives
            the paper's k x k and two 1x1 layers.
        stride, padding: of the first convolution, as for ``nn.Conv2d``.
        activation: after every layer; see :class:`Conv1x1Act`. With None the 1x1 layers are :class:`Conv1x1`.
        bias, device, dtype: of every layer.

    Raises:
        ValueError: empty ``mlp_channels``, or as ``nn.Conv2d`` and :class:`Conv1x1`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        mlp_channels: Sequence[int] | None = None,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        activation: str | None = "relu",
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        widths = (out_channels, out_channels) if mlp_channels is None else tuple(mlp_channels)
        if not widths:
            raise ValueError("MLPConv: mlp_channels: expected at least one width, got ()")
        activation_name(activation)
        first = nn.Conv2d(in_channels, widths[0], kernel_size, stride, padding, bias=bias, device=device, dtype=dtype)
        layers: list[nn.Module] = [first]
        if activation is not None:
            layers.append(activation_module(activation))
        for before, after in zip(widths, (*widths[1:], out_channels), strict=True):
            if activation is None:
                layers.append(Conv1x1(before, after, bias=bias, device=device, dtype=dtype))
            else:
                layers.append(Conv1x1Act(before, after, bias=bias, device=device, dtype=dtype, activation=activation))
        super().__init__(*layers)
