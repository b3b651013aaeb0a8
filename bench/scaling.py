"""What a second thread brings on compute-bound layers: t1 / (T tT), 1 being perfect. How: bench/harness.py.

``python -m bench.scaling``. Layers of bench/shapes with at least ``--intensity`` operations a byte that the forward
must move; one thread and T threads take turns in the same rounds, and so do samples of the multiply-add ceiling, whose
own scaling (clock, shared cores) bounds what can be had. Each callable is checked once as in bench/op.py.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

if not __package__:  # python bench/scaling.py
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench import ceiling, csv_results, op, peers
from bench.harness import (
    DTYPES,
    NETS,
    Layer,
    OtherWork,
    describe_run,
    geometric_mean,
    interleave,
    load_shapes,
    parse_arguments,
)


def compute_bound(nets: Sequence[str], batches: Sequence[int], dtype: str, intensity: float) -> list[Layer]:
    item = DTYPES[dtype].itemsize
    return [layer for layer in load_shapes(nets, batches) if layer.flops >= intensity * layer.bytes(item)]


def with_threads(call: Callable[[], Any], threads: int) -> Callable[[], Any]:
    def run() -> Any:
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        return call()

    return run


def measure_layer(layer: Layer, dtype: str, train: bool, args: argparse.Namespace) -> list[dict[str, Any]]:
    """An entry for each layout and candidate: statistics and efficiency."""
    case = peers.Case(layer, dtype, args.threads)
    names = ("ours", "stock") if args.stock else ("ours",)
    chosen = [p for p in (peers.TRAIN if train else peers.FORWARD) if p.name in ("ours", "stock")]
    isa = ceiling.best_isa(dtype, args.threads)
    fma: dict[int, list[float]] = {1: [], args.threads: []}

    def sample() -> None:
        for threads, samples in fma.items():
            samples.append(ceiling.fma_gflops(isa, dtype, threads))

    torch.set_num_threads(args.threads)
    with torch.inference_mode(not train):
        calls, _, _ = op.prepare(case, chosen, train)
        timed = {
            f"{key} {threads}": with_threads(call, threads)
            for key, call in calls.items()
            if key.split()[0] in names
            for threads in (1, args.threads)
        }
        stats = interleave(timed, args.rounds, sample)
    torch.set_num_threads(args.threads)
    rates = {threads: statistics.median(samples) for threads, samples in fma.items()}
    ceiling_efficiency = rates[args.threads] / (args.threads * rates[1])
    entries = []
    for key in (p.key for p in chosen if p.name in names):
        one, more = stats[f"{key} 1"], stats[f"{key} {args.threads}"]
        name, layout = key.split()
        entries.append(
            {
                "layer": asdict(layer),
                "dtype": dtype,
                "train": train,
                "name": name,
                "layout": layout,
                "one": one.as_dict(),
                "more": more.as_dict(),
                "efficiency": round(one.median_us / (args.threads * more.median_us), 3),
                "efficiency_of_best": round(one.best_us / (args.threads * more.best_us), 3),
                "gflops": round(layer.flops * (3 if train else 1) / more.median_us * 1e-3, 1),
                "ceiling_gflops": round(rates[args.threads], 1),
                "ceiling_efficiency": round(ceiling_efficiency, 3),
            }
        )
    return entries


def measure(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    data = describe_run(csv_results.settings(args))
    other_work = OtherWork()
    work = [
        (layer, dtype, train)
        for dtype in args.dtype
        for layer in compute_bound(args.shapes, args.batch, dtype, args.intensity)
        for train in args.train
    ]
    results = []
    for layer, dtype, train in track(work, "layers", console=console, auto_refresh=False):
        results += measure_layer(layer, dtype, train, args)
    return {**data, "results": results, "other_work": round(other_work.share(), 3)}


def report(data: dict[str, Any], console: Console) -> None:
    threads = data["arguments"]["threads"]
    table = Table(title=f"1 against {threads} threads: microseconds (median), efficiency t1 / ({threads} t{threads})")
    left = ("layer", "dtype", "layout", "", "who")
    for name in (*left, "t1", f"t{threads}", "efficiency", "of best", "% of FMA", "FMA's own"):
        table.add_column(name, justify="left" if name in left else "right")
    groups: dict[tuple[str, ...], list[float]] = {}
    for e in data["results"]:
        what = "training" if e["train"] else "forward"
        times = [f"{e[k]['median_us']:.0f}" for k in ("one", "more")]
        shares = [f"{e['efficiency']:.2f}", f"{e['efficiency_of_best']:.2f}"]
        shares += [f"{e['gflops'] / e['ceiling_gflops']:.0%}", f"{e['ceiling_efficiency']:.2f}"]
        table.add_row(str(Layer(**e["layer"])), e["dtype"], e["layout"], what, e["name"], *times, *shares)
        groups.setdefault((e["name"], e["dtype"], e["layout"], what), []).append(e["efficiency"])
    console.print(table)
    for key, found in groups.items():
        mean = geometric_mean(found)
        console.print(f"{' '.join(key)}: {mean:.2f} (geometric mean of {len(found)} layers), worst {min(found):.2f}")
    console.print(f"Other processes used {data['other_work']:.0%} of the machine.")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench.scaling", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=NETS, default=["seed", "resnet50"], metavar="NET")
    parser.add_argument("--batch", nargs="+", type=int, default=[16], metavar="N")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=["float32", "bfloat16"])
    parser.add_argument("--intensity", type=float, default=40, help="operations a byte, at least; default 40")
    parser.add_argument("--threads", type=int, default=2, help="against one; default 2")
    parser.add_argument("--forward", dest="train", action="store_const", const=[False], default=[False, True])
    parser.add_argument("--stock", action="store_true", help="stock too")
    parser.add_argument("--rounds", type=int, default=7)
    args = parse_arguments(parser, argv)
    data = csv_results.obtain(args, lambda: measure(args, Console(stderr=True)))
    console = Console()
    report(data, console if console.is_terminal else Console(width=130))


if __name__ == "__main__":
    main()
