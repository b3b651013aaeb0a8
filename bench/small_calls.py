"""What a call costs where there is nothing to compute: microseconds for tiny inputs, ours against stock.

``python -m bench.small_calls``. Each case is timed as the functional and as the module without gradients, and as the
module's forward and backward (all three gradients, from a given dy). Stock is ``F.relu(F.conv2d(...))``, as a module
``nn.Conv2d`` and ``F.relu``; ``linear`` is ``F.linear`` and ReLU over the same numbers. Interleaved; bench/harness.py.
A last line compares with ``F.linear`` alone on a 4x4, the smallest call that torch has for such work.
"""

from __future__ import annotations

import argparse
import copy
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # python bench/small_calls.py
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table

import conv1x1_ext
from bench import csv_results
from bench.harness import describe_run, interleave

# C_in, C_out, and the input's size; the last is the article's, unbatched.
CASES = [(4, 4, (1, 4, 2, 2)), (8, 8, (1, 8, 7, 7)), (512, 32, (512, 12, 12))]
LINEAR_ALONE = "functional, no grad | F.linear alone"


def candidates(c_in: int, c_out: int, size: tuple[int, ...]) -> dict[str, Callable[[], Any]]:
    """Callables by "kind | who", checked against each other."""
    torch.manual_seed(1)
    ours = conv1x1_ext.Conv1x1Act(c_in, c_out, activation="relu")
    stock = torch.nn.Conv2d(c_in, c_out, 1)
    stock.load_state_dict(ours.state_dict())
    x = torch.randn(size)
    w, b = ours.weight.detach(), ours.bias.detach()  # type: ignore[union-attr]
    flat_x, flat_w = x.movedim(-3, -1).contiguous(), w.flatten(1)
    xg = x.clone().requires_grad_()
    dy = torch.randn_like(stock(x).detach())
    torch.testing.assert_close(ours(x), F.relu(stock(x)), rtol=1e-4, atol=1e-5)

    def step(forward: Callable[[torch.Tensor], torch.Tensor], module: torch.nn.Module) -> Callable[[], Any]:
        inputs = (xg, *module.parameters())
        return lambda: torch.autograd.grad(forward(xg), inputs, dy)

    functional = {
        "functional, no grad | ours": lambda: conv1x1_ext.conv1x1(x, w, b, activation="relu"),
        "functional, no grad | stock": lambda: F.relu(F.conv2d(x, w, b)),
        "functional, no grad | linear": lambda: F.relu(F.linear(flat_x, flat_w, b)),
    }
    trained = {
        "forward + backward | ours": step(ours, ours),
        "forward + backward | stock": step(lambda t: F.relu(stock(t)), stock),
    }
    # Frozen copies: nothing needs a gradient, and no context manager is timed.
    frozen_ours, frozen_stock = (copy.deepcopy(m).requires_grad_(False) for m in (ours, stock))
    modules = {
        "module, no grad | ours": lambda: frozen_ours(x),
        "module, no grad | stock": lambda: F.relu(frozen_stock(x)),
    }
    pooled_dy = torch.randn_like(dy.mean((-2, -1)))

    def pool(function: Callable[..., torch.Tensor]) -> Callable[[], Any]:
        leaves = (xg, *(t.detach().requires_grad_() for t in (w, b)))
        return lambda: torch.autograd.grad(function(*leaves), leaves, pooled_dy)

    pooled = {
        "pooled, forward + backward | ours": pool(conv1x1_ext.conv1x1_avg_pool),
        "pooled, forward + backward | stock": pool(lambda *t: F.relu(F.conv2d(*t)).mean((-2, -1))),
    }
    floor = {} if c_in * c_out > 16 else {LINEAR_ALONE: functools.partial(F.linear, torch.randn(4, 4), flat_w, b)}
    return {**functional, **floor, **modules, **trained, **pooled}


def measure(rounds: int, console: Console) -> list[dict[str, Any]]:
    """An entry for each case: statistics by candidate."""
    results = []
    for c_in, c_out, size in track(CASES, "cases", console=console, auto_refresh=False):
        stats = interleave(candidates(c_in, c_out, size), rounds)
        entry = {name: s.as_dict() for name, s in stats.items()}
        results.append({"c_in": c_in, "c_out": c_out, "input": list(size), "calls": entry})
    return results


def print_table(results: list[dict[str, Any]], console: Console) -> None:
    table = Table(title="microseconds per call: median of the rounds (best)")
    for name in ("C_in->C_out, input", "call"):
        table.add_column(name)
    for name in ("ours", "stock", "linear", "x stock"):
        table.add_column(name, justify="right")
    for result in results:
        kinds = dict.fromkeys(name.split(" | ")[0] for name in result["calls"])
        label = f"{result['c_in']}->{result['c_out']} {tuple(result['input'])}"
        for kind in kinds:
            calls = [result["calls"].get(f"{kind} | {who}") for who in ("ours", "stock", "linear")]
            cells = [f"{c['median_us']:.1f} ({c['best_us']:.1f})" if c else "" for c in calls]
            table.add_row(label, kind, *cells, f"{calls[1]['median_us'] / calls[0]['median_us']:.2f}")
            label = ""
    console.print(table)
    calls = results[0]["calls"]
    ours, alone = calls["functional, no grad | ours"]["median_us"], calls[LINEAR_ALONE]["median_us"]
    console.print(
        f"F.linear alone on a 4x4: {alone:.2f} us; ours, functional, 4->4 on 2x2: {ours / alone:.2f} times that"
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench.small_calls", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    csv_results.add_arguments(parser)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    data = csv_results.obtain(
        args,
        lambda: {**describe_run(csv_results.settings(args)), "results": measure(args.rounds, Console(stderr=True))},
    )
    console = Console()
    print_table(data["results"], console if console.is_terminal else Console(width=120))


if __name__ == "__main__":
    main()
