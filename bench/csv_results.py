"""Results as CSV: what a benchmark measured, one line a layer (or call, or microkernel), below its metadata.

A file begins with lines ``# key: value``, the value in JSON: commit, date, machine, versions, arguments and whatever
else concerns the whole run. The table follows. Nested entries become columns named by the path that leads to them
("peers/ours NCHW/median_us"); an empty cell means that this line has no such entry. ``read`` gives back exactly what
``write`` was given, so every report can be made from a file.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

TABLE = "results"  # the entry of a run that becomes the table; all others are metadata
SEPARATOR = "/"


def _flatten(entry: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Cells by column."""
    cells = {}
    for key, value in entry.items():
        if SEPARATOR in key:
            raise ValueError(f"{key!r}: a key with {SEPARATOR!r} cannot be part of a column's name")
        if isinstance(value, dict) and value:
            cells.update(_flatten(value, f"{prefix}{key}{SEPARATOR}"))
        else:
            cells[prefix + key] = _cell(value)
    return cells


def _cell(value: Any) -> str:
    """JSON, but words as they are: only a string that would be read as something else is quoted."""
    if isinstance(value, str) and value and _value(value) == value:
        return value
    return json.dumps(value)


def _value(cell: str) -> Any:
    try:
        return json.loads(cell)
    except json.JSONDecodeError:
        return cell


def _unflatten(cells: dict[str, str]) -> dict[str, Any]:
    entry: dict[str, Any] = {}
    for column, cell in cells.items():
        if cell:
            *path, key = column.split(SEPARATOR)
            target = entry
            for step in path:
                target = target.setdefault(step, {})
            target[key] = _value(cell)
    return entry


def write(path: Path, data: dict[str, Any]) -> None:
    """One run."""
    rows = [_flatten(entry) for entry in data[TABLE]]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        for key, value in data.items():
            if key != TABLE:
                file.write(f"# {key}: {json.dumps(value)}\n")
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read(path: Path) -> dict[str, Any]:
    """What ``write`` was given."""
    data: dict[str, Any] = {}
    with path.open(newline="") as file:
        for line in file:
            if not line.startswith("# "):
                break
            key, value = line[2:].split(": ", 1)
            data[key] = json.loads(value)
        else:
            raise ValueError(f"{path}: no table")
        columns = next(csv.reader([line]))
        data[TABLE] = [_unflatten(cells) for cells in csv.DictReader(file, columns)]
    return data


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where results go, and a former run in place of a new one."""
    parser.add_argument("--json", metavar="OUT", type=Path)
    parser.add_argument("--csv", metavar="OUT", type=Path, help="as bench/results has them")
    parser.add_argument("--from-csv", metavar="FILE", type=Path, help="report a former run, time nothing")


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments that say how a run was measured."""
    return {k: v for k, v in vars(args).items() if k not in ("json", "csv", "from_csv", "plot", "markdown", "by")}


def obtain(args: argparse.Namespace, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The former run that was asked for, or a new one; written where the arguments say."""
    data = read(args.from_csv) if args.from_csv else measure()
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(data, indent=1) + "\n")
    if args.csv:
        write(args.csv, data)
    return data
