"""Covering arrays cover: every combination that may occur does, by a count that shares nothing with their making."""

import itertools
import os
import random
import subprocess
import sys

import covering
import pytest
from covering import cover, rows_of
from helpers import ROOT

FACTORS = {"a": [1, 2, 3, 4, 5], "b": ["x", "y"], "c": [None, True, 0.5], "d": [7, 8, 9], "e": ["p", "q"]}


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Also where the suite runs whole products."""
    monkeypatch.delenv("CONV1X1_TEST_FULL", raising=False)


def missing(rows, factors, strength, keep=None):
    """The combinations of `strength` factors' values that may occur and are in no row."""
    names = list(factors)
    allowed = [dict(zip(names, row, strict=True)) for row in itertools.product(*factors.values())]
    allowed = [row for row in allowed if keep is None or keep(row)]
    there = [dict(zip(names, row, strict=True)) for row in rows]
    return {
        (chosen, tuple(row[n] for n in chosen))
        for chosen in itertools.combinations(names, strength)
        for row in allowed
        if not any(all(other[n] == row[n] for n in chosen) for other in there)
    }


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("strength", [1, 2, 3, 5])
def test_every_combination_occurs(strength, seed):
    rows = rows_of(FACTORS, strength, seed=str(seed))
    assert not missing(rows, FACTORS, strength)
    assert len(set(rows)) == len(rows)
    product = list(itertools.product(*FACTORS.values()))
    assert rows == [row for row in product if row in rows]
    # The largest factors alone need so many; greedy arrays are not far from it.
    fewest = {1: 5, 2: 15, 3: 45, 5: 180}[strength]
    assert fewest <= len(rows) <= 1.4 * fewest


def test_a_missing_combination_is_found():
    """Or the test above would prove nothing: some row is the only one with some combination."""
    rows = rows_of(FACTORS, 2)
    found = [missing(rows[:i] + rows[i + 1 :], FACTORS, 2) for i in range(len(rows))]
    assert all(found)


def test_rows_that_may_not_occur():
    rows = rows_of(FACTORS, 2, keep=lambda a, c: (a + (c is None)) % 2 == 0)
    keep = lambda row: (row["a"] + (row["c"] is None)) % 2 == 0  # noqa: E731
    assert not missing(rows, FACTORS, 2, keep)
    assert all((a + (c is None)) % 2 == 0 for a, _, c, _, _ in rows)


def test_whole_products_within():
    rows = rows_of(FACTORS, 2, whole=("b", "d", "e"))
    assert not missing(rows, FACTORS, 2)
    assert {(b, d, e) for _, b, _, d, e in rows} == set(itertools.product("xy", [7, 8, 9], "pq"))
    assert len(rows) < 40


def test_seeds_decide():
    again, other = (rows_of(FACTORS, seed=seed) for seed in ("1", "2"))
    assert rows_of(FACTORS, seed="1") == again != other


def test_the_whole_product_where_asked_for(monkeypatch):
    monkeypatch.setenv("CONV1X1_TEST_FULL", "1")
    keep = lambda a, d: a < d - 3  # noqa: E731
    rows = rows_of(FACTORS, keep=keep)
    assert rows == [row for row in itertools.product(*FACTORS.values()) if keep(row[0], row[3])]


def test_fewer_factors_than_strength():
    assert rows_of({"a": [1, 2], "b": [3, 4]}, 3) == [(1, 3), (1, 4), (2, 3), (2, 4)]
    assert rows_of({"a": [1, 2]}) == [(1,), (2,)]


@pytest.mark.parametrize(
    "arguments",
    [{"whole": ("z",)}, {"keep": lambda z: True}, {"keep": lambda a: a > 9}, {"factors": {"a": []}}],
    ids=["unknown", "unknown to keep", "nothing kept", "no values"],
)
def test_mistakes_are_refused(arguments):
    with pytest.raises(ValueError, match="covering array of"):
        rows_of(**{"factors": FACTORS, **arguments})


def test_greed_takes_the_best_row_each_time():
    """Against the plain form, which counts every row anew."""
    rows = list(itertools.product(range(4), range(3), range(3), range(2)))
    sets = covering.subsets(4, 2)
    chosen = covering.covering_array(rows, sets, random.Random(3))
    left, gains = set().union(*(covering.tuples_of(row, sets) for row in rows)), []
    while left:
        best = max(rows, key=lambda row: len(covering.tuples_of(row, sets) & left))
        gains.append(len(covering.tuples_of(best, sets) & left))
        left -= covering.tuples_of(best, sets)
    assert abs(len(chosen) - len(gains)) <= 2


def test_names_and_parameters():
    @cover(case=[("in", "out"), ("a", "b")], dtype=[int, None], flag=[True])
    def test_it(case, dtype, flag):
        pass

    (mark,) = test_it.pytestmark
    assert mark.args[0] == ["case", "dtype", "flag"]
    assert mark.kwargs["ids"] == ["in-out-int-True", "in-out-None-True", "a-b-int-True", "a-b-None-True"]


TESTS = """
from covering import cover
@cover(a=range(6), b=range(5), c=range(4))
def test_it(a, b, c): pass
"""


def names(folder, seed, *options):
    """The names of the tests, as a process of its own prints them."""
    (folder / "test_it.py").write_text(TESTS)
    env = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), "CONV1X1_TEST_SEED": seed}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options, "test_it.py"]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return {word for line in done.stdout.splitlines() for word in line.split() if word.startswith("test_it.py::")}


def test_processes_with_one_seed_collect_the_same(tmp_path):
    """pytest-xdist refuses workers that do not."""
    pytest.importorskip("xdist")
    first, second = (names(tmp_path, seed, "--collect-only", "-q") for seed in ("11", "12"))
    assert names(tmp_path, "11", "-n", "2", "-v") == first != second
    assert all(30 <= len(found) < 45 for found in (first, second))
