"""Blocks of Network in Network: its head, pooled in one pass, and two 1x1 layers in a row. How: bench/harness.py.

``python -m bench.blocks``: ``conv1x1_avg_pool`` against ``relu(conv2d).mean`` (``unfused`` is our convolution and
torch's mean), forward and training; and two 1x1 + ReLU of MLPConv, ours against stock. Before timing, each callable is
compared once with the same in float64.

Two layers in a row also say what a kernel that keeps the tensor between them in cache could win: ``pieces`` runs both
layers image by image (its calls included), ``fma`` is the multiply-adds' time at this machine's ceiling, ``between``
the time to write that tensor and to read it again at the machine's copy bandwidth: more than it takes where it fits
into a cache.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

if not __package__:  # python bench/blocks.py
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import conv1x1_ext
from bench import ceiling, csv_results
from bench.harness import DTYPES, Layer, OtherWork, describe_run, interleave, parse_arguments
from bench.peers import LAYOUTS, Case

# bench/shapes/nin.txt's heads: the ImageNet model's, and SqueezeNet's, which is of the same kind.
HEADS = [(1024, 1000, 6, 6), (512, 1000, 13, 13)]
# nin.txt's pairs: C_in, C between, C_out, H, W.
PAIRS = [(96, 96, 96, 54, 54), (256, 256, 256, 27, 27), (384, 384, 384, 13, 13), (1024, 1024, 1000, 6, 6)]
BOUNDS = {"float32": 1e-5, "float64": 1e-13, "bfloat16": 2e-2, "float16": 4e-3}
Function = Callable[[Tensor, Tensor, Tensor], Tensor]
Call = Callable[[], Any]


def _pool_ours(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return conv1x1_ext.conv1x1_avg_pool(x, w, b)


def _pool_unfused(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return conv1x1_ext.conv1x1(x, w, b, activation="relu").mean((-2, -1))


def _pool_stock(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.relu(F.conv2d(x, w, b)).mean((-2, -1))


POOLS: dict[str, Function] = {"ours": _pool_ours, "unfused": _pool_unfused, "stock": _pool_stock}


def check(name: str, found: Sequence[Tensor], expected: Sequence[Tensor], dtype: str) -> None:
    """Gradients may miss a little more: where z is about zero, rounding decides whether ReLU lets dy through.

    Raises:
        AssertionError: a relative Frobenius error above BOUNDS.
    """
    for i, (f, e) in enumerate(zip(found, expected, strict=True)):
        error = float((f.detach().double() - e.detach()).norm() / e.detach().norm().clamp_min(1e-300))
        if not error <= (BOUNDS[dtype] if i == 0 else max(BOUNDS[dtype], 1e-2)):
            raise AssertionError(f"{name}: relative error {error:.1e}")


def trained(function: Function, tensors: Sequence[Tensor], dy: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    leaves = [t.detach().requires_grad_() for t in tensors]

    def step() -> tuple[Tensor, ...]:
        y = function(*leaves)
        return y, *torch.autograd.grad(y, leaves, dy)

    return step


def pool_calls(case: Case, layout: str, train: bool) -> dict[str, Call]:
    """Callables by candidate, each checked."""
    tensors = case.tensors(layout)
    dy = torch.randn(case.layer.n, case.layer.c_out, generator=torch.Generator().manual_seed(3)).to(case.x.dtype)
    doubles = [t.double() for t in tensors]
    if train:
        expected = trained(_pool_stock, doubles, dy.double())()
        calls: dict[str, Call] = {name: trained(f, tensors, dy) for name, f in POOLS.items()}
    else:
        expected = (_pool_stock(*doubles),)
        calls = {name: functools.partial(f, *tensors) for name, f in POOLS.items()}
    for name, call in calls.items():
        found = call()
        check(f"{name}, {case.layer}", found if train else (found,), expected, case.dtype)
    return calls


def pair_calls(first: Case, second: Case, layout: str) -> dict[str, Call]:
    (x, w1, b1), (_, w2, b2) = first.tensors(layout), second.tensors(layout)

    def ours(x: Tensor) -> Tensor:
        return conv1x1_ext.conv1x1(conv1x1_ext.conv1x1(x, w1, b1, activation="relu"), w2, b2, activation="relu")

    def stock(x: Tensor) -> Tensor:
        return F.relu(F.conv2d(F.relu(F.conv2d(x, w1, b1)), w2, b2))

    images = x.split(1)
    calls: dict[str, Call] = {"ours": lambda: ours(x), "stock": lambda: stock(x)}
    if len(images) > 1:
        calls["pieces"] = lambda: [ours(image) for image in images]
    expected = F.relu(F.conv2d(F.relu(F.conv2d(x.double(), w1.double(), b1.double())), w2.double(), b2.double()))
    for name, call in calls.items():
        found = call()
        check(f"{name}, {first.layer}", [torch.cat(found) if name == "pieces" else found], [expected], first.dtype)
    return calls


def measure(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    torch.set_num_threads(args.threads)
    data = describe_run(csv_results.settings(args))
    other_work = OtherWork()
    copy_gbs = statistics.median(ceiling.copy_gbs(args.threads))
    isa = ceiling.best_isa(args.dtype, args.threads)
    results: list[dict[str, Any]] = []
    for n in track(args.batch, "batches", console=console, auto_refresh=False):
        for c_in, c_out, h, w in HEADS:
            case = Case(Layer(n, c_in, c_out, h, w), args.dtype, args.threads)
            for layout in LAYOUTS:
                case.tensors(layout)  # not in inference mode: what is made there cannot be trained on
                for train in (False, True):
                    with torch.inference_mode(not train):
                        stats = interleave(pool_calls(case, layout, train), args.rounds)
                    times = {name: s.as_dict() for name, s in stats.items()}
                    head = {"block": "head", "layer": asdict(case.layer), "layout": layout, "train": train}
                    results.append({**head, "calls": times})
        for c_in, between, c_out, h, w in PAIRS:
            first, second = Layer(n, c_in, between, h, w), Layer(n, between, c_out, h, w)
            cases = [Case(layer, args.dtype, args.threads) for layer in (first, second)]
            for layout in LAYOUTS:
                fma: list[float] = []
                with torch.inference_mode():
                    sample = lambda fma=fma: fma.append(ceiling.fma_gflops(isa, args.dtype, args.threads))  # noqa: E731
                    stats = interleave(pair_calls(*cases, layout), args.rounds, sample)
                rate, item = statistics.median(fma), DTYPES[args.dtype].itemsize
                results.append(
                    {
                        "block": "pair",
                        "layer": asdict(first),
                        "second": asdict(second),
                        "layout": layout,
                        "calls": {name: s.as_dict() for name, s in stats.items()},
                        "fma_us": round((first.flops + second.flops) / rate * 1e-3, 2),
                        "between_us": round(2 * item * first.pixels * between / copy_gbs * 1e-3, 2),
                        "between_bytes": item * first.pixels * between,
                    }
                )
    return {**data, "copy_gbs": copy_gbs, "results": results, "other_work": round(other_work.share(), 3)}


def report(data: dict[str, Any], console: Console) -> None:
    heads = Table(title="1x1 + ReLU + global average pooling: microseconds, median of the rounds")
    for name in ("layer", "layout", "", "ours", "unfused", "stock", "x unfused", "x stock"):
        heads.add_column(name, justify="left" if name in ("layer", "layout", "") else "right")
    for entry in (e for e in data["results"] if e["block"] == "head"):
        t = {name: c["median_us"] for name, c in entry["calls"].items()}
        times = [f"{t[name]:.1f}" for name in POOLS]
        ratios = [f"{t[name] / t['ours']:.2f}" for name in ("unfused", "stock")]
        what = "training" if entry["train"] else "forward"
        heads.add_row(str(Layer(**entry["layer"])), entry["layout"], what, *times, *ratios)
    console.print(heads)
    pairs = Table(title="two 1x1 + ReLU in a row: microseconds, median of the rounds")
    for name in ("layers", "layout", "ours", "stock", "x stock", "fma", "between", "MiB", "pieces"):
        pairs.add_column(name, justify="left" if name in ("layers", "layout") else "right")
    for entry in (e for e in data["results"] if e["block"] == "pair"):
        t = {name: c["median_us"] for name, c in entry["calls"].items()}
        first, second = Layer(**entry["layer"]), Layer(**entry["second"])
        parts = [f"{entry[key]:.1f} ({entry[key] / t['ours']:.0%})" for key in ("fma_us", "between_us")]
        pieces = f"{t['pieces']:.1f} ({t['pieces'] / t['ours'] - 1:+.0%})" if "pieces" in t else ""
        label = f"{first.n}x {first.c_in}->{first.c_out}->{second.c_out} {first.h}x{first.w}"
        mib = f"{entry['between_bytes'] / 2**20:.1f}"
        x_stock = f"{t['stock'] / t['ours']:.2f}"
        pairs.add_row(label, entry["layout"], f"{t['ours']:.1f}", f"{t['stock']:.1f}", x_stock, *parts, mib, pieces)
    console.print(pairs)
    console.print(f"copy {data['copy_gbs']:.0f} GB/s; other processes used {data['other_work']:.0%} of the machine")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench.blocks", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16], metavar="N")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parse_arguments(parser, argv)
    data = csv_results.obtain(args, lambda: measure(args, Console(stderr=True)))
    console = Console()
    report(data, console if console.is_terminal else Console(width=130))


if __name__ == "__main__":
    main()
