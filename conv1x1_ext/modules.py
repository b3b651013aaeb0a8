"""Modules: drop-in replacements for 1x1 ``nn.Conv{1,2,3}d`` with a fused activation, and the blocks built on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ._eager import activation_name, config_of, dynamo_compiling, fast_conv1x1, function_modes
from ._packed import PackedWeight
from .ops import conv1x1, conv1x1_avg_pool


class _Conv1x1Mixin(nn.Module):
    """What the three dimensionalities share. Comes before the nn.Conv class in the bases."""

    _conv: ClassVar[type[nn.modules.conv._ConvNd]]
    activation: str | None
    _packed: PackedWeight | None = None  # never a buffer: not in the state_dict
    # stride, groups, activation and the weight's dimensions that a config was made of, and the config.
    _configured: tuple[Any, Any, Any, int, int] = (None, None, None, 0, 0)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        activation: str | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        activation_name(activation)
        strides = (stride,) if isinstance(stride, int) else tuple(stride)
        if any(s <= 0 for s in strides):
            raise ValueError(f"{type(self).__name__}: stride: expected positive integers, got {stride!r}")
        super().__init__(  # type: ignore[call-arg]
            in_channels, out_channels, 1, stride=stride, groups=groups, bias=bias, device=device, dtype=dtype
        )
        self.activation = activation

    @classmethod
    def from_conv2d(cls, conv: nn.modules.conv._ConvNd, activation: str | None = None) -> Any:
        """The same layer with our kernels: shares ``conv``'s parameters and copies nothing.

        Args:
            conv: an ``nn.Conv2d`` (for ``Conv1x1_1d`` and ``Conv1x1_3d``: Conv1d, Conv3d) with kernel size 1 and no
                padding. Dilation does nothing to a kernel of size 1.
            activation: applied to the output, see :func:`conv1x1_ext.conv1x1`.

        Raises:
            TypeError: another kind of module.
            ValueError: another kernel size, padding, or an unknown activation.
        """
        name = f"{cls.__name__}.from_conv2d: conv"
        if not isinstance(conv, cls._conv) or isinstance(conv, nn.modules.lazy.LazyModuleMixin):
            raise TypeError(f"{name}: expected an initialised {cls._conv.__name__}, got {type(conv).__name__}")
        if any(k != 1 for k in conv.kernel_size):
            raise ValueError(f"{name}: expected kernel_size 1, got {conv.kernel_size}")
        if not isinstance(conv.padding, str) and any(p != 0 for p in conv.padding):
            raise ValueError(f"{name}: expected padding 0, got {conv.padding}")
        activation_name(activation)
        module = cls.__new__(cls)
        nn.Module.__init__(module)
        for key in (
            "in_channels", "out_channels", "kernel_size", "stride", "dilation", "transposed", "output_padding",
            "groups", "padding_mode", "_reversed_padding_repeated_twice",
        ):  # fmt: skip
            setattr(module, key, getattr(conv, key))
        module.padding = (0,) * len(conv.kernel_size)  # type: ignore[assignment]
        module.register_parameter("weight", conv.weight)  # type: ignore[arg-type]
        module.register_parameter("bias", conv.bias)  # type: ignore[arg-type]
        module.activation = activation
        return module.train(conv.training)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """``activation(conv1x1(input) + bias + residual)``; see :func:`conv1x1_ext.conv1x1`."""
        if not dynamo_compiling() and not function_modes():
            output = self._fast(input, residual)
            if output is not None:
                return output
        return conv1x1(
            input,
            self.weight,  # type: ignore[arg-type]
            self.bias,  # type: ignore[arg-type]
            self.stride,  # type: ignore[arg-type]
            groups=self.groups,  # type: ignore[arg-type]
            activation=self.activation,
            residual=residual,
        )

    def _fast(self, input: Tensor, residual: Tensor | None) -> Tensor | None:
        """A packed weight's call, or a plain one, or None where there is more to think about."""
        weight: Any
        bias: Any
        try:  # nn.Module finds them there too, but after having looked elsewhere: 0.3 us each
            parameters = self._parameters
            weight, bias = parameters["weight"], parameters["bias"]
        except KeyError:  # parametrized, pruned, ...
            weight, bias = self.weight, self.bias
        stride, groups, activation, dims, config = self._configured
        if (
            stride is not self.stride
            or groups is not self.groups
            or activation is not self.activation
            or dims != weight.dim()
        ):
            config = config_of(self.activation, self.stride, self.groups, weight)
            self._configured = (self.stride, self.groups, self.activation, weight.dim(), config)
        if not config:
            return None
        packed = self._packed
        if packed is not None:
            if packed.is_of(weight):
                output = packed.conv1x1(input, weight, bias, residual, config)
                if output is not None:
                    return output
            else:
                self._packed = None
        return fast_conv1x1(input, weight, bias, residual, config) if type(weight) is nn.Parameter else None

    def prepack(self, input: Tensor) -> Any:
        """Packs the weight once for the kernels that inputs like ``input`` run, in evaluation without gradients.

        Worth it where the weight is large and the image small: otherwise every call packs it anew. Does nothing for a
        weight of at most 1024 elements, and where the kernels read the weight as it lies: CUDA; contiguous float32, but
        for an ``input`` of so few pixels, 7x7 of one image, that they leave vectors a fifth empty. Calls with another
        layout, of another such size, or that need a gradient, work as before.

        The packed weight is dropped by ``train()``, ``.to()`` and its like, ``load_state_dict``, an optimizer's step
        and every other write that torch counts. Writes through ``weight.data`` or NumPy torch does not count: call
        ``prepack`` again after them (CONV1X1_CHECK_PACKED=1 in the environment makes a forgotten one an error).

        Args:
            input: a tensor of the layout, dtype, device and size of those to come, such as the one about to be passed.

        Returns:
            the module.

        Raises:
            RuntimeError: in training mode, for a weight that is an inference tensor, or as ``forward`` would.
        """
        if self.training:
            raise RuntimeError(
                f"{type(self).__name__}.prepack: expected a module in eval mode, got one in training mode"
            )
        packed = PackedWeight(input, self.weight, self.stride, self.groups)  # type: ignore[arg-type]
        self._packed = None if packed.empty else packed
        return self

    @property
    def prepacked(self) -> bool:
        """Is there a packed weight, of the weight as it is now?"""
        return self._packed is not None and self._packed.is_of(self.weight)  # type: ignore[arg-type]

    def train(self, mode: bool = True) -> Any:
        if mode:
            self._packed = None
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._packed = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_packed", "_configured")}

    def extra_repr(self) -> str:
        text = super().extra_repr()
        return text if self.activation is None else f"{text}, activation={self.activation!r}"

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("activation", None)


class Conv1x1(_Conv1x1Mixin, nn.Conv2d):
    """A 1x1 ``nn.Conv2d`` with fused bias, residual and activation.

    Same initialisation, ``state_dict`` keys and attributes as ``nn.Conv2d(in_channels, out_channels, 1)``; is one.

    Args:
        in_channels, out_channels, stride, groups, bias, device, dtype: as for ``nn.Conv2d``.
        activation: None, ``"relu"``, ``"relu6"``, ``"silu"``, ``"hardswish"`` or ``"gelu"``.

    Shape:
        input ``(N, C_in, H, W)`` or ``(C_in, H, W)``; output ``(N, C_out, H', W')``, ``H' = (H - 1) // stride + 1``;
        residual: the output's.

    Raises:
        ValueError: an unknown activation, groups that do not divide the channels, a stride that is not positive.
    """

    _conv = nn.Conv2d


class Conv1x1_1d(_Conv1x1Mixin, nn.Conv1d):
    """:class:`Conv1x1` over ``nn.Conv1d``: ``(N, C, L)``."""

    _conv = nn.Conv1d


class Conv1x1_3d(_Conv1x1Mixin, nn.Conv3d):
    """:class:`Conv1x1` over ``nn.Conv3d``: ``(N, C, D, H, W)``."""

    _conv = nn.Conv3d


class Conv1x1AvgPool(Conv1x1):
    """1x1 convolution, activation and global average pooling: ``(N, C_in, H, W)`` to ``(N, num_classes)``.

    The article's replacement for flatten + linear (Lin et al., Network in Network, 2013, section 3.2), without the
    ``(N, num_classes, H, W)`` tensor; see :func:`conv1x1_ext.conv1x1_avg_pool`.

    Args:
        in_channels: C_in.
        num_classes: C_out.
        groups, bias, activation, device, dtype: as for :class:`Conv1x1`; the activation is ReLU unless said otherwise.
    """

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
        super().__init__(in_channels, num_classes, 1, groups, bias, activation, device, dtype)

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
        if any(s != 1 for s in self.stride):
            raise RuntimeError(f"Conv1x1AvgPool: stride: expected 1, got {self.stride}")
        return conv1x1_avg_pool(input, self.weight, self.bias, groups=self.groups, activation=self.activation)


class MLPConv(nn.Sequential):
    """Network in Network's block: a k x k convolution and 1x1 convolutions, each followed by an activation.

    ``in_channels -(k x k)-> mlp_channels[0] -(1x1)-> ... -(1x1)-> out_channels``; the 1x1 layers are fused.

    Args:
        in_channels, out_channels: of the whole block.
        kernel_size: of the first convolution.
        mlp_channels: widths inside the block, at least one; ``(out_channels, out_channels)`` by default, which gives
            the paper's k x k and two 1x1 layers.
        stride, padding: of the first convolution, as for ``nn.Conv2d``.
        activation: after every layer; see :class:`Conv1x1`.
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
        first = nn.Conv2d(in_channels, widths[0], kernel_size, stride, padding, bias=bias, device=device, dtype=dtype)
        layers: list[nn.Module] = [first, *_activation_module(activation)]
        for before, after in zip(widths, (*widths[1:], out_channels), strict=True):
            layers.append(Conv1x1(before, after, bias=bias, activation=activation, device=device, dtype=dtype))
        super().__init__(*layers)


def _activation_module(activation: str | None) -> list[nn.Module]:
    modules = {"relu": nn.ReLU, "relu6": nn.ReLU6, "silu": nn.SiLU, "hardswish": nn.Hardswish, "gelu": nn.GELU}
    activation_name(activation)
    return [] if activation is None else [modules[activation]()]
