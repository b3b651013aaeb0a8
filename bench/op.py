"""Every layer of bench/shapes/*.txt: ours against stock torch and the other ways to compute relu(conv1x1(x, w) + b).

``python -m bench.op --quick`` ends within two minutes; ``--train`` times forward and backward with all three gradients.
How it measures is in bench/harness.py, what it compares with in bench/peers.py. Each callable is checked once against
float64 before it is timed: relative Frobenius error at most twice stock's or 1e-5 (float64: 1e-13). Ours failing that
ends the run; a peer that fails or does not exist here is listed with the reason. "% of ceiling" is against
multiply-adds from registers (bench/ceiling.py) sampled in the same rounds, with the same number of threads.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # python bench/op.py
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from bench import csv_results, cuda_harness, cuda_peers, op_cuda, peers
from bench.harness import DTYPES, NETS, Layer, OtherWork, describe_run, interleave, keep_pages, load_shapes

if TYPE_CHECKING:
    from rich.console import Console

QUICK_SECONDS = 75.0  # for the rounds of --quick: a busy machine gets fewer rounds, at least 3
BOUNDS = {"float32": 1e-5, "float64": 1e-13, "bfloat16": 1e-2, "float16": 2e-3}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; --quick and --device only change the defaults and what is accepted."""
    parser = argparse.ArgumentParser(prog="bench.op", description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=NETS, metavar="NET", help=f"of {', '.join(NETS)}; default all")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--batch", nargs="+", type=int, metavar="N", help="default 1 16; cuda 1 32 256")
    known = list(dict.fromkeys([*DTYPES, *cuda_harness.DTYPES]))
    parser.add_argument("--dtype", nargs="+", choices=known, help="default float32; cuda float32 tf32 bfloat16 float16")
    parser.add_argument("--layout", choices=[*peers.LAYOUTS, "both"], default="both")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--train", action="store_true", help="forward + backward, all three gradients; cuda: only that")
    parser.add_argument("--forward", action="store_true", help="cuda: only the forward; default both")
    names = list(dict.fromkeys([*peers.NAMES, *cuda_peers.NAMES]))
    parser.add_argument("--peers", nargs="+", choices=names, metavar="PEER", help=", ".join(names))
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="torch.compile too; default but --quick and cuda"
    )
    parser.add_argument("--quick", action="store_true", help="seed and resnet50, batch 1, few rounds, no torch.compile")
    parser.add_argument("--rounds", type=int, help="default 15, with --quick 11; cuda 9 and 5")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="cuda: stop then, and list what was left out")
    parser.add_argument("--by", choices=["median", "best"], default="median", help="of the rounds: what is compared")
    parser.add_argument("--fresh-pages", action="store_true", help="malloc as it comes; default: it keeps freed pages")
    csv_results.add_arguments(parser)
    parser.add_argument("--plot", metavar="OUT.png", type=Path)
    parser.add_argument("--markdown", action="store_true", help="print the docs' table in place of the terminal's")
    args = parser.parse_args(argv)
    cuda = args.device == "cuda"
    for option, value, allowed in (
        ("dtype", args.dtype, cuda_harness.DTYPES if cuda else DTYPES),
        ("peers", args.peers, cuda_peers.NAMES if cuda else peers.NAMES),
    ):
        wrong = [v for v in value or () if v not in allowed]
        if wrong:
            parser.error(f"--{option}: expected some of {', '.join(allowed)} on {args.device}, got {', '.join(wrong)}")
    for option in ("plot", "markdown") if cuda else ("forward", "budget"):
        if getattr(args, option):
            parser.error(f"--{option}: not with --device {args.device}")
    args.shapes = args.shapes or (["seed", "resnet50"] if args.quick else list(NETS))
    args.batch = args.batch or (([1, 32] if cuda else [1]) if args.quick else [1, 32, 256] if cuda else [1, 16])
    args.dtype = args.dtype or (list(cuda_harness.DTYPES) if cuda else ["float32"])
    args.rounds = args.rounds or ((5 if args.quick else 9) if cuda else 11 if args.quick else 15)
    args.compile = args.compile if args.compile is not None else not (args.quick or cuda)
    return args


def chosen_peers(args: argparse.Namespace) -> list[peers.Peer]:
    """Ours and stock always; the rest as asked."""
    names = {"ours", "ours_prepacked", "stock", *(args.peers or peers.NAMES)}
    if not args.compile and "compile" not in (args.peers or ()):
        names.discard("compile")
    layouts = peers.LAYOUTS if args.layout == "both" else (args.layout,)
    return [p for p in (peers.TRAIN if args.train else peers.FORWARD) if p.name in names and p.layout in layouts]


def prepare(
    case: peers.Case, chosen: list[peers.Peer], train: bool
) -> tuple[dict[str, peers.Call], dict[str, list[float]], dict[str, str]]:
    """Callables that were found right, their errors, and the reasons of those left out.

    Raises:
        AssertionError: ours, or stock, is wrong.
    """
    expected = peers.reference(case, train)
    calls: dict[str, peers.Call] = {}
    errors: dict[str, list[float]] = {}
    skipped: dict[str, str] = {}
    for peer in chosen:
        reason = peer.unavailable(case)
        if reason is None:
            try:
                call, outputs = peer.prepare(case)
                errors[peer.key] = peers.errors(outputs(call()), expected)
                calls[peer.key] = call
            except Exception as error:
                if peer.name in ("ours", "ours_prepacked", "stock"):
                    raise
                reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if reason is not None:
            skipped[peer.key] = reason
    stock = [max(e) for e in zip(*(errors[p.key] for p in chosen if p.name == "stock"), strict=True)]
    for key, found in list(errors.items()):
        wrong = [f"{e:.1e}" for e, s in zip(found, stock, strict=True) if not e <= max(2 * s, BOUNDS[case.dtype])]
        if wrong and key.startswith(("ours", "stock")):
            raise AssertionError(f"{key}, {case.layer}, {case.dtype}: relative errors {wrong}, stock's {stock}")
        if wrong:
            skipped[key] = f"wrong: relative errors {', '.join(wrong)}"
            del calls[key]
    return calls, errors, skipped


def measure_layer(layer: Layer, nets: list[str], dtype: str, args: argparse.Namespace, budget: float) -> dict[str, Any]:
    """One layer's entry of the results."""
    from bench import ceiling

    chosen = chosen_peers(args)
    case = peers.Case(layer, dtype, args.threads)
    isa = ceiling.best_isa(dtype, args.threads)
    fma: list[float] = []

    def sample_ceiling() -> None:
        fma.append(ceiling.fma_gflops(isa, dtype, args.threads))

    with torch.inference_mode(not args.train):
        calls, errors, skipped = prepare(case, chosen, args.train)
        stats = interleave(calls, args.rounds, sample_ceiling, budget)
    flops = layer.flops * (3 if args.train else 1)
    results = {}
    for peer in chosen:
        if peer.key in stats:
            s = stats[peer.key]
            results[peer.key] = {**s.as_dict(), "error": float(f"{max(errors[peer.key]):.3g}")}
    return {
        "label": str(layer), "layer": asdict(layer), "nets": " ".join(nets), "dtype": dtype, "train": args.train,
        "flops": flops, "bytes": layer.bytes(DTYPES[dtype].itemsize),
        "ceiling_gflops": {"median": round(statistics.median(fma), 1), "best": round(max(fma), 1)},
        "peers": results, "skipped": skipped,
    }  # fmt: skip


def measure(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """The whole run, as it goes into its file."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from bench import ceiling

    torch.set_num_threads(args.threads)
    data = describe_run(csv_results.settings(args))
    layers = load_shapes(args.shapes, args.batch)
    work = [(layer, nets, dtype) for dtype in args.dtype for layer, nets in layers.items()]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    other_work = OtherWork()
    budget = QUICK_SECONDS / len(work) if args.quick else math.inf
    # No refreshing thread: it would run beside what is timed.
    with Progress(*columns, TimeRemainingColumn(), console=console, auto_refresh=False) as progress:
        task = progress.add_task("ceilings", total=len(work))
        progress.refresh()
        data["ceilings"] = ceiling.measure(args.threads)
        data["results"] = []
        for layer, nets, dtype in work:
            progress.update(task, description=f"{layer!s:<24}", refresh=True)
            data["results"].append(measure_layer(layer, nets, dtype, args, budget))
            progress.advance(task)
        progress.refresh()
    data["other_work"] = round(other_work.share(), 3)
    return data


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if args.device == "cuda":
        if not (args.from_csv or torch.cuda.is_available()):
            raise SystemExit(f"--device cuda: this torch ({torch.__version__}) finds no GPU")
        op_cuda.report(csv_results.obtain(args, lambda: op_cuda.measure(args)))
        return
    if argv is None and not (args.from_csv or args.fresh_pages):
        keep_pages()
    from rich.console import Console

    from bench import report

    data = csv_results.obtain(args, lambda: measure(args, Console(stderr=True)))
    if args.markdown:
        print(report.markdown(data, args.by))
    else:
        report.print_tables(data, Console(), args.by)
    if args.plot:
        args.plot.parent.mkdir(parents=True, exist_ok=True)
        report.plot(data, args.plot, args.by)


if __name__ == "__main__":
    main()
