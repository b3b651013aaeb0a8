"""What all our layers share: the call, the freeze of a prepacked weight, and the conversion from and to nn.ConvNd."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from . import _conversion
from ._arguments import check_edited
from ._eager import config_of, dynamo_compiling, function_modes, plain_conv1x1, unobstructed
from ._packed import PackedWeight
from .ops import conv1x1

_ANEW = object()  # equal to no attribute: what could change in place is read at every call


class Layer(nn.Module):
    """A 1x1 convolution with the attributes, parameters and ``state_dict`` keys of its stock class.

    A layer is in one of two states. At first it is like any other. ``prepack`` freezes it: the weight is kept in the
    kernels' own order, and what could make that stale is refused until ``unpack``.
    """

    _stock: ClassVar[type[_conversion.Conv]]
    _spatial: ClassVar[int]
    activation: str | None = None
    _packs: ClassVar[bool] = True  # is there a kernel for packed weights?
    _packed: PackedWeight | None = None  # never a buffer: not in the state_dict
    # The config of the last call, after what it was made of: stride, padding, dilation, groups, activation, dimensions.
    _configured: tuple[Any, Any, Any, Any, Any, int, int] = (_ANEW, None, None, None, None, 0, 0)

    # ---- the call -------------------------------------------------------------------------------------------------

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """``activation(conv1x1(input) + bias + residual)``; see :func:`conv1x1_ext.conv1x1`."""
        if not dynamo_compiling() and not function_modes():
            weight: Any
            bias: Any
            try:  # nn.Module finds them there too, but after having looked elsewhere: 0.3 us each
                parameters = self._parameters
                weight, bias = parameters["weight"], parameters["bias"]
            except KeyError:  # parametrized, pruned, ...
                weight, bias = self.weight, self.bias
            stride, padding, dilation, groups, activation, dims, config = self._configured
            if (
                stride is not self.stride
                or groups is not self.groups
                or padding is not self.padding
                or dilation is not self.dilation
                or activation is not self.activation
                or dims != weight.dim()
            ):
                config = self._configure(weight)
            if config:
                if self._packed is not None:
                    output = self._packed.conv1x1(input, weight, bias, residual, config)
                    if output is not None:
                        return output
                elif type(weight) is nn.Parameter and unobstructed(input, bias, residual):
                    return plain_conv1x1(input, weight, bias, residual, config)
        else:
            self._check()
        if self._packed is not None:
            self._packed.refuse_gradients(input, self.weight, self.bias, residual)
        return conv1x1(
            input,
            self.weight,  # type: ignore[arg-type]
            self.bias,  # type: ignore[arg-type]
            self.stride,  # type: ignore[arg-type]
            groups=self.groups,  # type: ignore[arg-type]
            activation=self.activation,
            residual=residual,
        )

    def _check(self) -> None:
        """Raises:
        TypeError, ValueError: where an edit gave the layer what its call would not heed.
        """
        check_edited(self, self._spatial)

    def _configure(self, weight: Tensor) -> int:
        """The private operators' config of the attributes as they are, or 0 where there is more to think about."""
        self._check()
        config = config_of(self.activation, self.stride, self.groups, weight)
        kept = [value if _fixed(value) else _ANEW for value in (self.stride, self.padding, self.dilation, self.groups)]
        self._configured = (*kept, self.activation, weight.dim(), config)  # type: ignore[assignment]
        return config

    def __prepare_scriptable__(self) -> Any:
        raise RuntimeError(
            f"{type(self).__name__}: torch.jit.script cannot compile this layer: use torch.compile, torch.export or "
            "torch.jit.trace, or script to_conv2d()"
        )

    # ---- the freeze -----------------------------------------------------------------------------------------------

    def prepack(self, input: Tensor) -> Any:
        """Freezes the layer for inference: packs its weight once for the kernels that inputs like ``input`` run.

        Worth it where the weight is large and the image small: otherwise every call packs it anew. Nothing is packed
        for a weight of at most 1024 elements, and where the kernels read the weight as it lies: CUDA; average pooling;
        contiguous float32, but for an ``input`` of so few pixels, 7x7 of one image, that they leave vectors a fifth
        empty. Inputs of another layout or of another such size are right too, without the packed weight. For a whole
        model see :func:`conv1x1_ext.prepack`.

        A frozen layer refuses, naming :meth:`unpack`: calls that need a gradient, ``train()``, ``load_state_dict``, and
        ``.to()`` and its like where they change or move a parameter. At each call that could use the packed weight, one
        that torch knows to have changed raises: it was written in place, is another tensor, or lies elsewhere in
        memory. ``prepack`` again packs the weight as it is then. Copies and pickles of a frozen layer are not frozen.

        **What nothing can see**, and gives results of the old weight: writes through ``weight.data`` (such as a merge
        of LoRA), NumPy, DLPack or shared memory; optimizers with ``fused=True`` and
        collectives (``broadcast``, ``all_reduce``) on a tensor that shares the weight's memory; kernels of other
        libraries. ``unpack`` before such a write. With CONV1X1_CHECK_PACKED=1 in the environment a copy of the weight
        is kept and compared at every call, which then raises.

        Args:
            input: a tensor of the layout, dtype, device and size of those to come. Its values are not read.

        Returns:
            the layer.

        Raises:
            RuntimeError: in training mode, in an autocast region, for a weight that is an inference tensor, or as
                ``forward`` would.
            TypeError: for a weight that a parametrization or pruning makes.
        """
        self._packed = self._pack(input)
        return self

    def _pack(self, input: Tensor) -> PackedWeight:
        name = type(self).__name__
        if self.training:
            raise RuntimeError(
                f"{name}.prepack: expected a module in eval mode, got one in training mode: call eval() first"
            )
        self._check()
        return PackedWeight(input, self.weight, self.stride, self.groups, name, self._packs)

    def unpack(self) -> Any:
        """Undoes :meth:`prepack`: drops the packed weight; the layer trains, loads and converts again.

        Returns:
            the layer.
        """
        self._packed = None
        return self

    @property
    def frozen(self) -> bool:
        """Is the layer prepacked, whether or not there was something to pack?"""
        return self._packed is not None

    @property
    def prepacked(self) -> bool:
        """Is there a packed weight, of the weight as it is now?"""
        return self._packed is not None and not self._packed.empty and self._packed.is_of(self.weight)

    def _refuse(self, what: str) -> RuntimeError:
        return RuntimeError(f"{type(self).__name__}: {what}: the layer is prepacked, for inference: unpack() it first")

    def train(self, mode: bool = True) -> Any:
        if mode and self._packed is not None:
            raise self._refuse("train()")
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        if self._packed is not None:
            for name, parameter in self._parameters.items():
                if parameter is None:
                    continue
                with torch.no_grad():
                    result = fn(parameter)
                if result.dtype != parameter.dtype or result.device != parameter.device:
                    raise self._refuse(f"{name}: conversion to {result.dtype} on {result.device}")
                if result.data_ptr() != parameter.data_ptr() or result.stride() != parameter.stride():
                    raise self._refuse(f"{name}: a move to other memory or strides")
        return super()._apply(fn, recurse)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing: Any,
        unexpected: Any,
        errors: Any,
    ) -> None:
        given = [prefix + name for name in self._parameters if prefix + name in state_dict]
        if self._packed is not None and given:  # as torch reports all that does not load, after loading the rest
            errors.append(str(self._refuse(f"{', '.join(given)}: load_state_dict")))
            return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_packed", "_configured")}

    # ---- conversion -----------------------------------------------------------------------------------------------

    @classmethod
    def _convert(cls, conv: Any) -> Any:
        """A layer with all that ``conv`` has."""
        where, name = f"{cls.__name__}.from_conv2d: conv", cls._stock.__name__
        if isinstance(conv, Layer) and not isinstance(conv, cls._stock):
            raise TypeError(
                f"{where}: expected an initialised {name}, got {type(conv).__name__}, whose activation cannot be kept: "
                "convert the first layer of what its to_conv2d() returns"
            )
        if not isinstance(conv, cls._stock) or isinstance(conv, nn.modules.lazy.LazyModuleMixin):
            raise TypeError(f"{where}: expected an initialised {name}, got {type(conv).__name__}")
        if isinstance(conv, Layer):
            conv._check()
        _conversion.refuse_losses(conv, cls._stock, cls, where)
        _conversion.refuse_other_convolutions(conv, cls._spatial, where)
        return _conversion.take(_conversion.empty(cls), conv, cls._stock)


def _fixed(value: Any) -> bool:
    return type(value) in (int, str) or (type(value) is tuple and all(type(item) is int for item in value))
