"""Every tile and split of the tensor-core kernels, layer by layer, and the cost model's constants fitted to them.

    python -m bench.cuda_tiles sweep --json tiles.json     on a GPU
    python -m bench.cuda_tiles fit --json tiles.json       on the same GPU: prints the constants for heuristics.h

The library must be built with CONV1X1_TUNING=1 in the environment: no other lets a plan be told what to choose.
Times are those of CUDA graphs over copies that together exceed the L2 cache (bench/cuda_harness.py), the best of three.
A fit's measure is the mean of log(time of what the model chooses / best time): nothing else matters of the model. It is
a random search that asks the library itself what it would choose (conv1x1_ext_tune, explain).
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import conv1x1_ext
from bench import cuda_harness
from bench.harness import NETS, Layer, load_shapes
from conv1x1_ext import _eager, _library

TILES = 4  # of heuristics.h
DIRECTIONS = {"fprop": 0, "dgrad": 1, "wgrad": 2 | 4}  # what _backward is asked for
SLICES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
Model = list[float]  # alone of each tile, full of each, then CostModel's other members in order


def tune(tile: int = -1, slices: int = 0, bits16: Model | None = None, tf32: Model | None = None) -> None:
    """conv1x1_ext_tune of csrc/cuda/conv1x1_cuda.cpp.

    Raises:
        SystemExit: the library was not built for it.
    """

    def array(model: Model | None) -> Any:
        return None if model is None else (ctypes.c_double * len(model))(*model)

    library = ctypes.CDLL(str(_library.path))
    if not hasattr(library, "conv1x1_ext_tune"):
        raise SystemExit("bench.cuda_tiles: needs CUDA kernels built with CONV1X1_TUNING=1: see its docstring")
    library.conv1x1_ext_tune(ctypes.c_int(tile), ctypes.c_int64(slices), array(bits16), array(tf32))


@dataclass(frozen=True)
class Problem:
    """One layer's pass in one dtype ("tf32" for float32 with it) and layout."""

    layer: Layer
    dtype: str
    layout: str
    direction: str

    def tensors(self, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """x, w and b."""
        layer, generator = self.layer, torch.Generator("cuda").manual_seed(seed)
        memory_format = torch.channels_last if self.layout == "NHWC" else torch.contiguous_format

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, device="cuda").to(cuda_harness.DTYPES[self.dtype])

        x = normal(layer.n, layer.c_in, layer.h, layer.w).contiguous(memory_format=memory_format)
        return x, normal(layer.c_out, layer.c_in // layer.groups, 1, 1), normal(layer.c_out)

    def choice(self, x: Tensor, w: Tensor, b: Tensor) -> str:
        """Tile and slices of what would run now, "128x64/3"."""
        plan = conv1x1_ext.explain(
            x, w, b, self.layer.stride, groups=self.layer.groups, activation="relu", direction=self.direction
        )
        return f"{plan['tile'].rsplit('x', 1)[0]}/{plan['grid'].split(', ')[1].split()[0]}"

    def calls(self, copies: int) -> list[cuda_harness.Call]:
        config = _eager.make_config("relu", self.layer.stride, self.layer.groups, 2)
        config |= _eager.TF32 * (self.dtype == "tf32")
        wanted, calls = DIRECTIONS[self.direction], []
        for i in range(copies):
            x, w, b = self.tensors(i)
            y = _eager._fprop(x, w, b, None, config)
            dy = torch.randn_like(y)
            if wanted:
                calls.append(lambda x=x, w=w, y=y, dy=dy: _eager._backward(dy, x, w, y, config, wanted))
            else:
                calls.append(lambda x=x, w=w, b=b: _eager._fprop(x, w, b, None, config))
        return calls


def problems(shapes: Sequence[str], batches: Sequence[int], dtypes: Sequence[str]) -> list[Problem]:
    return [
        Problem(layer, dtype, layout, direction)
        for layer in load_shapes(shapes, batches)
        for dtype in dtypes
        for layout in ("NHWC", "NCHW")
        for direction in DIRECTIONS
    ]


def sweep_one(problem: Problem, timer: cuda_harness.Timer, l2_bytes: int) -> dict[str, float]:
    """Microseconds by choice; without slices of fewer than 128 of k, and ending where a tile's splits only lose."""
    layer = problem.layer
    item = cuda_harness.DTYPES[problem.dtype].itemsize
    moved = item * (layer.n * layer.c_in * layer.h * layer.w + layer.pixels * layer.c_out)
    calls = problem.calls(cuda_harness.copies_for(moved, l2_bytes))
    tensors = problem.tensors()
    k = {"fprop": layer.c_in, "dgrad": layer.c_out, "wgrad": layer.pixels}[problem.direction]
    times: dict[str, float] = {}
    for tile in range(TILES):
        before = math.inf
        for slices in SLICES:
            if slices > 1 and k // slices < 128:
                break
            tune(tile, slices)
            choice = problem.choice(*tensors)
            if choice in times:  # the tile does not exist here, or as many slices do not
                continue
            calls[0]()
            torch.cuda.synchronize()
            graph = timer.capture(calls)
            times[choice] = round(min(timer.graph(graph, len(calls)) for _ in range(3)), 2)
            if before < times[choice] > 3 * min(times.values()):
                break
            before = times[choice]
    tune()
    return times


def regret(choices: Sequence[str], times: Sequence[dict[str, float]]) -> float:
    """Mean of log(time of the choice / best time); a choice that was not timed counts as the worst that was."""
    return statistics.fmean(
        math.log(t.get(choice, max(t.values())) / min(t.values())) for choice, t in zip(choices, times, strict=True)
    )


def fit(
    start: Model, choose: Callable[[Model], list[str]], times: Sequence[dict[str, float]], seconds: float, seed: int = 0
) -> tuple[float, Model]:
    """Random search from ``start``: one to three constants at a time, by factors around 1; keeps what is better."""
    generator, end, width = random.Random(seed), time.monotonic() + seconds, 0.5
    best, score = list(start), regret(choose(start), times)
    while time.monotonic() < end:
        model = list(best)
        for i in generator.sample(range(len(model)), generator.choice((1, 1, 2, 3))):
            model[i] *= math.exp(generator.gauss(0, width))
        found = regret(choose(model), times)
        if found < score:
            best, score = model, found
        width = max(0.05, width * 0.999)
    return score, best


def text_of(model: Model) -> str:
    """As heuristics.h writes a CostModel."""
    rounded = [float(f"{value:.3g}") for value in model]
    tiles = ", ".join(f"{{{rounded[i]:g}, {rounded[TILES + i]:g}}}" for i in range(TILES))
    return f"{{{{{tiles}}}, {', '.join(f'{value:g}' for value in rounded[2 * TILES :])}}}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench.cuda_tiles", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("what", choices=["sweep", "fit"])
    parser.add_argument("--json", type=Path, required=True, help="written by sweep, read by fit")
    parser.add_argument("--shapes", nargs="+", choices=NETS, default=["seed", "resnet50"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--dtype", nargs="+", choices=["bfloat16", "float16", "tf32"], default=["bfloat16", "tf32"])
    parser.add_argument(
        "--budget", type=float, default=math.inf, help="seconds of the sweep, which ends between problems"
    )
    parser.add_argument("--seconds", type=float, default=20, help="of each fit")
    args = parser.parse_args(argv)
    tune()
    if args.what == "sweep":
        end, rows = time.monotonic() + args.budget, []
        timer, l2_bytes = cuda_harness.CudaTimer(), int(cuda_harness.gpu()["l2_mib"] * 2**20)
        for problem in problems(args.shapes, args.batch, args.dtype):
            if time.monotonic() > end:
                break
            cuda_harness.allow_tf32(problem.dtype == "tf32")
            rows.append({**asdict(problem), "times": sweep_one(problem, timer, l2_bytes)})
            args.json.write_text(json.dumps({"device": cuda_harness.gpu(), "problems": rows}) + "\n")
        print(f"{len(rows)} problems, {sum(len(r['times']) for r in rows)} choices")
        return
    rows = json.loads(args.json.read_text())["problems"]
    for tf32 in (False, True):
        cuda_harness.allow_tf32(tf32)
        chosen = [r for r in rows if (r["dtype"] == "tf32") == tf32 and len(r["times"]) > 1]
        if not chosen:
            continue
        found = [Problem(Layer(**r["layer"]), r["dtype"], r["layout"], r["direction"]) for r in chosen]
        tensors = [p.tensors() for p in found]

        def choose(model: Model, tf32: bool = tf32, found: Any = found, tensors: Any = tensors) -> list[str]:
            tune(bits16=None if tf32 else model, tf32=model if tf32 else None)
            return [p.choice(*t) for p, t in zip(found, tensors, strict=True)]

        start = [1000.0, 1000, 1000, 750, 500, 260, 350, 250, 5000, 4000, 1.4, 1.8, 3200, 30]
        score, model = fit(start, choose, [r["times"] for r in chosen], args.seconds)
        print(f"{'tf32' if tf32 else '16 bits'}: {math.exp(score) - 1:.1%} behind the best; {text_of(model)}")


if __name__ == "__main__":
    main()
