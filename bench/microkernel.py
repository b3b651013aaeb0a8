"""Every microkernel by itself, operands in cache: GFLOP/s and % of the multiply-add ceiling of its own kind.

``python -m bench.microkernel``. One thread runs whole tiles of a microkernel over and over
(csrc/cpu/kernels/table_pybind.cpp, ``time``), with either access to A, for several k. Each round takes a sample of
every microkernel and of each ceiling (same instruction set and dtype, registers only) in turn. Operands in several
parts count as the multiply-adds that they stand for, and so does their ceiling. Each tile is checked once against
float64 before it is timed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # python bench/microkernel.py
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench import ceiling, csv_results
from bench.harness import describe_run, settle
from bench.microkernel_table import in_parts, load_table

SAMPLE_SECONDS = 0.002
PRODUCTS = {1: 1, 2: 4, 3: 6}  # of bfloat16, for one of operands in so many parts


def pairs(x: Any) -> Any:
    """(k, n) bfloat16 values as (k / 2, n) uint32, the first of two in the low half."""
    bits = np.ascontiguousarray(x).view(np.uint32) >> 16
    return np.ascontiguousarray(bits[0::2] | bits[1::2] << 16)


def aligned(x: Any) -> Any:
    """A copy that begins at a cache line, as the library's panels do: each load of a vector is then one line."""
    memory = np.empty(x.nbytes + 63, np.uint8)
    start = -memory.ctypes.data % 64
    copy = memory[start : start + x.nbytes].view(x.dtype).reshape(x.shape)
    copy[...] = x
    return copy


def operands(kernel: dict[str, Any], rows: bool, k: int) -> tuple[Any, Any, Any]:
    """A, B and C of a whole tile, C computed and found right.

    Raises:
        AssertionError: the microkernel is wrong.
    """
    generator = np.random.default_rng(k)
    a = generator.standard_normal((kernel["mr"], k)).astype(kernel["dtype"])
    b = generator.standard_normal((k, kernel["nr"])).astype(kernel["dtype"])
    c = np.zeros((kernel["mr"], kernel["nr"]), kernel["dtype"])
    expected = a.astype(np.float64) @ b.astype(np.float64)
    if kernel["parts"] > 1:  # of A (groups, parts, m, 16) in memory
        if kernel["operand"] == "float16":
            a, b = (x.astype(np.float16).astype(np.float32) for x in (a, b))
            expected = a.astype(np.float64) @ b.astype(np.float64)
        a = in_parts(np.ascontiguousarray(a.T), kernel["parts"]).swapaxes(2, 3).reshape(-1, kernel["mr"])
        b = in_parts(b, kernel["parts"]).reshape(-1, kernel["nr"])
    elif kernel["kr"] == 2:  # bfloat16 in pairs along k
        a, b = (torch.from_numpy(x).bfloat16().float().numpy() for x in (a, b))
        expected = a.astype(np.float64) @ b.astype(np.float64)
        a, b = (pairs(a.T).T, pairs(b))
    elif kernel["b"] == "float16":
        b = b.astype(np.float16)
        expected = a.astype(np.float64) @ b.astype(np.float64)
        b = b.view(np.uint16)
    if not rows and kernel["parts"] == 1:  # (k / KS, m, KS) in memory
        steps = a.shape[1]
        a = a.reshape(kernel["mr"], -1, kernel["ks"]).swapaxes(0, 1).reshape(steps, kernel["mr"])
    a, b, c = aligned(a), aligned(b), aligned(c)
    load_table().run(kernel["name"], rows, a, b, c, kernel["nr"])
    error = np.linalg.norm(c - expected) / np.linalg.norm(expected)
    if not error < k * np.finfo(kernel["dtype"]).eps:
        raise AssertionError(f"{kernel['name']}, k {k}: relative error {error:.1e}")
    return a, b, c


def arithmetic_of(kernel: dict[str, Any]) -> tuple[str, str]:
    """Instruction set and dtype of its multiply-adds."""
    return kernel["isa"], "bfloat16" if kernel["parts"] > 1 else kernel["operand"]


def measure(ks: Sequence[int], rounds: int, console: Console) -> list[dict[str, Any]]:
    """One entry for each microkernel, access and k."""
    table = load_table()
    cases = [
        (kernel, rows, k, operands(kernel, rows, k))
        for kernel in table.list()
        for rows in ((True, False) if kernel["parts"] == 1 else (False,))
        for k in ks
    ]
    calls = []
    for kernel, rows, k, (a, b, c) in cases:
        gflops = table.time(kernel["name"], rows, a, b, c, kernel["nr"], 3, 200)
        calls.append(max(1, int(SAMPLE_SECONDS * gflops * 1e9 / (2 * k * kernel["mr"] * kernel["nr"]))))
    kinds = list(dict.fromkeys(arithmetic_of(kernel) for kernel, *_ in cases))
    samples: list[list[float]] = [[] for _ in cases]
    peaks: dict[tuple[str, str], list[float]] = {kind: [] for kind in kinds}
    settle()
    for _ in track(range(rounds), "rounds", console=console, auto_refresh=False):
        for kind in kinds:
            peaks[kind].append(ceiling.fma_gflops(*kind, 1, SAMPLE_SECONDS))
        for own, count, (kernel, rows, _, (a, b, c)) in zip(samples, calls, cases, strict=True):
            own.append(table.time(kernel["name"], rows, a, b, c, kernel["nr"], 1, count))
    results = []
    for own, (kernel, rows, k, _) in zip(samples, cases, strict=True):
        peak = [rate / PRODUCTS[kernel["parts"]] for rate in peaks[arithmetic_of(kernel)]]
        results.append(
            {
                "kernel": kernel["name"],
                "isa": kernel["isa"],
                "dtype": kernel["operand"],
                "access": "rows" if rows else "cols",
                "k": k,
                "gflops": {"median": round(statistics.median(own), 2), "best": round(max(own), 2)},
                "ceiling": {"median": round(statistics.median(peak), 2), "best": round(max(peak), 2)},
            }
        )
    return results


def percent(entry: dict[str, Any], by: str) -> float:
    return 100 * float(entry["gflops"][by]) / float(entry["ceiling"][by])


def print_table(results: list[dict[str, Any]], console: Console) -> None:
    """A line for each microkernel and access, a column for each k."""
    ks = sorted({r["k"] for r in results})
    table = Table(title="GFLOP/s of whole tiles in cache, one thread, median (% of ceiling; best by best)")
    table.add_column("microkernel")
    table.add_column("A")
    table.add_column("ceiling", justify="right")
    for k in ks:
        table.add_column(f"k = {k}", justify="right")
    for name, access in dict.fromkeys((r["kernel"], r["access"]) for r in results):
        line = {r["k"]: r for r in results if (r["kernel"], r["access"]) == (name, access)}
        cells = [
            f"{r['gflops']['median']:.1f} ({percent(r, 'median'):.0f}; {percent(r, 'best'):.0f})" for r in line.values()
        ]
        table.add_row(name, access, f"{line[ks[0]]['ceiling']['median']:.1f}", *cells)
    console.print(table)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench.microkernel", description=__doc__.split("\n")[0])
    parser.add_argument("--k", nargs="+", type=int, default=[64, 128, 256])
    parser.add_argument("--rounds", type=int, default=25)
    csv_results.add_arguments(parser)
    args = parser.parse_args(argv)
    data = csv_results.obtain(
        args,
        lambda: {
            **describe_run(csv_results.settings(args)),
            "results": measure(args.k, args.rounds, Console(stderr=True)),
        },
    )
    console = Console()
    print_table(data["results"], console if console.is_terminal else Console(width=120))


if __name__ == "__main__":
    main()
