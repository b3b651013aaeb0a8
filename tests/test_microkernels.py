"""Every microkernel by itself, by the pybind11 table: all m <= MR and n <= NR, nothing touched outside the tile."""

import itertools
import math
import sys

import pytest
import torch
from helpers import Guarded
from tiles import CANARY, KERNELS, TILES, Tile, accesses, check, half_bits, random, readable_behind, rounded

from bench.microkernel_table import in_parts

np = pytest.importorskip("numpy")
pytestmark = pytest.mark.cpu_only(reason="the CPU's microkernels")

ISAS = ("scalar", "avx2", "avx512", "avx512_bf16", "avx512_amx")
ACTIVATION = {"silu": 3, "hardswish": 4, "gelu": 5}


@pytest.fixture(params=KERNELS, ids="-".join)
def kernel(request, table):
    isa, operand, tile = request.param
    found = [k for k in table.list() if k["isa"] == isa and k["operand"] == operand]
    if not found:
        pytest.skip(f"this CPU does not run {isa}")
    named = {f"{k['mr']}x{k['nr']}" + (f"-{k['b']}" if k["b"] != operand else ""): k for k in found}
    assert list(named) == TILES[isa, operand]
    return named[tile]


@pytest.fixture
def rng():
    return np.random.default_rng(torch.initial_seed() % (1 << 32))


@pytest.mark.parametrize("rows", [True, False], ids=["rows", "cols"])
def test_every_tail(table, kernel, rng, rows):
    for m in range(1, kernel["mr"] + 1):
        for n in range(1, kernel["nr"] + 1):
            for k in (1, 2, 7):
                tile = Tile(rng, kernel, rows, m, n, k)
                check(tile.run(table), *tile.reference())


@pytest.mark.parametrize("rows", [True, False], ids=["rows", "cols"])
@pytest.mark.parametrize("k", [0, 1, 3, 64, 127, 128, 129, 256, 1000])
def test_lengths_of_k(table, kernel, rng, rows, k):
    for m, n in ((kernel["mr"], kernel["nr"]), (1, 1), (kernel["mr"] - 1, kernel["nr"] - 1)):
        tile = Tile(rng, kernel, rows, m, n, k)
        actual = tile.run(table)
        check(actual, *tile.reference())
        assert k != 0 or (actual == 0).all()


@pytest.mark.parametrize("rows", [True, False], ids=["rows", "cols"])
@pytest.mark.parametrize("parts", range(1, 16))
def test_epilogue(table, kernel, rng, rows, parts):
    """Every subset of c_in, a bias along m, a bias along n and a residual, at every tail of n."""
    for n in range(1, kernel["nr"] + 1):
        m = 1 + n % kernel["mr"]
        tile = Tile(rng, kernel, rows, m, n, 5)
        exact, bound = tile.reference()
        given = {
            "c_in": random(rng, (m, n + 2), kernel), "bias_m": random(rng, (m,), kernel),
            "bias_n": random(rng, (n,), kernel), "residual": random(rng, (m, n + 5), kernel),
        }  # fmt: skip
        given = {name: v for i, (name, v) in enumerate(given.items()) if parts >> i & 1}
        for name, v in given.items():
            v = v.astype(np.longdouble)
            v = v[:, None] if name == "bias_m" else v[:, :n] if v.ndim == 2 else v
            exact, bound = exact + v, bound + 12 * np.finfo(kernel["dtype"]).eps * abs(v)
        actual = tile.run(table, lower=-math.inf, upper=math.inf, with_epilogue=True, **given)
        check(actual, exact, bound)


@pytest.mark.parametrize("lower,upper", [(0.0, math.inf), (0.0, 6.0), (-math.inf, math.inf), (-1.0, 0.5)])
def test_clamps(table, kernel, rng, lower, upper):
    mr, nr = kernel["mr"], kernel["nr"]
    for m, n in ((1, 1), (mr, nr), (2, nr - 3), (mr, min(kernel["vector"] + 1, nr))):
        tile = Tile(rng, kernel, accesses(kernel)[0], m, n, 1)
        tile.a[:] = 1
        tile.b[:, :n] = rounded(np.linspace(-9, 9, n, dtype=kernel["dtype"]), kernel)
        actual = tile.run(table, lower=lower, upper=upper, with_epilogue=True)
        expected = np.clip(tile.b[:, :n], lower, upper).astype(kernel["dtype"])
        assert (actual == np.broadcast_to(expected, (m, n))).all()


@pytest.mark.parametrize("upper", [math.inf, 6.0])
def test_nan_passes_the_clamps(table, kernel, rng, upper):
    if kernel["parts"] > 1:
        pytest.skip("left to what repairs such sums: test_parts.py")
    special = [math.nan, math.inf, -math.inf, -0.0, 0.0]
    for n in range(1, kernel["nr"] + 1):
        tile = Tile(rng, kernel, False, 2, n, 1)
        tile.a[:] = 1
        tile.b[0, :n] = [special[i % 5] for i in range(n)]
        actual = tile.run(table, lower=0.0, upper=upper, with_epilogue=True)
        expected = [[math.nan, upper, 0.0, 0.0, 0.0][i % 5] for i in range(n)]
        np.testing.assert_array_equal(actual, [expected] * 2)


def test_tails_give_the_bits_of_the_whole_tile(table, kernel, rng):
    whole = Tile(rng, kernel, accesses(kernel)[0], kernel["mr"], kernel["nr"], 37)
    expected = whole.run(table).copy()
    for m in range(1, kernel["mr"] + 1):
        for n in range(1, kernel["nr"] + 1):
            for rows in accesses(kernel):
                part = Tile(rng, kernel, rows, m, n, 37)
                part.a[:], part.b[:, :n] = whole.a[:m], whole.b[:, :n]
                assert (part.run(table) == expected[:m, :n]).all(), (m, n, rows)


def test_a_chain_may_be_cut_and_continued(table, kernel, rng):
    rows = accesses(kernel)[0]
    tile = Tile(rng, kernel, rows, kernel["mr"], kernel["nr"], 12)
    exact, bound = tile.reference()
    first, second = (Tile(rng, kernel, rows, tile.m, tile.n, 6) for _ in range(2))
    first.a, first.b = np.ascontiguousarray(tile.a[:, :6]), tile.b[:6]
    second.a, second.b = np.ascontiguousarray(tile.a[:, 6:]), tile.b[6:]
    check(second.run(table, c_in=np.ascontiguousarray(first.run(table))), exact, bound)


@pytest.mark.parametrize("rows", [True, False], ids=["rows", "cols"])
@pytest.mark.parametrize("k", [0, 5, 150])
def test_a_strip_gives_the_bits_of_its_tiles(table, kernel, rng, rows, k):
    """Several tiles, one below the other: bias along m, residual and C go on from tile to tile. The longest k is cut
    for the strip of two: sums wait for its second piece. AMX's take two calls, and what a call leaves to be stored
    waits for the next one or for the end.
    """
    for m in sorted({1, kernel["mr"] - 1, kernel["mr"]}):
        for n in sorted({1, kernel["vector"], min(kernel["vector"] + 1, kernel["nr"]), kernel["nr"]}):
            for count in (2, 5):
                tiles = [Tile(rng, kernel, rows, m, n, k) for _ in range(count)]
                b = tiles[0].operands()[1]
                a = np.concatenate([tile.operands()[0] for tile in tiles])
                given = {
                    "bias_m": random(rng, (count * m,), kernel),
                    "residual": random(rng, (count * m, n + 5), kernel),
                }
                limits = {"lower": -1.0, "upper": math.inf, "with_epilogue": True}
                out = np.full((count * m + 1, n + 19), CANARY, kernel["dtype"])
                table.run(kernel["name"], rows, a, b, out, n, tiles=count, **given, **limits)
                for i, tile in enumerate(tiles):
                    tile.b = tiles[0].b
                    part = {name: v[i * m : (i + 1) * m] for name, v in given.items()}
                    assert (tile.run(table, **part, **limits) == out[i * m : (i + 1) * m, :n]).all(), (m, n, i)
                out[: count * m, :n] = CANARY
                assert (out == out.dtype.type(CANARY)).all(), "written outside the strip"


@pytest.mark.parametrize("rows", [True, False], ids=["rows", "cols"])
@pytest.mark.parametrize("count,panels", [(1, 2), (1, 5), (3, 3)])
def test_tiles_side_by_side_give_the_bits_of_each(table, kernel, rng, rows, count, panels):
    """One call for a strip's tiles by several panels of B: both biases, the residual and, of a single row of tiles,
    c_in go on from tile to tile. Of the longest k, B's panels are more than stays in L1.
    """
    if kernel["ks"] == 1:
        pytest.skip("a call computes the columns of one panel")
    n, names = kernel["nr"], ("bias_m", "bias_n", "residual", "c_in")
    for m, k, given_names in itertools.product(
        (5, 17, kernel["mr"]), (5, 150, 300), (names, names[:1], names[1:2], names[3:], ())
    ):
        strip = [Tile(rng, kernel, rows, m, n, k) for _ in range(count)]
        columns = [Tile(rng, kernel, rows, m, n, k) for _ in range(panels)]
        a = readable_behind(np.concatenate([tile.operands()[0] for tile in strip]), 16 * m * kernel["ks"])
        b = np.concatenate([tile.operands()[1] for tile in columns])
        out = np.full((count * m + 1, panels * n + 19), CANARY, kernel["dtype"])
        given = {
            "bias_m": random(rng, (count * m,), kernel), "bias_n": random(rng, (panels * n,), kernel),
            "residual": random(rng, (count * m, panels * n + 5), kernel), "c_in": random(rng, (m, panels * n), kernel),
        }  # fmt: skip
        given = {name: given[name] for name in given_names if name != "c_in" or count == 1}
        limits = {"lower": -1.0, "upper": math.inf, "with_epilogue": not set(given) <= {"c_in"}}
        table.run(kernel["name"], rows, a, b, out, n, tiles=count, panels=panels, **given, **limits)
        for i, j in itertools.product(range(count), range(panels)):
            down, across = slice(i * m, (i + 1) * m), slice(j * n, (j + 1) * n)
            tile = Tile(rng, kernel, rows, m, n, k)
            tile.a, tile.b = strip[i].a, columns[j].b
            part = {
                name: np.ascontiguousarray(v[{"bias_m": down, "bias_n": across}.get(name, (down, across))])
                for name, v in given.items()
            }
            assert (tile.run(table, **part, **limits) == out[down, across]).all(), (m, k, i, j, given_names)
        out[: count * m, : panels * n] = CANARY
        assert (out == out.dtype.type(CANARY)).all(), "written outside the tiles"


def split_columns(kernel, n, first):
    """n columns in two runs, the second 7 elements past the first: (lanes, at, then) of each vector, the columns."""
    columns = np.arange(n) + 7 * (np.arange(n) >= first)
    vector = kernel["vector"]
    splits = []
    for j in range(0, n, vector):
        lanes = min(max(first - j, 0), vector) or vector
        splits.append((lanes, int(columns[j]), j + 7 if lanes < vector else int(columns[j])))
    return splits, columns


@pytest.mark.parametrize("k", [5, 150])
def test_columns_in_two_runs(table, kernel, rng, k):
    """Tiles that span images in NCHW: the bits of the tile in one run, residual included, nothing touched between."""
    if not kernel["splits"]:
        pytest.skip("such tiles are stored by way of L1")
    limits = {"lower": -1.0, "upper": math.inf}
    for n in range(1, kernel["nr"] + 1):
        tile = Tile(rng, kernel, accesses(kernel)[n % len(accesses(kernel))], 2 * (1 + n % (kernel["mr"] // 2)), n, k)
        whole = random(rng, (tile.m, n + 9), kernel)
        bias = random(rng, (tile.m,), kernel)
        a, b = tile.operands()
        expected = tile.run(table, residual=whole, bias_m=bias, with_epilogue=True, **limits).copy()
        for first in sorted({1, n // 2, n - 1} - {0, n}):
            splits, columns = split_columns(kernel, n, first)
            residual = np.full((tile.m, n + 9), np.nan, kernel["dtype"])
            residual[:, columns] = whole[:, :n]
            out = np.full((tile.m + 1, n + 9), CANARY, kernel["dtype"])
            given = {"residual": residual, "bias_m": bias, "splits": splits, "with_epilogue": True, **limits}
            if tile.rows:  # as a strip, too: of AMX's, four are two calls of two
                count = 4 if kernel["ks"] > 1 and tile.m % 4 == 0 else 2
                table.run(kernel["name"], True, a, b, out, n, tiles=count, **given)
            else:
                table.run(kernel["name"], False, a, b, out, n, **given)
            assert (out[: tile.m, columns] == expected).all(), (n, first)
            out[: tile.m, columns] = CANARY
            assert (out == out.dtype.type(CANARY)).all(), "written between the runs"


def test_halves_in_two_runs(table, kernel, rng):
    if kernel["kr"] != 2 or not kernel["splits"] or kernel["operand"] == "float32":
        pytest.skip("stores what it accumulates, or by way of L1")
    for n in range(2, kernel["nr"] + 1):
        tile = Tile(rng, kernel, accesses(kernel)[0], 2, n, 6)
        a, b = tile.operands()
        whole = half_bits(random(rng, (2, n + 9), kernel), kernel)
        expected, out = (np.full((3, n + 9), 0x1234, np.uint16) for _ in range(2))
        splits, columns = split_columns(kernel, n, 1 + n // 3)
        residual = np.full_like(whole, 0x7FC0)  # a NaN in either type
        residual[:, columns] = whole[:, :n]
        table.store_half(kernel["name"], tile.rows, a, b, expected, n, whole)
        table.store_half(kernel["name"], tile.rows, a, b, out, n, residual, splits=splits)
        assert (out[:2, columns] == expected[:2, :n]).all(), n
        out[:2, columns] = 0x1234
        assert (out == 0x1234).all(), "written between the runs"


def test_halves_are_stored_from_the_accumulators(table, kernel, rng):
    """Rounded to nearest even, residual added before; every tail, nothing touched outside, NaN and infinity kept."""
    if kernel["kr"] != 2 or kernel["operand"] == "float32":
        pytest.skip("stores what it accumulates")
    dtype = torch.float16 if kernel["operand"] == "float16" else torch.bfloat16
    for n in range(1, kernel["nr"] + 1):
        tile = Tile(rng, kernel, accesses(kernel)[0], 1 + n % kernel["mr"], n, 6)
        residual = rng.standard_normal((tile.m, n + 5)).astype(np.float32)
        residual[0, n - 1] = (math.nan, math.inf, -math.inf)[n % 3]
        out = np.full((tile.m + 2, n + 19), 0x1234, np.uint16)
        table.store_half(kernel["name"], tile.rows, *tile.operands(), out, n, half_bits(residual, kernel))
        whole = tile.run(table, lower=-math.inf, upper=math.inf, with_epilogue=True)
        total = torch.from_numpy(whole + rounded(residual, kernel)[:, :n]).to(dtype)
        actual = torch.from_numpy(out[: tile.m, :n].view(np.int16).copy()).view(dtype)
        torch.testing.assert_close(actual, total, rtol=0, atol=0, equal_nan=True)
        out[: tile.m, :n] = 0x1234
        assert (out == 0x1234).all(), "written outside the tile"


def test_a_strip_of_halves_is_stored_from_the_accumulators(table, kernel, rng):
    if kernel["kr"] != 2 or kernel["operand"] == "float32":
        pytest.skip("stores what it accumulates")
    m, n, count = kernel["mr"], kernel["nr"] - 3, 5
    tiles = [Tile(rng, kernel, accesses(kernel)[0], m, n, 6) for _ in range(count)]
    residual = half_bits(random(rng, (count * m, n + 5), kernel), kernel)
    b = tiles[0].operands()[1]
    strip, single = (np.full((count * m + 2, n + 19), 0x1234, np.uint16) for _ in range(2))
    a = np.concatenate([t.operands()[0] for t in tiles])
    table.store_half(kernel["name"], tiles[0].rows, a, b, strip, n, residual, tiles=count)
    for i, tile in enumerate(tiles):
        at = slice(i * m, (i + 1) * m)
        table.store_half(kernel["name"], tile.rows, tile.operands()[0], b, single[at], n, residual[at])
    assert (strip == single).all()


@pytest.mark.parametrize("rows", [True, False], ids=["rows", "cols"])
@pytest.mark.parametrize("count,panels", [(1, 1), (2, 1), (1, 3), (5, 2)])
def test_halves_without_a_residual(table, kernel, rng, rows, count, panels):
    """The commonest tiles: sums, one bias or none, bounds, one rounding; k from a group of steps to B past L1."""
    if kernel["kr"] != 2 or kernel["operand"] == "float32" or (panels > 1 and kernel["ks"] == 1):
        pytest.skip("stores what it accumulates, or computes the columns of one panel")
    n = kernel["nr"]
    for m, k, bias, upper in itertools.product(
        (kernel["mr"], kernel["mr"] - 1), (32, 96, 320, 640), (None, "bias_m", "bias_n"), (6.0, math.inf)
    ):
        strip = [Tile(rng, kernel, rows, m, n, k) for _ in range(count)]
        columns = [Tile(rng, kernel, rows, m, n, k) for _ in range(panels)]
        a = readable_behind(np.concatenate([tile.operands()[0] for tile in strip]), 16 * m * kernel["ks"])
        b = np.concatenate([tile.operands()[1] for tile in columns])
        given = {"lower": 0.0, "upper": upper, "tiles": count, "panels": panels}
        if bias:
            given[bias] = random(rng, (count * m if bias == "bias_m" else panels * n,), kernel)
        sums = np.full((count * m, panels * n), CANARY, kernel["dtype"])
        out = np.full((count * m + 1, panels * n + 19), 0x1234, np.uint16)
        table.run(kernel["name"], rows, a, b, sums, n, with_epilogue=True, **given)
        table.store_half(kernel["name"], rows, a, b, out, n, **given)
        assert (out[: count * m, : panels * n] == half_bits(sums, kernel)).all(), (m, k, bias, upper)
        out[: count * m, : panels * n] = 0x1234
        assert (out == 0x1234).all(), "written outside the tiles"


@pytest.mark.parametrize("k", [5, 150])
def test_a_strip_takes_rows_from_anywhere(table, kernel, rng, k):
    """Strided layers in NHWC: the bits of the strip whose rows lie one after the other."""
    if kernel["pitched"] or kernel["ks"] > 1:
        pytest.skip("the microkernel wants rows a constant distance apart")
    count, n = 5, kernel["nr"] - 1
    for m in sorted({1, kernel["mr"]}):
        tiles = [Tile(rng, kernel, True, m, n, k) for _ in range(count)]
        a, b = np.concatenate([tile.operands()[0] for tile in tiles]), tiles[0].operands()[1]
        order = rng.permutation(count * m)
        outs = [np.full((count * m, n), CANARY, kernel["dtype"]) for _ in range(2)]
        table.run(kernel["name"], True, np.ascontiguousarray(a[order]), b, outs[0], n, tiles=count)
        table.run(kernel["name"], True, a, b, outs[1], n, tiles=count, order=order.tolist())
        assert (outs[0] == outs[1]).all(), m
        with pytest.raises(ValueError, match="order"):
            table.run(kernel["name"], True, a, b, outs[1], n, tiles=count, order=[count * m] * (count * m))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mprotect as on Linux")
@pytest.mark.parametrize("rows", [True, False], ids=["rows", "cols"])
def test_nothing_behind_the_operands_is_touched(table, kernel, rng, rows):
    step = 2 * kernel["kr"] * kernel["ks"]
    sizes = {1, 2, kernel["mr"] // 2 - 1, kernel["mr"] // 2, kernel["mr"] // 2 + 1, kernel["mr"] - 1, kernel["mr"]}
    for m in sorted(sizes - {0}):
        vector, nr = kernel["vector"], kernel["nr"]
        for n in sorted({1, vector - 1, vector, min(vector + 1, nr), nr} - {0}):
            guarded = Guarded()
            tile = Tile(rng, kernel, rows, m, n, step)
            exact, bound = tile.reference()
            a, b = tile.operands()
            # What is contracted of B ends with column n, in panels with the vector that has it.
            width = n if kernel["ks"] == 1 else -(-n // kernel["vector"]) * kernel["vector"]
            out, c_in = np.zeros((m, n), kernel["dtype"]), random(rng, (m, n), kernel)
            given = {"bias_m": random(rng, (m,), kernel), "bias_n": random(rng, (n,), kernel)}
            given |= {"c_in": c_in, "residual": random(rng, (m, n), kernel)}
            total = exact + sum(v[:, None] if name == "bias_m" else v for name, v in given.items())
            given = {name: guarded(v) for name, v in given.items()}
            b, out = guarded(np.ascontiguousarray(b[:, :width])), guarded(out)
            if kernel["parts"] == 1:  # others' panels of A are followed by more
                a = guarded(a)
            table.run(kernel["name"], rows, a, b, out, n, lower=-math.inf, upper=math.inf, with_epilogue=True, **given)
            check(out, total, bound + 100 * np.finfo(kernel["dtype"]).eps)


def activation_reference(name, x):
    z = torch.from_numpy(x.astype(np.float64))
    if name == "silu":
        return (z * torch.sigmoid(z)).numpy()
    if name == "hardswish":
        return (z * (z + 3).clamp(0, 6) / 6).numpy()
    return (0.5 * z * torch.special.erfc(-z / math.sqrt(2))).numpy()


@pytest.mark.parametrize("name", list(ACTIVATION))
def test_activation_accuracy(table, kernel, rng, name):
    """A few units in the last place of the result, or of 1 + x where gelu and silu cancel."""
    x = np.concatenate([np.linspace(-12, 12, 40001), rng.uniform(-3, 3, 20000), np.geomspace(1e-30, 1e4, 5000)])
    x = np.concatenate([x, -x]).astype(kernel["dtype"])
    tile = np.zeros((4, -(-x.size // 4)), kernel["dtype"])
    tile.reshape(-1)[: x.size] = x
    x = tile.copy()
    table.activate(kernel["name"], tile, ACTIVATION[name])
    exact, eps = activation_reference(name, x), np.finfo(kernel["dtype"]).eps
    # silu's exp carries |x| eps of its argument; gelu's 1 + erf loses what erf is short of -1, an eps of |x|.
    # Past x = -88 silu's exp overflows, in torch as well, and drops results of 20 times the smallest normal number.
    allowed = 4 * eps * abs(exact) + eps * abs(x) * (2 if name == "gelu" else 0) + 32 * np.finfo(kernel["dtype"]).tiny
    if name == "silu":
        allowed += 2 * eps * abs(x * exact)
    worst = (abs(tile - exact) / allowed).max()
    assert worst <= 1, f"{worst:.3g} times what is allowed, at x = {x.flat[(abs(tile - exact) / allowed).argmax()]}"


@pytest.mark.parametrize("name", list(ACTIVATION))
def test_activation_of_special_values(table, kernel, name):
    x = np.array([[math.nan, math.inf, -math.inf, 0.0, -0.0, 1e4, -1e4, 300.0, -300.0, 3.0, -3.0]], kernel["dtype"])
    out = x.copy()
    table.activate(kernel["name"], out, ACTIVATION[name])
    expected = getattr(torch.nn.functional, name)(torch.from_numpy(x).double()).numpy()
    np.testing.assert_allclose(out, expected, rtol=1e-6 if name != "gelu" else 1e-4, atol=1e-30)


def test_activation_tails(table, kernel, rng):
    for n in range(1, kernel["nr"] + 1):
        x = random(rng, (3, n), kernel)
        for name, code in ACTIVATION.items():
            out = x.copy()
            table.activate(kernel["name"], out, code)
            np.testing.assert_allclose(out, activation_reference(name, x), rtol=2e-5, atol=1e-6)


def test_the_table_is_complete(table):
    """Best last, names that say what they are: operands, tile, instruction set."""
    kernels = table.list()
    isas = [k["isa"] for k in kernels]
    assert isas == sorted(isas, key=ISAS.index) and isas[:2] == ["scalar", "scalar"]
    for k in kernels:
        operands = k["operand"] if k["b"] == k["operand"] else f"{k['operand']}x{k['b']}"
        assert k["nr"] % k["vector"] == 0 and k["name"].startswith(f"{operands}_{k['mr']}x{k['nr']}_")
        assert (k["kr"] == 2) == (k["operand"] == "bfloat16" or k["parts"] > 1)
    assert len({k["name"] for k in kernels}) == len(kernels)


def test_unknown_names_and_shapes_are_refused(table):
    a, b, out = (np.zeros((1, 1), np.float32) for _ in range(3))
    with pytest.raises(ValueError, match="no microkernel 'nonsense'"):
        table.run("nonsense", True, a, b, out, 1)
    with pytest.raises(ValueError, match="shapes do not fit"):
        table.run(table.list()[0]["name"], True, a, b, out, 2)
    with pytest.raises(ValueError, match="dtypes are not the microkernel's"):
        table.run(table.list()[1]["name"], True, a, b, out, 1)


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("of_a", [True, False], ids=["A", "B"])
@pytest.mark.parametrize("k", [1, 16, 31, 33, 64, 300])
def test_operand_in_place(table, kernel, rng, of_a, k, masked):
    """In parts: tails of m, n and k, several tiles a call; B's columns in runs that a vector's may lie in two of."""
    if kernel["parts"] == 1:
        pytest.skip("splits nothing")
    dtype = np.float32 if kernel["parts"] == 3 else np.float16
    bits = lambda x: x if dtype == np.float32 else x.view(np.uint16)  # noqa: E731

    def numbers(*shape):
        return rng.standard_normal(shape).astype(dtype)

    def panel(x):
        return in_parts(x.astype(np.float32), kernel["parts"])

    for m, n in [(32, 32), (32, 17), (31, 32), (17, 16), (16, 31), (5, 3), (1, 1)]:
        whole = -(-n // 16) * 16
        tiles = int(rng.integers(1, 4)) if of_a else 1
        panels = int(rng.integers(1, 4)) if not of_a and n == 32 else 1
        a, b = numbers(m * tiles, k), numbers(k, n * panels)
        if of_a:
            memory, vectors = a, []
            other = panel(np.pad(b, [(0, 0), (0, whole - n)])).reshape(-1, whole)
        else:
            # Each vector's first lanes begin at `at`, the others lie elsewhere, with NaN around both.
            memory, vectors = np.full((k, 64 * panels + 64), np.nan, dtype), []
            for start in range(0, n * panels, 16):
                count, lanes = min(16, n * panels - start), int(rng.integers(1, 17))
                at, then = 32 + 2 * start, 32 + 2 * start + 16 if lanes < count else 0
                split = min(lanes, count)
                memory[:, at : at + split] = b[:, start : start + split]
                memory[:, then + split : then + count] = b[:, start + split : start + count]
                vectors.append((lanes, at, then))
            vectors += [(16, 0, 0)] * (2 * panels - len(vectors))
            other = np.ascontiguousarray(panel(np.ascontiguousarray(a.T)).swapaxes(2, 3))
            other = readable_behind(other.reshape(-1, m), 15 * kernel["ks"])
        saved = numbers(*memory.shape) if masked else None
        if masked:
            if not of_a:
                saved[:, :] = np.where(rng.random(memory.shape[1]) < 0.5, 1, -1)  # whole columns: what B's are
                runs = [(vectors[s // 16], s % 16) for s in range(n * panels)]
                columns = [(at if i < lanes else then) + i for (lanes, at, then), i in runs]
                kept = saved[0, columns] > 0
                b = b * kept
            else:
                a = np.where(saved > 0, a, 0).astype(dtype)
        out = np.full((m * tiles + 2, n * panels + 5), CANARY, np.float32)
        table.run_in_place(
            kernel["name"],
            of_a,
            bits(memory),
            other,
            out,
            m,
            n,
            tiles,
            panels,
            None if saved is None else bits(saved),
            vectors,
        )
        exact = a.astype(np.longdouble) @ b.astype(np.longdouble)
        bound = (k + 6) * np.finfo(np.float32).eps * (abs(a.astype(np.float64)) @ abs(b.astype(np.float64)))
        check(out[: m * tiles, : n * panels], exact, bound)
        out[: m * tiles, : n * panels] = CANARY
        assert (out == np.float32(CANARY)).all(), "written outside the tiles"
