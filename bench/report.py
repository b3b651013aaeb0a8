"""What bench/op.py measured, as terminal tables, as the docs' Markdown table, and as a PNG of bars and a roofline.

Everything is computed from the data of a run. A row is one layer in one layout: ours against stock and against the
fastest candidate but ours ("best peer", stock included) of that layout, by the medians of the rounds or by the best.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.harness import by_name, geometric_mean


@dataclass(frozen=True)
class Row:
    """One layer in one layout."""

    label: str
    nets: str
    batch: int
    dtype: str
    layout: str
    flops: int
    ceiling: float  # GFLOP/s of multiply-adds from registers
    intensity: float  # operations per byte
    ours_us: float  # the functional
    prepacked_us: float  # the module with a prepacked weight; the functional where there is nothing to pack
    stock_us: float
    peer: str
    peer_us: float

    def gflops(self, microseconds: float) -> float:
        return self.flops / microseconds * 1e-3

    @property
    def percent(self) -> float:
        """Of the multiply-add ceiling."""
        return 100 * self.gflops(self.ours_us) / self.ceiling

    @property
    def over_stock(self) -> float:
        return self.stock_us / self.ours_us

    @property
    def over_peer(self) -> float:
        """Ours prepacked, as the peers may have their weights."""
        return self.peer_us / self.prepacked_us

    @property
    def functional_over_peer(self) -> float:
        return self.peer_us / self.ours_us


def rows(data: dict[str, Any], by: str = "median") -> list[Row]:
    """Of a run, in its order; ``by`` is "median" or "best"."""
    found = []
    for result in data["results"]:
        for layout in ("NCHW", "NHWC"):
            here = by_name(result, layout, f"{by}_us")
            if "ours" not in here:
                continue
            ours, stock = here.pop("ours"), here["stock"]
            prepacked = here.pop("ours_prepacked", ours)
            peer, peer_us = min(here.items(), key=lambda item: item[1])
            found.append(
                Row(
                    label=result["label"],
                    nets=result["nets"],
                    batch=result["layer"]["n"],
                    dtype=result["dtype"],
                    layout=layout,
                    flops=result["flops"],
                    ceiling=result["ceiling_gflops"][by],
                    intensity=result["flops"] / result["bytes"],
                    ours_us=ours,
                    prepacked_us=prepacked,
                    stock_us=stock,
                    peer=peer,
                    peer_us=peer_us,
                )
            )
    return found


def _kind(data: dict[str, Any]) -> str:
    return "forward + backward" if data["arguments"]["train"] else "forward"


def title(data: dict[str, Any]) -> str:
    """The machine, the versions and the ceilings in one line."""
    machine, threads = data["machine"], data["arguments"]["threads"]
    copy = data["ceilings"]["copy_gbs"][str(threads)]["median"]
    fma = []
    for dtype in data["arguments"]["dtype"]:
        measured = data["ceilings"]["fma_gflops"]
        rates = measured.get(dtype, measured["float32"])
        isa, rate = max(((i, r[str(threads)]["median"]) for i, r in rates.items()), key=lambda x: x[1])
        fma.append(f"{dtype} FMA {rate:.0f} GFLOP/s ({isa})")
    return (
        f"{machine['cpu']} (family-model-stepping {machine['family-model-stepping']}), {threads} threads, kernels for "
        f"{data['build']['isa']}, torch {data['versions']['torch']}; ceilings: {', '.join(fma)}, copy {copy:.0f} GB/s; "
        f"pages {data.get('pages', 'as malloc has them')}"
    )


def _ratio(value: float) -> Text:
    return Text(f"{value:.2f}", style="bold red" if value < 1 else "")


def print_tables(data: dict[str, Any], console: Console, by: str = "median") -> None:
    """Per layer, then the summary; losses in red and by name."""
    found = rows(data, by)
    if not console.is_terminal:
        console = Console(width=150)
    table = Table(title=f"relu(conv1x1(x, w) + b), {_kind(data)}; microseconds: {by} of the rounds")
    for name in ("layer", "dtype", "layout"):
        table.add_column(name, no_wrap=True)
    for name in ("ours us", "GFLOP/s", "% FMA", "stock us", "x stock", "prepacked us", "peer us", "x peer"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("best peer", no_wrap=True)
    last = ""
    for r in found:
        new = r.label != last
        table.add_row(
            r.label if new else "", r.dtype, r.layout, f"{r.ours_us:.1f}", f"{r.gflops(r.ours_us):.1f}",
            f"{r.percent:.0f}", f"{r.stock_us:.1f}", _ratio(r.over_stock), f"{r.prepacked_us:.1f}", f"{r.peer_us:.1f}",
            _ratio(r.over_peer), r.peer,
        )  # fmt: skip
        last = r.label
    console.print(table)
    console.print(title(data), highlight=False)
    if data["other_work"] > 0.05:
        console.print(f"Other processes used {data['other_work']:.0%} of the machine: not a run to quote.", style="red")
    for line in summary(data, by):
        console.print(line, highlight=False)
    reasons: dict[str, list[str]] = {}
    for result in data["results"]:
        for key, reason in result["skipped"].items():
            reasons.setdefault(f"{key}: {reason}", []).append(result["label"])
    for reason, labels in reasons.items():
        console.print(f"not run: {reason} ({len(labels)} of {len(data['results'])} layers)", highlight=False)


def summary(data: dict[str, Any], by: str = "median") -> list[str]:
    """Geometric means, the worst layer, and every loss by name, per dtype and layout."""
    lines = []
    found = rows(data, by)
    for dtype, layout in dict.fromkeys((r.dtype, r.layout) for r in found):
        here = [r for r in found if (r.dtype, r.layout) == (dtype, layout)]
        comparisons = [("stock", "over_stock"), ("best peer", "over_peer")]
        if any(r.prepacked_us != r.ours_us for r in here):
            comparisons.append(("best peer, without prepacking", "functional_over_peer"))
        for what, ratio in comparisons:
            ratios = [getattr(r, ratio) for r in here]
            worst = min(here, key=lambda r: getattr(r, ratio))
            by_peer = "" if what == "stock" else f" ({worst.peer})"
            lost = [f"{r.label} ({getattr(r, ratio):.2f})" for r in here if getattr(r, ratio) < 1]
            lines.append(
                f"{dtype} {layout}, {_kind(data)}: {geometric_mean(ratios):.2f}x {what} (geometric mean of {len(here)} "
                f"layers), worst {min(ratios):.2f}x on {worst.label}{by_peer}; slower than {what} on {len(lost)}"
                + (": " + ", ".join(lost) if lost else "")
            )
    return lines


def markdown(data: dict[str, Any], by: str = "median") -> str:
    """The docs' table: GFLOP/s, ratios of medians, and the summary with the losses."""
    found = rows(data, by)
    several = len({r.dtype for r in found}) > 1
    header = (
        "N x C_in -> C_out, HxW",
        "layout",
        "ours",
        "% of FMA",
        "stock",
        "x stock",
        "best peer",
        "x best peer, ours prepacked",
    )
    lines = [
        f"{_kind(data).capitalize()}, {title(data)}.",
        f"GFLOP/s, {by} of {data['arguments']['rounds']} interleaved rounds.",
        "",
        f"| {' | '.join(header)} |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for r in found:
        ours, stock, peer = (f"{r.gflops(us):.3g}" for us in (r.ours_us, r.stock_us, r.peer_us))
        layout = f"{r.layout} {r.dtype}" if several else r.layout
        cells = (r.label, layout, ours, f"{r.percent:.0f}", stock, f"{r.over_stock:.2f}", f"{peer} ({r.peer})")
        lines.append(f"| {' | '.join(cells)} | {r.over_peer:.2f} |")
    return "\n".join([*lines, "", *(f"- {line}" for line in summary(data, by))])


_COLORS = {"NCHW": "#1f77b4", "NHWC": "#ff7f0e"}


def plot(data: dict[str, Any], path: Path, by: str = "median") -> None:
    """Bars of the speedup over stock per layer, one panel a batch size; beside them the roofline (forward only)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = rows(data, by)
    groups = list(dict.fromkeys((r.dtype, r.batch) for r in found))
    tallest = max(len({r.label for r in found if (r.dtype, r.batch) == g}) for g in groups)
    roofline = not data["arguments"]["train"]
    widths = [5.0] * len(groups) + ([7.5] if roofline else [])
    height = max(5.5, 0.24 * tallest + 2)
    figure, axes = plt.subplots(
        1, len(widths), figsize=(sum(widths), height), width_ratios=widths, squeeze=False, layout="constrained"
    )
    for axis, group in zip(axes[0], groups, strict=False):
        _bars(axis, [r for r in found if (r.dtype, r.batch) == group], group)
    if roofline:
        _roofline(axes[0][-1], data, found)
        axes[0][-1].set_box_aspect(min(0.8, height / 7.5))
        axes[0][-1].set_anchor("N")
    figure.suptitle(f"relu(conv1x1(x, w) + b), {_kind(data)}\n{title(data).replace('; ', chr(10))}", fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _bars(axis: Any, found: list[Row], group: tuple[str, int]) -> None:
    labels = list(dict.fromkeys(r.label for r in found))
    layouts = list(dict.fromkeys(r.layout for r in found))
    thick = 0.8 / len(layouts)
    for i, layout in enumerate(layouts):
        here = [r for r in found if r.layout == layout]
        at = [labels.index(r.label) + (i - (len(layouts) - 1) / 2) * thick for r in here]
        # From 1 to the ratio, on a logarithmic axis: losses go to the left.
        axis.barh(
            at,
            [r.over_stock - 1 for r in here],
            thick,
            left=1,
            color=_COLORS[layout],
            label=f"ours over stock {layout}",
        )
        ticks = [r.over_stock / r.over_peer for r in here]
        axis.scatter(ticks, at, s=14, marker="|", color="black", zorder=3, label="" if i else "best peer over stock")
    axis.axvline(1, color="grey", linewidth=0.8)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}" if value >= 1 else f"1/{1 / value:g}")
    axis.grid(True, axis="x", linewidth=0.3)
    axis.set_axisbelow(True)
    axis.set_yticks(range(len(labels)), labels, fontsize=7)
    axis.set_ylim(len(labels) - 0.4, -0.6)
    axis.set_xlabel("speed over stock of the same layout")
    axis.set_title(f"{group[0]}, batch {group[1]}", fontsize=10)
    axis.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -45 / axis.figure.get_figheight() / 72), ncols=2)


def _roofline(axis: Any, data: dict[str, Any], found: list[Row]) -> None:
    threads = str(data["arguments"]["threads"])
    copy = data["ceilings"]["copy_gbs"][threads]["median"]
    low, high = min(r.intensity for r in found) / 1.5, max(r.intensity for r in found) * 1.5
    for dtype in data["arguments"]["dtype"]:
        peak = max(r[threads]["median"] for r in data["ceilings"]["fma_gflops"][dtype].values())
        x = [low, min(max(peak / copy, low), high), high]
        axis.plot(x, [min(peak, copy * v) for v in x], color="black", linewidth=1)
        axis.annotate(
            f"{dtype} FMA {peak:.0f} GFLOP/s", (high, peak), ha="right", va="bottom", fontsize=8, xytext=(0, 2),
            textcoords="offset points",
        )  # fmt: skip
    axis.plot([], [], color="black", linewidth=1, label=f"ceiling: FMA, or copy bandwidth {copy:.0f} GB/s")
    for layout in dict.fromkeys(r.layout for r in found):
        here = [r for r in found if r.layout == layout]
        x = [r.intensity for r in here]
        color = _COLORS[layout]
        axis.scatter(x, [r.gflops(r.ours_us) for r in here], s=16, color=color, label=f"ours {layout}", zorder=3)
        axis.scatter(
            x, [r.gflops(r.stock_us) for r in here], s=16, facecolors="none", edgecolors=color, label=f"stock {layout}"
        )
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    for set_format in (axis.xaxis.set_major_formatter, axis.yaxis.set_major_formatter):
        set_format(lambda value, _: f"{value:g}")
    axis.set_xlabel("operations per byte moved (x, w and y once each)")
    axis.set_ylabel("GFLOP/s")
    axis.grid(True, linewidth=0.3)
    axis.set_title("roofline: a dot above it was served from cache", fontsize=10)
    axis.legend(fontsize=7, loc="lower right")
