"""A weight in the kernels' own order, kept between calls: what ``prepack`` makes of a layer's weight."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from . import _eager

_pack = torch.ops.conv1x1_ext._pack_weight.default
_fprop = _eager.direct(torch.ops.conv1x1_ext._fprop_packed.default)


_SMALL = 1024  # elements that are packed sooner than it is found out whether they are stale


class PackedWeight:
    """A weight as the kernels read it, made once, for calls that need no gradient.

    Args:
        input: decides, by its layout, dtype, device and size, for which kernels. Its values are not read.
        weight, stride, groups: as for :func:`conv1x1`.
        owner: the layer's class, for messages.
        packs: False checks the arguments and packs nothing.

    It knows every write that torch counts, another tensor and another place in memory: such a call raises. It cannot
    know of the other writes, which ``Conv1x1.prepack`` lists; with CONV1X1_CHECK_PACKED=1 in the environment it keeps a
    copy and compares at every call.

    Raises:
        RuntimeError: as :func:`conv1x1`; for inference tensors, whose writes torch does not count; in autocast regions.
        TypeError: for a weight that is no Parameter.
    """

    def __init__(self, input: Tensor, weight: Any, stride: Any, groups: Any, owner: str, packs: bool = True) -> None:
        self._owner = owner
        refuse_autocast(owner)
        if type(weight) is not nn.Parameter:
            raise TypeError(
                f"{owner}.prepack: weight: expected a plain Parameter of the layer, got {type(weight).__name__}: "
                "where a parametrization or pruning makes the weight, remove it first and keep its result"
            )
        if weight.is_inference():
            raise RuntimeError(
                f"{owner}.prepack: weight: expected a tensor that counts its writes, got an inference tensor (made "
                "under torch.inference_mode()): a stale packed weight could not be told from a fresh one"
            )
        # The panels do not depend on the stride, but that a large one leaves few pixels.
        config = _eager.config_of(None, stride, groups, weight) or _eager.config_of(None, 1, groups, weight)
        with torch.no_grad():
            self.panels: Tensor = _pack(input, weight, config)
        if weight.numel() <= _SMALL or not packs:
            self.panels = self.panels[:0]
        # Do the kernels read this weight as it lies, or is it too small to be worth it?
        self.empty = self.panels.numel() == 0
        self._weight, self._version, self._address = weight, weight._version, weight.data_ptr()
        # Kept, so that no other weight can come to lie at its address.
        self._storage = weight.untyped_storage()
        checks = os.environ.get("CONV1X1_CHECK_PACKED", "0") != "0" and not self.empty
        self._copy = weight.detach().clone() if checks else None

    def is_of(self, weight: Any) -> bool:
        """Is it of this very weight, and has torch counted no write since?"""
        return weight is self._weight and weight._version == self._version and weight.data_ptr() == self._address

    def check(self, weight: Any) -> None:
        """Raises:
        RuntimeError: where the panels are not of the weight as it is.
        """
        if self.empty:
            return
        if not self.is_of(weight):
            if weight is not self._weight:
                change = "is another tensor than the one that was prepacked"
            elif weight._version != self._version:
                change = "was written after it was prepacked"
            else:
                change = "lies elsewhere in memory than when it was prepacked"
        elif self._copy is None or torch.equal(weight, self._copy):
            return
        else:
            change = "was written after it was prepacked, in a way that torch does not count"
        raise RuntimeError(f"{self._owner}: weight: it {change}: call unpack(), or prepack() again")

    def refuse_gradients(self, *tensors: Any) -> None:
        """Raises:
        RuntimeError: where a gradient would be needed.
        """
        if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in tensors):
            raise RuntimeError(
                f"{self._owner}: the layer is prepacked, for inference without gradients: call it under "
                "torch.no_grad() or torch.inference_mode(), or unpack() it first"
            )

    def conv1x1(
        self, input: Tensor, weight: Any, bias: Tensor | None, residual: Tensor | None, config: int
    ) -> Tensor | None:
        """:func:`conv1x1` by the panels, or None where a transform or autocast needs more than a plain call.

        Raises:
            RuntimeError: for a weight that changed, and where a gradient would be needed.
        """
        if _eager.compiling():  # after an error Dynamo runs the layer's own frame as it is, and traces this one
            return None
        if (  # is_of, written out
            weight is not self._weight
            or weight._version != self._version
            or weight.data_ptr() != self._address
            or self._copy is not None
        ):
            self.check(weight)
        if not _eager.unobstructed(input, bias, residual) or type(weight) is not nn.Parameter:
            return None
        if _eager.needs_grad(input, weight, bias, residual):
            self.refuse_gradients(input, weight, bias, residual)
        if self.empty:
            return _eager.plain_conv1x1(input, weight, bias, residual, config)
        output: Tensor = _fprop(input, weight, self.panels, bias, residual, config)
        return output


def refuse_autocast(owner: str) -> None:
    """Raises:
    RuntimeError: in an autocast region.
    """
    if _eager.autocasting():
        raise RuntimeError(
            f"{owner}.prepack: the layer is called in an autocast region, where its weight is cast at every call: "
            "convert the model instead, such as by model.to(torch.bfloat16)"
        )
