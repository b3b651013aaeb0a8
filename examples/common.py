"""What both examples need: checks that survive ``python -O``, errors, fair timing, and the machine's name."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

import conv1x1_ext


def make_console() -> Console:
    """The terminal, or 110 columns where the output goes into a file."""
    terminal = Console(highlight=False)
    return terminal if terminal.is_terminal else Console(highlight=False, width=110)


def check(condition: bool, claim: str) -> None:
    """Ends the example with a failing status unless the claim holds."""
    if not condition:
        raise SystemExit(f"FAILED: {claim}")


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Relative Frobenius error, computed in float64."""
    actual, expected = actual.detach().double(), expected.detach().double()
    error: float = ((actual - expected).norm() / expected.norm().clamp_min(1e-300)).item()
    return error


def check_close(actual: Tensor, expected: Tensor, claim: str, tolerance: float = 1e-5) -> float:
    """Checks shapes and the relative Frobenius error; returns the error."""
    check(actual.shape == expected.shape, f"{claim}: shape {tuple(actual.shape)} is not {tuple(expected.shape)}")
    error = relative_error(actual, expected)
    check(error <= tolerance, f"{claim}: relative error {error:.2e} exceeds {tolerance:.0e}")
    return error


def median_times(functions: Sequence[Callable[[], object]], seconds: float = 1.0) -> list[float]:
    """Median seconds per call of each function.

    The functions take turns in short bursts of calls, so a slow moment of the machine falls on all of them alike.

    Args:
        functions: what to time, with no arguments.
        seconds: about how long the whole measurement takes.
    """
    bursts = []
    for function in functions:
        for _ in range(3):
            function()
        start = time.perf_counter()
        function()
        bursts.append(max(1, int(1e-3 / max(time.perf_counter() - start, 1e-7))))  # a burst lasts about 1 ms
    samples: list[list[float]] = [[] for _ in functions]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(samples[0]) < 5:
        for function, calls, times in zip(functions, bursts, samples, strict=True):
            start = time.perf_counter()
            for _ in range(calls):
                function()
            times.append((time.perf_counter() - start) / calls)
    return [statistics.median(times) for times in samples]


def machine() -> str:
    """CPU, instruction set, threads and torch in one line."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    isa = conv1x1_ext.build_info()["isa"]
    return f"{name}, kernels for {isa}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def duration(seconds: float) -> str:
    """A duration in the unit that suits it."""
    for limit, scale, unit in ((1e-3, 1e6, "us"), (1.0, 1e3, "ms")):
        if seconds < limit:
            return f"{seconds * scale:.1f} {unit}"
    return f"{seconds:.2f} s"
