"""Every table of figures in README.md and docs/, made from bench/results: ``python -m bench.readme``.

A table stands between ``<!-- bench:NAME ARGUMENTS -->`` and ``<!-- /bench:NAME -->``; NAME is a function of this module
and ARGUMENTS are its words. ``--check`` changes nothing and exits with status 1 where a file is not up to date.
Ratios are of medians, above 1 where ours is faster. Each table ends with its machine, commit and date.
"""

from __future__ import annotations

import argparse
import functools
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

if not __package__:  # python bench/readme.py
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import csv_results, cuda_report, report
from bench.harness import Layer, geometric_mean

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
FILES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LAYOUTS = ("NCHW", "NHWC")
MACHINES = {
    "xeon_amx": "Xeon with AMX",
    "xeon_shared": "Xeon, AMX shared",
    "epyc": "EPYC with AVX-512",
    "h100": "H100",
}
# What a run's file is called: how its rows begin. A machine need not have all of them.
RUNS = {
    "cpu_fprop": "forward",
    "cpu_train": "training",
    "cpu_train_64": "training",
    "cpu_fprop_avx2": "forward, AVX2 on both sides",
    "cpu_fprop_float16": "forward",
    "cpu_fprop_fresh_pages": "forward, malloc as it comes",
    "cpu_fprop_compile": "forward, against torch.compile",
    "cpu_fprop_shufflenet": "forward, ShuffleNet's groups",
    "cuda_bfloat16": "",
}
NETS = {
    "mobilenet_v2": "MobileNetV2",
    "squeezenet": "SqueezeNet 1.1",
    "googlenet": "GoogLeNet",
    "nin": "Network in Network",
}


@functools.cache
def load(machine: str, name: str) -> dict[str, Any]:
    return csv_results.read(RESULTS / machine / f"{name}.csv")


def runs(machine: str) -> list[str]:
    """Those of RUNS that this machine has."""
    return [name for name in RUNS if (RESULTS / machine / f"{name}.csv").exists()]


class Comparison(NamedTuple):
    """One layer in one layout, one dtype and one direction."""

    label: str
    nets: str
    batch: int
    dtype: str
    layout: str
    train: bool
    stock: float
    peer: float
    peer_name: str

    @property
    def shape(self) -> str:
        """The label without the batch."""
        return self.label.split("x ", 1)[1]


def comparisons(machine: str, name: str, cuda_key: str = "graph_us") -> list[Comparison]:
    """On CUDA by the time of CUDA graphs, or ("median_us") of calls from Python."""
    data = load(machine, name)
    if "device" not in data:
        train = data["arguments"]["train"]
        return [
            Comparison(r.label, r.nets, r.batch, r.dtype, r.layout, train, r.over_stock, r.over_peer, r.peer)
            for r in report.rows(data)
        ]
    found = []
    for r in data["results"]:
        for layout in LAYOUTS:
            compared = cuda_report.compare(r, layout, cuda_key)
            if compared is not None:
                _, stock, peer, peer_name = compared
                what = r["label"], r["nets"], r["layer"]["n"], r["dtype"], layout, r["train"]
                found.append(Comparison(*what, stock, peer, peer_name))
    return found


def source(machine: str, *names: str) -> str:
    """Machine, commit and date of these runs: the line below a table."""
    by_run: dict[str, list[str]] = {}
    for name in names:
        data = load(machine, name)
        busy = data.get("other_work", 0)
        note = f", while other processes used {busy:.0%} of the machine" if busy > 0.05 else ""
        by_run.setdefault(f"commit {data['commit']}, {data['date'][:10]}{note}", []).append(name)
    data = load(machine, names[0])
    what = f"torch {data['versions']['torch']}"
    if "threads" in data["arguments"] and "device" not in data:
        what = f"{data['arguments']['threads']} threads, {what}"
    own = data["machine"]
    device = data["device"]["name"] if "device" in data else f"{own['cpu']} {own['family-model-stepping']}"
    runs = [run + (f" ({', '.join(own)})" if len(by_run) > 1 else "") for run, own in by_run.items()]
    return f"{MACHINES[machine]}: {device}, {what}; {'; '.join(runs)}."


def table(head: Sequence[str], rows: Sequence[Sequence[str]], sources: Sequence[str], words: int = 1) -> str:
    """Markdown; the first ``words`` columns to the left, the others to the right."""
    ruler = ["---" if i < words else "--:" for i in range(len(head))]
    lines = [f"| {' | '.join(head)} |", f"|{'|'.join(ruler)}|", *(f"| {' | '.join(row)} |" for row in rows), ""]
    return "\n".join([*lines, _fill(" ".join(sources))])


def _fill(text: str) -> str:
    indent = "  " if text.startswith("- ") else ""
    return textwrap.fill(text, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _mean(found: Sequence[Comparison], of: str = "stock") -> float:
    return geometric_mean([getattr(c, of) for c in found])


def _worst(found: Sequence[Comparison], of: str = "stock") -> Comparison:
    return min(found, key=lambda c: float(getattr(c, of)))


def gain() -> str:
    """README's first table: the mean over stock and the slowest layer, a line a machine and dtype."""
    lines = [
        ("Xeon with AMX, bfloat16", "xeon_amx", "bfloat16", "cpu_fprop", "cpu_train"),
        ("Xeon with AMX, float32", "xeon_amx", "float32", "cpu_fprop", "cpu_train"),
        ("EPYC with AVX-512, bfloat16", "epyc", "bfloat16", "cpu_fprop", "cpu_train"),
        ("EPYC with AVX-512, float32", "epyc", "float32", "cpu_fprop", "cpu_train"),
        ("the same EPYC, AVX2 on both sides, float32", "epyc", "float32", "cpu_fprop_avx2", ""),
        ("H100, bfloat16 (young kernels)", "h100", "bfloat16", "cuda_bfloat16", "cuda_bfloat16"),
    ]
    rows = []
    for title, machine, dtype, *names in lines:
        cells = []
        for train, name in zip((False, True), names, strict=True):
            for layout in LAYOUTS:
                everything = comparisons(machine, name) if name else []
                found = [c for c in everything if (c.dtype, c.layout, c.train) == (dtype, layout, train)]
                cells.append(f"{_mean(found):.2f} ({_worst(found).stock:.2f})" if found else "not measured")
        rows.append((title, *cells))
    sources = [
        source("xeon_amx", "cpu_fprop", "cpu_train"),
        source("epyc", "cpu_fprop", "cpu_train", "cpu_fprop_avx2"),
        source("h100", "cuda_bfloat16"),
    ]
    return table(("", *(f"{what} {layout}" for what in ("forward", "training") for layout in LAYOUTS)), rows, sources)


def losses() -> str:
    """How many layers are slower than stock, and than the best peer, and the lowest ratio."""
    rows, sources = [], []
    for machine in MACHINES:
        names = [n for n in ("cpu_fprop", "cpu_train", "cpu_fprop_avx2", "cuda_bfloat16") if n in runs(machine)]
        sources.append(source(machine, *names))
        groups: dict[str, list[Comparison]] = {}
        for name in names:
            for c in comparisons(machine, name):
                title = f"{MACHINES[machine]}, {c.dtype}{', AVX2 on both sides' if name.endswith('avx2') else ''}"
                groups.setdefault(title, []).append(c)
        for title, found in groups.items():
            cells = []
            for train in (False, True):
                here = [c for c in found if c.train == train]
                for of in ("stock", "peer"):
                    ratios = [getattr(c, of) for c in here]
                    cells.append(f"{sum(r < 1 for r in ratios)} of {len(here)}, {min(ratios):.2f}" if here else "")
            rows.append((title, *cells))
    head = ("", "forward: slower than stock", "than the best peer", "training: slower than stock", "than the best peer")
    return table(head, rows, sources)


def summary(machine: str) -> str:
    """Mean, worst layer and how many are at least as fast, over stock and over the best peer, for every run."""
    rows = []
    for name in runs(machine):
        cuda = {"graph_us": ", as a CUDA graph", "median_us": ", called from Python"}
        for key, how in cuda.items() if name.startswith("cuda") else [("", "")]:
            found = comparisons(machine, name, key)
            for train, dtype, batch, layout in dict.fromkeys((c.train, c.dtype, c.batch, c.layout) for c in found):
                here = [c for c in found if (c.train, c.dtype, c.batch, c.layout) == (train, dtype, batch, layout)]
                title = RUNS[name] or ("training" if train else "forward")
                rows.append(
                    (f"{title}{how}, N={batch}, {dtype} {layout}", _figures(here, "stock"), _figures(here, "peer"))
                )
    return table(("", "over stock", "over the best peer"), rows, [source(machine, *runs(machine))])


def _figures(found: Sequence[Comparison], of: str) -> str:
    worst, at_least = _worst(found, of), sum(getattr(c, of) >= 1 for c in found)
    return f"{_mean(found, of):.2f}, worst {getattr(worst, of):.2f} ({worst.shape}), {at_least} of {len(found)}"


def _below(ratio: float) -> str:
    """Of less than 1, and seen to be."""
    return f"{ratio:.2f}" if ratio < 0.995 else f"{ratio:.4f}"


def slower(machine: str) -> str:
    """Every layer that is slower than stock, by name, and those that only another peer beats."""
    items = []
    titles = {**RUNS, "cpu_fprop_more": "forward, other networks"}
    names = [name for name in titles if (RESULTS / machine / f"{name}.csv").exists()]
    for name in names:
        found = comparisons(machine, name)
        for train, dtype, batch in dict.fromkeys((c.train, c.dtype, c.batch) for c in found):
            here = [c for c in found if (c.train, c.dtype, c.batch) == (train, dtype, batch)]
            what = f"{titles[name] or ('training' if train else 'forward')}, N={batch}, {dtype}"
            lost = [f"{c.shape} {c.layout} ({_below(c.stock)})" for c in here if c.stock < 1]
            other = [f"{c.shape} {c.layout} ({c.peer_name}, {_below(c.peer)})" for c in here if c.peer < 1 <= c.stock]
            if lost:
                items.append(f"- {what}: slower than stock on {len(lost)} of {len(here)}: {', '.join(lost)}.")
            if other:
                items.append(
                    f"- {what}: slower than another peer alone on {len(other)} of {len(here)}: {', '.join(other)}."
                )
    return "\n".join([*map(_fill, items), "", _fill(source(machine, *names))])


def layers(machine: str, dtype: str) -> str:
    """A line a layer: over stock (over the best peer)."""
    columns = [("cpu_fprop", layout, n) for layout in LAYOUTS for n in (1, 16)]
    columns += [("cpu_train", layout, 16) for layout in LAYOUTS]
    cells: dict[str, list[str]] = {}
    means = []
    for name, layout, batch in columns:
        found = [c for c in comparisons(machine, name) if (c.dtype, c.layout, c.batch) == (dtype, layout, batch)]
        for c in found:
            cells.setdefault(c.shape, []).append(f"{c.stock:.2f} ({c.peer:.2f})")
        means.append(f"**{_mean(found):.2f} ({_mean(found, 'peer'):.2f})**")
    rows = [(shape, *own) for shape, own in cells.items()]
    head = [f"{'training ' if name == 'cpu_train' else ''}{layout}, N={n}" for name, layout, n in columns]
    rows.append(("**geometric mean**", *means))
    return table((f"{dtype}, layer", *head), rows, [source(machine, "cpu_fprop", "cpu_train")])


def networks(machine: str) -> str:
    """float32 forward of other networks' layers: over stock (over the best peer), geometric means."""
    found = [c for name in ("cpu_fprop", "cpu_fprop_more") for c in comparisons(machine, name) if c.dtype == "float32"]

    def row(title: str, chosen: Sequence[Comparison]) -> tuple[str, ...]:
        count = len({c.shape for c in chosen})
        groups = [[c for c in chosen if (c.layout, c.batch) == (lay, n)] for lay in LAYOUTS for n in (1, 16)]
        return (f"{title}, {count} layers", *(f"{_mean(g):.2f} ({_mean(g, 'peer'):.2f})" for g in groups))

    rows = [row(title, [c for c in found if net in c.nets.split()]) for net, title in NETS.items()]
    rows.append(row("with seed and ResNet-50, all", found))
    head = ("", *(f"{layout}, N={n}" for layout in LAYOUTS for n in (1, 16)))
    return table(head, rows, [source(machine, "cpu_fprop", "cpu_fprop_more")])


def float16(machine: str) -> str:
    """Our float16 over our float32, both with prepacked weights where there is something to pack."""
    found = report.rows(load(machine, "cpu_fprop_float16_own"))
    times = {(r.dtype, r.label, r.layout): r.ours_us for r in found}
    rows = []
    for layout in LAYOUTS:
        ratios = {
            label: times["float32", label, layout] / us
            for (dtype, label, own), us in times.items()
            if (dtype, own) == ("float16", layout)
        }
        worst = min(ratios, key=lambda label: ratios[label])
        rows.append((layout, f"{geometric_mean(list(ratios.values())):.2f}", f"{ratios[worst]:.2f} ({worst})"))
    head = ("our float16 over our float32", "geometric mean", "worst")
    return table(head, rows, [source(machine, "cpu_fprop_float16_own")])


def every(machine: str) -> str:
    """GFLOP/s of every layer, and the losses by name."""
    lines = report.markdown(load(machine, "cpu_fprop")).split("\n")
    wrapped = [line if line.startswith("|") else _fill(line) for line in lines]
    return "\n".join([*wrapped, "", _fill(source(machine, "cpu_fprop"))])


def scaling(machine: str) -> str:
    """t1 / (T tT)."""
    groups: dict[str, list[float]] = {}
    for e in load(machine, "cpu_scaling")["results"]:
        if e["name"] == "ours":
            what = f"{e['dtype']} {e['layout']} {'training' if e['train'] else 'forward'}"
            groups.setdefault(what, []).append(e["efficiency"])
    rows = [(what, f"{geometric_mean(own):.2f}", f"{min(own):.2f}") for what, own in groups.items()]
    return table(("two threads over one", "geometric mean", "worst"), rows, [source(machine, "cpu_scaling")])


def small_calls(machine: str) -> str:
    """Microseconds a call."""
    rows = []
    for entry in load(machine, "cpu_small_calls")["results"]:
        calls: dict[str, dict[str, float]] = {name.split(" | ")[0]: {} for name in entry["calls"]}
        for name, stats in entry["calls"].items():
            kind, who = name.split(" | ")
            calls[kind][who] = stats["median_us"]
        for kind, us in calls.items():
            title = f"{kind}, {entry['c_in']}->{entry['c_out']} on {'x'.join(map(str, entry['input']))}"
            rows.append((title, *(f"{us[who]:.1f}" if who in us else "" for who in ("ours", "stock", "linear"))))
            if "F.linear alone" in us:
                rows.append(("F.linear alone, 4x4", "", "", f"{us['F.linear alone']:.1f}"))
    head = ("microseconds a call", "ours", "stock", "F.linear + ReLU")
    return table(head, rows, [source(machine, "cpu_small_calls")])


def heads(machine: str) -> str:
    """Pooled heads; "at most" is stock over the multiply-adds' time at the ceiling of the same run."""
    data = load(machine, "cpu_blocks")
    pairs = [e for e in data["results"] if e["block"] == "pair"]
    rates = [(Layer(**e["layer"]).flops + Layer(**e["second"]).flops) / e["fma_us"] for e in pairs]
    rate = sorted(rates)[len(rates) // 2]
    rows = []
    for e in (e for e in data["results"] if e["block"] == "head"):
        us, layer = {name: stats["median_us"] for name, stats in e["calls"].items()}, Layer(**e["layer"])
        most = us["stock"] * rate / (layer.flops * (3 if e["train"] else 1))
        times = [f"{us[who]:.0f}" for who in ("ours", "unfused", "stock")]
        title = f"{layer}, {'training' if e['train'] else 'forward'}"
        rows.append((title, e["layout"], *times, f"{us['stock'] / us['ours']:.2f}", f"{most:.1f}"))
    head = ("pooled head, microseconds", "layout", "ours", "unfused", "stock", "x stock", "at most")
    return table(head, rows, [source(machine, "cpu_blocks")], words=2)


def microkernels(machine: str) -> str:
    """GFLOP/s of whole tiles in cache, rows and columns of A, and the share of the ceiling of the same arithmetic."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for e in load(machine, "cpu_microkernel")["results"]:
        groups.setdefault(e["kernel"], []).append(e)

    def span(values: Sequence[float]) -> str:
        low, high = f"{min(values):.0f}", f"{max(values):.0f}"
        return low if low == high else f"{low}-{high}"

    ks = sorted({e["k"] for own in groups.values() for e in own})
    rows = []
    for name, own in groups.items():
        rates = [span([e["gflops"]["median"] for e in own if e["k"] == k]) for k in ks]
        share = span([100 * e["gflops"]["median"] / e["ceiling"]["median"] for e in own])
        rows.append((name, *rates, f"{own[0]['ceiling']['median']:.0f}", share))
    head = ("GFLOP/s, one thread", *(f"k = {k}" for k in ks), "ceiling", "% of it")
    return table(head, rows, [source(machine, "cpu_microkernel")])


TABLES: dict[str, Callable[..., str]] = {
    f.__name__: f
    for f in (
        gain,
        losses,
        summary,
        slower,
        layers,
        networks,
        float16,
        every,
        scaling,
        small_calls,
        heads,
        microkernels,
    )
}
_MARKED = re.compile(r"(<!-- bench:(\w+)((?: \w+)*) -->\n).*?(<!-- /bench:\2 -->)", re.DOTALL)


def regenerate(text: str) -> str:
    """The same text with every table as bench/results has it.

    Raises:
        ValueError: a marker that has no table, or no end.
    """

    def fill(match: re.Match[str]) -> str:
        begin, name, arguments, end = match.groups()
        if name not in TABLES:
            raise ValueError(f"bench:{name}: no such table; there are {', '.join(TABLES)}")
        return f"{begin}{TABLES[name](*arguments.split())}\n{end}"

    new, count = _MARKED.subn(fill, text)
    if not count == text.count("<!-- bench:") == text.count("<!-- /bench:"):
        raise ValueError("a bench marker without its end, or with another one's")
    return new


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.readme", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; status 1 where a file is not up to date")
    args = parser.parse_args(argv)
    stale = []
    for path in FILES:
        old = path.read_text()
        new = regenerate(old)
        if new != old:
            stale.append(str(path.relative_to(ROOT)))
            if not args.check:
                path.write_text(new)
    if stale:
        print(f"{'not up to date: ' if args.check else 'written: '}{', '.join(stale)}")
    return 1 if args.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
