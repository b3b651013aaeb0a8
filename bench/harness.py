"""How every benchmark here measures: layers, interleaved rounds, statistics, and what machine it was.

Method. Each round takes one sample of every candidate, in an order drawn anew, so that a drift of the machine's clock
and whatever a candidate leaves behind (threads that the scheduler has moved, above all) meet all alike. A sample
waits until the process's other threads have stopped spinning, makes untimed calls for 10 ms (which wake the cores,
their clocks and matrix units and the threads, and leave caches as this candidate leaves them), then times ``inner``
calls, chosen so that a sample lasts about 10 ms and at least one call. Reported are the median and the best over the
rounds of the microseconds per call; ratios are ratios of medians, unless the best is asked for (on a machine with
other work). Unless ``--fresh-pages`` is given, malloc keeps what is freed, so that no candidate's result lies on
fresh pages.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.metadata
import math
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bench import csv_results

SHAPES = Path(__file__).resolve().parent / "shapes"
NETS = ("seed", "resnet50", "mobilenet_v2", "squeezenet", "googlenet", "nin", "shufflenet")
DTYPES = {
    "float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16,
}  # fmt: skip
SAMPLE_SECONDS, WARM_SECONDS = 0.01, 0.01


@dataclass(frozen=True)
class Layer:
    """A 1x1 convolution layer: the input's sizes, the output's channels, the stride, and groups of channels."""

    n: int
    c_in: int
    c_out: int
    h: int
    w: int
    stride: int = 1
    groups: int = 1

    @property
    def pixels(self) -> int:
        """Of the output, all images together."""
        return self.n * ((self.h - 1) // self.stride + 1) * ((self.w - 1) // self.stride + 1)

    @property
    def weights(self) -> int:
        return self.c_in // self.groups * self.c_out

    @property
    def flops(self) -> int:
        """Of the forward; dgrad and wgrad have as many each."""
        return 2 * self.pixels * self.weights

    def bytes(self, item_size: int) -> int:
        """What the forward cannot avoid moving: the pixels of x that are read, the weight and y, once each."""
        return item_size * (self.pixels * (self.c_in + self.c_out) + self.weights)

    def __str__(self) -> str:
        stride = f" /{self.stride}" if self.stride != 1 else ""
        groups = f" g{self.groups}" if self.groups != 1 else ""
        return f"{self.n}x {self.c_in}->{self.c_out} {self.h}x{self.w}{stride}{groups}"


def load_shapes(nets: Sequence[str], batches: Sequence[int]) -> dict[Layer, list[str]]:
    """The distinct layers of bench/shapes/*.txt at each batch size, with the networks that have them."""
    layers: dict[Layer, list[str]] = {}
    for batch in batches:
        for net in nets:
            for line in (SHAPES / f"{net}.txt").read_text().splitlines():
                text = line.split("#")[0].split()
                if text:
                    n, *rest = map(int, text)
                    layers.setdefault(Layer(n * batch, *rest), []).append(net)
    return layers


@dataclass(frozen=True)
class Stats:
    """Microseconds per call over the rounds; ``inner`` calls were timed together."""

    median_us: float
    best_us: float
    worst_us: float
    rounds: int
    inner: int

    def as_dict(self) -> dict[str, Any]:
        return {k: round(v, 3) if isinstance(v, float) else v for k, v in asdict(self).items()}


def settle(limit: float = 0.1) -> None:
    """Sleeps until no thread of this process runs: thread pools go on spinning for 1-30 ms after their last work."""
    end = time.perf_counter() + limit
    quiet = 0
    while quiet < 2 and time.perf_counter() < end:
        before = time.process_time()
        time.sleep(0.0005)
        quiet = quiet + 1 if time.process_time() - before < 0.0002 else 0


def _seconds(call: Callable[[], Any], count: int) -> float:
    begin = time.perf_counter_ns()
    for _ in range(count):
        call()
    return (time.perf_counter_ns() - begin) * 1e-9


def interleave(
    calls: dict[str, Callable[[], Any]],
    rounds: int,
    sample: Callable[[], None] | None = None,
    budget: float = math.inf,
) -> dict[str, Stats]:
    """Times every callable as the module says.

    Args:
        calls: by name.
        rounds: as many samples of each; fewer, but at least 3, where ``budget`` seconds are over before.
        sample: called once a round: a ceiling's own sample.
        budget: in seconds, for all rounds together.
    """
    deadline = time.perf_counter() + budget
    inner, warm = {}, {}
    for name, call in calls.items():
        _seconds(call, 2)
        once = max(min(_seconds(call, 1) for _ in range(3)), 1e-7)
        inner[name] = max(1, math.ceil(SAMPLE_SECONDS / once))
        warm[name] = max(1, math.ceil(WARM_SECONDS / once))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order = random.Random(0)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for done in range(rounds):
            if done >= 3 and time.perf_counter() > deadline:
                break
            if sample is not None:
                settle()
                sample()
            for name in order.sample(list(calls), len(calls)):
                settle()
                _seconds(calls[name], warm[name])
                samples[name].append(_seconds(calls[name], inner[name]) / inner[name] * 1e6)
    finally:
        if collecting:
            gc.enable()
    return {name: Stats(statistics.median(s), min(s), max(s), len(s), inner[name]) for name, s in samples.items()}


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values))) if values else math.nan


_FLAGS = ("fma", "avx2", "avx512f", "avx512_bf16", "avx512_fp16", "avx512_vnni", "amx_tile", "amx_bf16", "asimd", "sve")


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def machine() -> dict[str, Any]:
    """Processor, the instruction sets that matter, cores this process may use, caches. No names of hosts or users."""
    cpuinfo = _read(Path("/proc/cpuinfo"))

    def field(name: str) -> str:
        found = re.search(rf"^{name}\s*:\s*(.*)$", cpuinfo, re.MULTILINE)
        return found[1].strip() if found else ""

    caches = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        kind = {"Data": "d", "Instruction": "i"}.get(_read(index / "type"), "")
        caches[f"L{_read(index / 'level')}{kind}"] = _read(index / "size")
    flags = set((field("flags") or field("Features")).split())
    family = "-".join(field(n) for n in ("cpu family", "model", "stepping"))
    return {
        "cpu": field("model name") or platform.machine(),
        "family-model-stepping": family,
        "flags": [f for f in _FLAGS if f in flags],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "caches": caches,
        "system": f"{platform.system()} {platform.machine()}",
    }


_KEEPS_PAGES = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "4000000000"}


def keep_pages() -> None:
    """Begin this command anew with a malloc (glibc's) that keeps what is freed, where it is not so already.

    A result on fresh pages costs up to several times what computing it does, for every candidate alike; whether malloc
    has kept pages of the right size is decided by what the process did before, so that candidates measured in turn meet
    different luck.
    """
    if sys.platform == "linux" and not _KEEPS_PAGES.keys() & os.environ.keys():
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | _KEEPS_PAGES)


def parse_arguments(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """With what every CPU benchmark takes; a command begins anew with kept pages, a call (argv given) does not."""
    csv_results.add_arguments(parser)
    parser.add_argument("--fresh-pages", action="store_true", help="malloc as it comes; default: it keeps freed pages")
    args = parser.parse_args(argv)
    if argv is None and not (args.fresh_pages or args.from_csv):
        keep_pages()
    return args


def pages() -> str:
    kept = all(os.environ.get(name) == value for name, value in _KEEPS_PAGES.items())
    return "kept by malloc" if kept else "as malloc's defaults have it"


class OtherWork:
    """Which share of the machine others used since this was made: above a few percent, do not trust the timings."""

    def __init__(self) -> None:
        self._begin = self._now()

    @staticmethod
    def _now() -> tuple[float, float]:
        """Seconds of all cores together, and those spent in other processes (or taken by the hypervisor)."""
        fields = [int(v) / os.sysconf("SC_CLK_TCK") for v in _read(Path("/proc/stat")).split("\n")[0].split()[1:9]]
        total = sum(fields)
        return total, total - sum(fields[3:5]) - time.process_time()  # less idle and waiting for input and output

    def share(self) -> float:
        total, other = (now - begin for now, begin in zip(self._now(), self._begin, strict=True))
        return max(0.0, other / total) if total > 0 else 0.0


def commit() -> str:
    """Of this tree, "+changes" added where a tracked file differs from it; "unknown" outside of a checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(SHAPES.parent.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changes = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short", "HEAD") + ("+changes" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def by_name(result: dict[str, Any], layout: str, key: str) -> dict[str, Any]:
    """That entry of every candidate of one layout that has it: a result's "peers" are named "ours NCHW"."""
    named = ((name.rsplit(" ", 1), peer) for name, peer in result["peers"].items())
    return {name: peer[key] for (name, own_layout), peer in named if own_layout == layout and key in peer}


def describe_run(arguments: dict[str, Any]) -> dict[str, Any]:
    """What every file of results starts with."""
    import conv1x1_ext

    versions = {"python": platform.python_version()}
    for package in ("torch", "numpy", "onnxruntime"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "missing"
    return {
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions,
        "build": conv1x1_ext.build_info(),
        "pages": pages(),
        "arguments": arguments,
        "method": " ".join((__doc__ or "").split("Method. ")[1].split()),
    }
