"""How the operator benchmark measures on CUDA: cold inputs by rotation, eager calls and CUDA graphs, ceilings.

Method. Every candidate gets the same copies of each layer's tensors, together twice the L2 cache (at most 512 copies),
and a sample runs it once on each, between two CUDA events: so inputs come from memory, and the events' own cost is
shared by many calls. "eager" issues the calls from Python, launch costs included; "graph" replays the same calls
captured into one CUDA graph: what the kernels alone cost. Rounds are interleaved (A B C A B C ...), and reported are
the medians over the rounds of the microseconds per call.
"""

from __future__ import annotations

import math
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from bench.harness import Layer

# "tf32" is float32 in memory, with TF32 allowed for convolutions and matrix products.
DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_COPIES = 512
Call = Callable[[], Any]


class Timer(Protocol):
    """One sample in microseconds per call."""

    def eager(self, calls: Sequence[Call]) -> float: ...
    def capture(self, calls: Sequence[Call]) -> Any: ...
    def graph(self, captured: Any, count: int) -> float: ...


class CudaTimer:
    """By events on the current stream."""

    def _microseconds(self, run: Callable[[], None]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e3

    def eager(self, calls: Sequence[Call]) -> float:
        def run() -> None:
            for call in calls:
                call()

        return self._microseconds(run) / len(calls)

    def capture(self, calls: Sequence[Call]) -> Any:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries make their handles and workspaces before the capture
            for call in calls[:2]:
                call()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        return graph

    def graph(self, captured: Any, count: int) -> float:
        return self._microseconds(captured.replay) / count


def copies_for(tensor_bytes: int, l2_bytes: int) -> int:
    """How many copies of a layer's tensors together exceed twice the L2 cache: 2 to MAX_COPIES."""
    return min(MAX_COPIES, max(2, math.ceil(2 * l2_bytes / max(tensor_bytes, 1))))


def floor_us(layer: Layer, dtype: str, train: bool, tflops: float, copy_gbs: float) -> float:
    """The least time: operations at the matmul's rate, or the least bytes at the copy's, whichever is longer.

    A training step's least is three times the forward's, of both: x, w and y; then dy, y (the mask) and w, dx written;
    then x, dw written (dy counts once).
    """
    times = 3 if train else 1
    arithmetic = times * layer.flops / (tflops * 1e6)
    traffic = times * layer.bytes(DTYPES[dtype].itemsize) / (copy_gbs * 1e3)
    return max(arithmetic, traffic)


def sample(
    timer: Timer, calls: dict[str, list[Call]], rounds: int, deadline: float = math.inf
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Interleaved rounds, at least 3; ends early, between rounds, when time.monotonic() passes ``deadline``.

    Returns:
        Per candidate median_us, best_us, worst_us and graph_us (absent where it cannot be captured), and the reasons of
        the failed captures.
    """
    graphs: dict[str, Any] = {}
    reasons: dict[str, str] = {}
    for key, own in calls.items():
        for call in own[:3]:
            call()
        try:
            graphs[key] = timer.capture(own)
        except RuntimeError as error:
            reasons[key] = f"no CUDA graph: {str(error).splitlines()[0]}"
    eager: dict[str, list[float]] = {key: [] for key in calls}
    replayed: dict[str, list[float]] = {key: [] for key in graphs}
    for done in range(rounds + 1):
        if done > 3 and time.monotonic() > deadline:
            break
        for key, own in calls.items():
            eager[key].append(timer.eager(own))
            if key in graphs:
                replayed[key].append(timer.graph(graphs[key], len(own)))
    stats = {}
    for key, values in eager.items():
        rest = values[1:]  # the first round warms up
        stats[key] = {
            "median_us": round(statistics.median(rest), 3), "best_us": round(min(rest), 3),
            "worst_us": round(max(rest), 3), "rounds": len(rest), "inner": len(calls[key]),
        }  # fmt: skip
        if key in replayed:
            stats[key]["graph_us"] = round(statistics.median(replayed[key][1:]), 3)
    return stats, reasons


def allow_tf32(allowed: bool) -> None:
    """For convolutions (ours too) and matrix products."""
    torch.backends.cudnn.allow_tf32 = allowed
    torch.backends.cuda.matmul.allow_tf32 = allowed


def ceilings(
    timer: Timer, dtypes: Sequence[str], device: str = "cuda", size: int = 8192, copy_bytes: int = 1 << 30
) -> dict[str, Any]:
    """matmul_tflops of each dtype (``size`` cubed) and copy_gbs, read plus written; medians of 7 samples."""

    def median_us(call: Call, inner: int) -> float:
        return statistics.median([timer.eager([call] * inner) for _ in range(8)][1:])

    def matmul(dtype: str) -> float:
        allow_tf32(dtype == "tf32")
        a, b = (torch.randn(size, size, device=device).to(DTYPES[dtype]) for _ in range(2))
        out = torch.empty_like(a)
        return 2 * size**3 / median_us(lambda: torch.matmul(a, b, out=out), 3) * 1e-6

    source = torch.zeros(copy_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_us = median_us(lambda: target.copy_(source), 4)
    return {
        "copy_gbs": _four_digits(2 * copy_bytes / copy_us * 1e-3),
        "matmul_tflops": {dtype: _four_digits(matmul(dtype)) for dtype in dtypes},
    }


def _four_digits(value: float) -> float:
    return float(f"{value:.4g}")


def gpu() -> dict[str, Any]:
    """The device, its driver and the libraries that the peers call."""
    properties = torch.cuda.get_device_properties(0)
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        driver = f"unknown: {type(error).__name__}"
    return {
        "name": properties.name, "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count, "memory_gib": round(properties.total_memory / 2**30, 1),
        "l2_mib": round(properties.L2_cache_size / 2**20, 1), "driver": driver, "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }  # fmt: skip
