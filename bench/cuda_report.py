"""What ``bench.op --device cuda`` measured, as plain text: rows of layer, dtype, direction and layout; a summary.

"x stock" and "x peer" (the fastest candidate but ours, stock included) are ratios of medians, below 1 where ours loses:
those rows are marked and listed by name. Eager and CUDA-graph times are separate columns; "% floor" is of the graph's.
"""

from __future__ import annotations

from typing import Any

from bench.harness import by_name, geometric_mean

HEADER = (
    "layer", "dtype", "pass", "layout", "eager us", "x stock", "x peer", "best peer", "graph us", "x stock", "x peer",
    "best peer", "floor us", "% floor",
)  # fmt: skip


def compare(result: dict[str, Any], layout: str, key: str) -> tuple[float, float, float, str] | None:
    """Ours in microseconds, its speed over stock and over the best other candidate, and that one's name."""
    here = by_name(result, layout, key)
    if "ours" not in here or "stock" not in here:
        return None
    ours, stock = here.pop("ours"), here["stock"]
    best = min(here, key=lambda name: here[name])
    return ours, stock / ours, here[best] / ours, best


def _direction(result: dict[str, Any]) -> str:
    return "train" if result["train"] else "forward"


def _row(result: dict[str, Any], layout: str) -> tuple[str, ...] | None:
    eager, graph = compare(result, layout, "median_us"), compare(result, layout, "graph_us")
    if eager is None:
        return None

    def cells(found: tuple[float, float, float, str] | None) -> tuple[str, ...]:
        if found is None:
            return "-", "-", "-", "-"
        us, stock, peer, name = found
        return (f"{us:.1f}", *(f"{r:.2f}{'!' if r < 1 else ' '}" for r in (stock, peer)), name)

    floor = result["floor_us"]
    percent = f"{100 * floor / graph[0]:.0f}" if graph else "-"
    what = (result["label"], result["dtype"], _direction(result), layout)
    return *what, *cells(eager), *cells(graph), f"{floor:.1f}", percent


def summary(data: dict[str, Any]) -> list[str]:
    """Geometric means and every loss by name, per dtype, direction, layout and way of timing."""
    lines = []
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for result in data["results"]:
        for layout in ("NCHW", "NHWC"):
            groups.setdefault((result["dtype"], _direction(result), layout), []).append(result)
    for (dtype, direction, layout), results in groups.items():
        for key, how in (("median_us", "eager"), ("graph_us", "graph")):
            found = [(r["label"], c) for r in results if (c := compare(r, layout, key)) is not None]
            for what, index in (("stock", 1), ("best peer", 2)) if found else ():
                ratios = [(label, c[index], c[3]) for label, c in found]
                lost = [f"{label} ({r:.2f}{', ' + peer if index == 2 else ''})" for label, r, peer in ratios if r < 1]
                label, worst, _ = min(ratios, key=lambda r: r[1])
                lines.append(
                    f"{dtype} {direction} {layout} {how}: {geometric_mean([r for _, r, _ in ratios]):.2f}x {what} "
                    f"(geometric mean of {len(ratios)}), worst {worst:.2f}x on {label}; slower on {len(lost)}"
                    + (": " + ", ".join(lost) if lost else "")
                )
    return lines


def title(data: dict[str, Any]) -> str:
    device, ceilings = data["device"], data["ceilings"]
    rates = ", ".join(f"{dtype} {rate:.0f} TFLOP/s" for dtype, rate in ceilings["matmul_tflops"].items())
    versions = ", ".join(f"{k} {device[k]}" for k in ("driver", "cuda", "cudnn") if k in device)
    copy = f"copy {ceilings['copy_gbs']:.0f} GB/s"
    return f"{device['name']} ({versions}), torch {data['versions']['torch']}; matmul {rates}; {copy}"


def text(data: dict[str, Any]) -> str:
    """The whole report. "!" marks a ratio below 1."""
    rows = [row for result in data["results"] for layout in ("NCHW", "NHWC") if (row := _row(result, layout))]
    widths = [max(len(row[i]) for row in (HEADER, *rows)) for i in range(len(HEADER))]
    words = {0, 1, 2, 3, 7, 11}

    def line(row: tuple[str, ...]) -> str:
        cells = (c.ljust(w) if i in words else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        return "  ".join(cells).rstrip()

    reasons: dict[str, int] = {}
    for result in data["results"]:
        for key, reason in result["skipped"].items():
            reasons[f"{key}: {reason}"] = reasons.get(f"{key}: {reason}", 0) + 1
    lines = [line(HEADER), *map(line, rows), "", title(data), *summary(data)]
    lines += [f"not run: {reason} ({count} of {len(data['results'])})" for reason, count in reasons.items()]
    if data["left_out"]:
        lines.append(f"left out ({len(data['left_out'])}): {'; '.join(data['left_out'])}")
    if data["other_work"] > 0.05:
        lines.append(f"Other processes used {data['other_work']:.0%} of the CPU: do not quote the eager times.")
    return "\n".join(lines)
