"""This machine's own ceilings, measured in the run that compares with them: multiply-add rates and copy bandwidth.

``fma_gflops`` is one sample of a register-only multiply-add loop (ceiling.cpp), 2 operations each; ``copy_gbs`` counts
the bytes read plus the bytes written by a threaded memcpy of buffers too large for any cache. Callers take samples
between their own and report the median and the best.
"""

from __future__ import annotations

import ctypes
import functools
import statistics
from pathlib import Path
from typing import Any

import numpy as np

from bench.harness import settle
from bench.microkernel_table import build_config
from bench.object_cache import Unit, build

COPY_BYTES = 256 << 20


@functools.cache
def _library() -> tuple[Any, dict[tuple[str, str], int]]:
    """The native functions, and the index of each (isa, dtype) that this CPU supports, weakest first."""
    flags = [f for f in build_config().CXX_FLAGS if not f.startswith("-ffp-contract")] + ["-ffp-contract=fast"]
    source = Path(__file__).resolve().parent / "ceiling.cpp"
    lib = ctypes.CDLL(str(build("ceiling", [Unit(source, (*flags, "-fPIC"))], build_config().LINK_FLAGS)))
    for name in ("isa", "dtype"):
        getattr(lib, f"ceiling_{name}").restype = ctypes.c_char_p
    lib.ceiling_gflops.restype = lib.ceiling_copy.restype = ctypes.c_double
    lib.ceiling_gflops.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_double]
    lib.ceiling_copy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_long, ctypes.c_int]
    rates = {}
    for i in range(lib.ceiling_count()):
        if lib.ceiling_supported(i):
            rates[lib.ceiling_isa(i).decode(), lib.ceiling_dtype(i).decode()] = i
    return lib, rates


def arithmetic(dtype: str) -> str:
    """What ``dtype`` is multiplied in on this CPU: itself, or float32 where half types have no loop of their own."""
    return dtype if any(d == dtype for _, d in _library()[1]) else "float32"


def isas(dtype: str) -> list[str]:
    """Instruction sets with a multiply-add loop for ``dtype`` on this CPU, weakest first."""
    return [isa for isa, d in _library()[1] if d == arithmetic(dtype)]


def fma_gflops(isa: str, dtype: str, threads: int, seconds: float = 0.003) -> float:
    """One sample: GFLOP/s of ``threads`` threads together."""
    lib, rates = _library()
    return float(lib.ceiling_gflops(rates[isa, arithmetic(dtype)], threads, seconds))


@functools.cache
def best_isa(dtype: str, threads: int) -> str:
    """The instruction set with the highest rate here (the widest is not always the fastest)."""
    return max(isas(dtype), key=lambda isa: max(fma_gflops(isa, dtype, threads, 0.01) for _ in range(5)))


def copy_gbs(threads: int, rounds: int = 7) -> list[float]:
    """GB/s, read plus written, one per round, after one that touches the pages."""
    lib, _ = _library()
    source, target = np.ones(COPY_BYTES, np.uint8), np.empty(COPY_BYTES, np.uint8)
    rates = [lib.ceiling_copy(target.ctypes.data, source.ctypes.data, COPY_BYTES, threads) for _ in range(rounds + 1)]
    return rates[1:]


def measure(threads: int, rounds: int = 9) -> dict[str, Any]:
    """Every ceiling at 1 and at ``threads`` threads: median and best of ``rounds`` interleaved samples."""
    counts = sorted({1, threads})
    keys = [(isa, dtype, t) for isa, dtype in _library()[1] for t in counts]
    samples: dict[tuple[str, str, int], list[float]] = {key: [] for key in keys}
    for _ in range(rounds):
        for key in keys:
            settle()
            samples[key].append(fma_gflops(*key))
    summary: dict[str, Any] = {"fma_gflops": {}, "copy_gbs": {}}
    for (isa, dtype, t), values in samples.items():
        entry = {"median": statistics.median(values), "best": max(values)}
        summary["fma_gflops"].setdefault(dtype, {}).setdefault(isa, {})[str(t)] = entry
    for t in counts:
        values = copy_gbs(t)
        summary["copy_gbs"][str(t)] = {"median": statistics.median(values), "best": max(values)}
    return summary
