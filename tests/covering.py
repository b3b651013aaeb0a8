"""Covering arrays in place of full products of parameters, for tests whose factors are independent.

    @cover(case=CASES, layout=FORMATS, dtype=DTYPES)            # pairwise
    @cover(3, where=..., bad=..., dtype=...)                     # 3-wise
    @cover(whole=("dtype", "grad"), dtype=..., grad=..., activation=...)
    @cover(keep=lambda stride, groups: stride == 1 or groups == 1, stride=..., groups=...)

Every combination of values of any two factors occurs in a test (of any three with strength 3, of all those named in
`whole`), but those that no row which `keep` allows contains. Which rows these are, CONV1X1_TEST_SEED decides, so that
runs with different seeds meet different ones. CONV1X1_TEST_FULL=1 (`make test-full`) runs the whole product; a test has
the same name in both.
"""

from __future__ import annotations

import heapq
import inspect
import itertools
import os
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest

Row = tuple[Any, ...]
Indices = tuple[int, ...]


def full() -> bool:
    """Whether whole products are asked for."""
    return os.environ.get("CONV1X1_TEST_FULL", "") == "1"


def name_of(value: object) -> str:
    """A value's part of a test's name."""
    if isinstance(value, tuple) and value and all(isinstance(v, str) for v in value):
        return "-".join(value)
    return getattr(value, "__name__", None) or str(value)


def subsets(count: int, strength: int, whole: Sequence[int] = ()) -> list[Indices]:
    """The sets of factors whose values must meet in every combination."""
    chosen = list(itertools.combinations(range(count), min(strength, count)))
    return [*chosen, tuple(whole)] if len(whole) > strength else chosen


def tuples_of(row: Indices, sets: Iterable[Indices]) -> set[tuple[Indices, Indices]]:
    """What a row covers: each set of factors with the row's values of them."""
    return {(chosen, tuple(row[i] for i in chosen)) for chosen in sets}


def covering_array(rows: Sequence[Indices], sets: Sequence[Indices], generator: random.Random) -> list[Indices]:
    """Some of the rows, in their order, that cover all that the rows do: always one that covers most of what is left.

    What a row covers anew only ever becomes less, so a row whose count was brought up to date and is still the largest
    is the best one, and few counts need to be.
    """
    covers = {row: tuples_of(row, sets) for row in rows}
    left = set().union(*covers.values())
    heap = [(-len(found), generator.random(), row) for row, found in covers.items()]
    heapq.heapify(heap)
    chosen = set()
    while left:
        _, tie, row = heapq.heappop(heap)
        fresh = len(covers[row] & left)
        if heap and fresh < -heap[0][0]:
            heapq.heappush(heap, (-fresh, tie, row))
            continue
        chosen.add(row)
        left -= covers[row]
    return [row for row in rows if row in chosen]


def rows_of(
    factors: dict[str, Sequence[Any]],
    strength: int = 2,
    *,
    whole: Sequence[str] = (),
    keep: Callable[..., bool] | None = None,
    seed: str = "",
) -> list[Row]:
    """The rows of a covering array, or of the whole product where that is asked for, in the product's order.

    Args:
        factors: the values of each factor.
        keep: takes some of the factors by name and says whether a row may occur.
        seed: which of the arrays.

    Raises:
        ValueError: a factor without values, a name that is no factor, or no row that may occur.
    """
    names = list(factors)
    asked = list(inspect.signature(keep).parameters) if keep else []
    unknown = [name for name in (*whole, *asked) if name not in factors]
    if unknown or not all(map(len, factors.values())):
        raise ValueError(f"covering array of {names}: unknown {unknown}, or a factor without values")
    values = [list(v) for v in factors.values()]
    rows: list[Indices] = list(itertools.product(*(range(len(v)) for v in values)))
    if keep is not None:
        places = {name: names.index(name) for name in asked}
        rows = [row for row in rows if keep(**{name: values[i][row[i]] for name, i in places.items()})]
    if not rows:
        raise ValueError(f"covering array of {names}: no row may occur")
    if not full():
        sets = subsets(len(names), strength, [names.index(name) for name in whole])
        rows = covering_array(rows, sets, random.Random(seed))
    return [tuple(v[i] for v, i in zip(values, row, strict=True)) for row in rows]


def cover(
    strength: int = 2,
    /,
    *,
    whole: Sequence[str] = (),
    keep: Callable[..., bool] | None = None,
    **factors: Iterable[Any],
) -> Callable[[Any], Any]:
    """Parametrizes a test with a covering array of its factors, which it names as its parameters."""

    def decorate(function: Any) -> Any:
        seed = f"{os.environ.get('CONV1X1_TEST_SEED', '0')} {function.__module__}.{function.__qualname__}"
        given = {name: list(values) for name, values in factors.items()}
        rows = rows_of(given, strength, whole=whole, keep=keep, seed=seed)
        ids = ["-".join(map(name_of, row)) for row in rows]
        return pytest.mark.parametrize(list(factors), rows, ids=ids)(function)

    return decorate
