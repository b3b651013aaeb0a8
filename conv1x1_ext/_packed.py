"""A weight in the kernels' own order, kept between calls: what ``Conv1x1.prepack`` makes."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from . import _eager

_pack = torch.ops.conv1x1_ext._pack_weight.default
_fprop = _eager.direct(torch.ops.conv1x1_ext._fprop_packed.default)


_SMALL = 1024  # elements that are packed sooner than it is found out whether they are stale


class PackedWeight:
    """A weight as the kernels read it, made once, for calls that need no gradient.

    Args:
        input: decides, by its layout, dtype, device and size, for which kernels.
        weight, stride, groups: as for :func:`conv1x1`.

    It knows every write that torch counts (in place, an optimizer's, ``load_state_dict``), another tensor and moved
    storage. It cannot know of writes through ``weight.data`` or NumPy; with CONV1X1_CHECK_PACKED=1 in the environment
    it keeps a copy and compares at every call.

    Raises:
        RuntimeError: as :func:`conv1x1`, and for inference tensors, whose writes torch does not count.
    """

    def __init__(self, input: Tensor, weight: Tensor, stride: int | tuple[int, ...], groups: int) -> None:
        if weight.is_inference():
            raise RuntimeError(
                "prepack: weight: expected a tensor that counts its writes, got an inference tensor (made under "
                "torch.inference_mode()): a stale packed weight could not be told from a fresh one"
            )
        spatial = weight.dim() - 2
        config = _eager.make_config(None, stride, groups, spatial) or _eager.make_config(None, 1, groups, spatial)
        with torch.no_grad():
            self.panels: Tensor = _pack(input, weight, config)
        if weight.numel() <= _SMALL:
            self.panels = self.panels[:0]
        self._weight, self._version, self._address = weight, weight._version, weight.data_ptr()
        self._copy = weight.detach().clone() if os.environ.get("CONV1X1_CHECK_PACKED", "0") != "0" else None

    @property
    def empty(self) -> bool:
        """Do the kernels read this weight as it lies, or is it too small to be worth it?"""
        return self.panels.numel() == 0

    def is_of(self, weight: Tensor) -> bool:
        """Was it made of this very weight, unchanged since?

        Raises:
            RuntimeError: with CONV1X1_CHECK_PACKED=1, where the weight was written behind torch's back.
        """
        same = weight is self._weight and weight._version == self._version and weight.data_ptr() == self._address
        if same and self._copy is not None and not torch.equal(weight, self._copy):
            raise RuntimeError(
                "prepack: weight: it was written through .data or NumPy, which torch does not count: call prepack again"
            )
        return same

    def conv1x1(
        self, input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, config: int
    ) -> Tensor | None:
        """:func:`conv1x1` by the panels, or None where a gradient or a transform needs more than a plain call."""
        if not _eager.unobstructed(input, bias, residual) or _eager.needs_grad(input, weight, bias, residual):
            return None
        output: Tensor = _fprop(input, weight, self.panels, bias, residual, config)
        return output
