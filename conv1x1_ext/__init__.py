"""Fused 1x1 convolution + bias + residual + activation for PyTorch, forward and backward, as one GEMM."""

from . import _library as _library  # loads the operators; the rest builds on them
from ._prepack import prepack, unpack
from .modules import (
    Conv1x1,
    Conv1x1_1d,
    Conv1x1_3d,
    Conv1x1Act,
    Conv1x1Act_1d,
    Conv1x1Act_3d,
    Conv1x1AvgPool,
    MLPConv,
)
from .ops import build_info, conv1x1, conv1x1_avg_pool, explain

from . import _registrations as _registrations  # isort: skip  (needs ops)

__version__ = "0.1.0"
__all__ = [
    "Conv1x1",
    "Conv1x1Act",
    "Conv1x1Act_1d",
    "Conv1x1Act_3d",
    "Conv1x1AvgPool",
    "Conv1x1_1d",
    "Conv1x1_3d",
    "MLPConv",
    "build_info",
    "conv1x1",
    "conv1x1_avg_pool",
    "explain",
    "prepack",
    "unpack",
]
