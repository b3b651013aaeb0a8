"""AMX: bfloat16 by its instructions, which are emulated where the CPU has none (tests/amx/emulator.cpp).

On a CPU with AMX the same tests of kernels and operators run without the emulator, on the library as it is.
"""

import ctypes
import functools
import math
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from amx import build
from helpers import ROOT, expect_ok, run_python

import conv1x1_ext

np = pytest.importorskip("numpy")
pytestmark = pytest.mark.cpu_only(reason="an instruction set of the CPU")

NATIVE = "avx512_amx" in conv1x1_ext.build_info()["microkernels"]
CANNOT = build.cannot_emulate()
emulated = pytest.mark.skipif(bool(CANNOT), reason=f"nothing is emulated: {CANNOT}")
runnable = pytest.mark.skipif(bool(CANNOT) and not NATIVE, reason=f"no AMX: {CANNOT}")


@pytest.fixture(scope="session")
def environment():
    """What a subprocess needs for the library with AMX to be the one that it imports, and AMX what it runs."""
    if NATIVE:
        return {"CONV1X1_ISA": "avx512_amx"}
    return {"CONV1X1_ISA": "avx512_amx", "CONV1X1_TEST_AMX": str(build.package())}


# The suite's own tests of what AMX changes: its kernels, packing, parts and plans. Each entry is a process, for the
# workers of pytest-xdist to share.
OPERATORS = ("test_dgrad", "test_wgrad", "test_avg_pool", "test_prepack", "test_packed_weight")
PARTS = {
    "kernels": (("test_microkernels",), "avx512_amx"),
    "forward": (("test_fprop",), "bfloat16"),
    "other operators": (OPERATORS, "bfloat16"),
    "equal bits": (("test_determinism",), "bfloat16 or avx512_amx"),
    # AMX heeds no floating-point environment: test_tiles_belong_to_a_thread.
    "parts": (("test_parts", "test_edges"), "not flush_denormal and not floating_point_environment"),
    "choice": (("test_isa",), "avx512_amx or default or explain"),
}

SESSION = """
import contextlib, ctypes, os, sys
sys.path.insert(0, os.environ["CONV1X1_TEST_AMX"])
import conv1x1_ext, pytest
code = pytest.main(["-p", "no:cacheprovider", "-p", "no:faulthandler", "--no-header", "-x", *sys.argv[2:]])
# The library and, where it was loaded, the table have an emulator each; the signals go to the one loaded last.
libraries = [ctypes.CDLL(str(conv1x1_ext._library.path))]
with contextlib.suppress(OSError):
    libraries.append(ctypes.CDLL(sys.argv[1], mode=os.RTLD_NOLOAD | os.RTLD_NOW))
for lib in libraries:
    lib.amx_count.restype = lib.amx_configured_threads.restype = ctypes.c_long
    assert lib.amx_configured_threads() == 0, "tiles were not released"
print("emulated", *(sum(lib.amx_count(kind) for lib in libraries) for kind in range(7)))
sys.exit(code)
"""


@emulated
@pytest.mark.parametrize("part", PARTS)
def test_part_of_the_suite(environment, part):
    """A CPU with AMX has run all of it by itself: test_the_suite_runs_what_this_cpu_has."""
    files, chosen = PARTS[part]
    paths = [str(ROOT / "tests" / f"{file}.py") for file in files]
    command = [sys.executable, "-c", SESSION, str(build.table()), *paths, "-k", chosen]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    env = {**os.environ, **environment, "PYTHONPATH": path}
    if chosen.startswith("bfloat16"):  # whose combinations with the other parameters would else be a fourth of them
        env["CONV1X1_TEST_DTYPES"] = "bfloat16"
    result = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and " passed" in result.stdout, result.stdout[-6000:] + result.stderr[-3000:]
    if part != "choice":  # whose AMX runs in processes of its own
        (line,) = (line for line in result.stdout.splitlines() if line.startswith("emulated "))
        configured, _, released, _, loads, stores, products = map(int, line.split()[1:])
        assert configured == released > 0 and min(loads, stores, products) > 0, line


@pytest.mark.skipif(not NATIVE, reason="this CPU has no AMX")
@pytest.mark.skipif("CONV1X1_ISA" in os.environ, reason="CONV1X1_ISA chooses")
def test_the_suite_runs_what_this_cpu_has(table):
    """AMX's kernels, in every test that leaves the choice to the library, and in those of the table."""
    assert conv1x1_ext.build_info()["isa"] == "avx512_amx"
    x, w = torch.randn(2, 64, 14, 14), torch.randn(96, 64, 1, 1)
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        kernel = conv1x1_ext.explain(x.to(dtype), w.to(dtype))["kernel"]
        assert "_32x32_avx512_amx" in kernel, kernel
    assert {k["operand"] for k in table.list() if k["isa"] == "avx512_amx"} == {"bfloat16", "float32", "float16"}


LONG = """
import torch, conv1x1_ext
from helpers import *
torch.manual_seed({seed})
assert conv1x1_ext.build_info()["isa"] == "avx512_amx"
bfloat16 = torch.bfloat16

def run(x, w, b, r, dy, groups, activation):
    leaves = [t.detach().requires_grad_() for t in (x, w, b, r)]
    y = conv1x1_ext.conv1x1(*leaves[:3], groups=groups, activation=activation, residual=leaves[3])
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

seen = set()
for case in (Case(1, 512, 40, (7, 7)), Case(1, 288, 33, (9, 9)), Case(2, 1000, 72, (5, 5)), Case(1, 1024, 130, (6, 6)),
             Case(1, 130, 1024, (6, 6)), Case(1, 2048, 24, (4, 4)), Case(1, 1280, 640, (5, 5), 1, 2),
             Case(3, 40, 33, (67, 61)), Case(1, 64, 96, (80, 80)), Case(2, 17, 5, (50, 41))):
    for layout in ("contiguous", "channels_last"):
        x, w = laid_out(case.x_shape, bfloat16, layout), weight_of(case.w_shape, bfloat16)
        b, r = randn((case.c_out,), bfloat16), laid_out(case.y_shape, bfloat16, layout)
        dy = laid_out(case.y_shape, bfloat16, layout)
        for direction in ("fprop", "dgrad", "wgrad"):
            plan = conv1x1_ext.explain(x, w, groups=case.groups, direction=direction)
            assert plan["kernel"].startswith("bfloat16_32x32_avx512_amx"), plan
            seen.add("A " + plan["A"].split(":")[0])
            seen.add("B " + plan["B"].split(":")[0])
            k = int(plan["block"].split(" k ")[1].split()[0])
            if k < int(plan["gemm"].split("k ")[1].split(",")[0]) // int(plan["k_slices"]):
                seen.add("carried")
            if plan["k_slices"] != "1":
                seen.add("slices")
        for activation in ("relu", None):
            check_forward(x, w, b, groups=case.groups, activation=activation, residual=r)
            check_gradients(x, w, b, groups=case.groups, activation=activation, residual=r, dy=dy)
            results = []
            for threads in (1, 2, 3, 5):
                torch.set_num_threads(threads)
                results.append(run(x, w, b, r, dy, case.groups, activation))
            for other in results[1:]:
                assert all(map(same_bits, results[0], other)), (case, layout)
print(*sorted(seen), sep="; ")
"""


@runnable
def test_long_sums(environment):
    """Long sums, accumulators kept between packed blocks, and slices: every route of a plan."""
    code = LONG.format(seed=torch.initial_seed() % (1 << 31))
    seen = expect_ok(run_python(code, **environment)).strip().split("; ")
    routes = {
        "A packed by block",
        "A packed once",
        "A read in place",
        "B packed by block",
        "carried",
        "slices",
    }
    assert routes <= set(seen), seen


FRESH = """
import threading, torch, conv1x1_ext
from helpers import *
x = randn((3, 70, 9, 9), torch.bfloat16).contiguous(memory_format=torch.channels_last)
w = randn((50, 70, 1, 1), torch.bfloat16)
expected = conv1x1_ext.conv1x1(x, w)
same = []
compare = lambda: same.append(same_bits(expected, conv1x1_ext.conv1x1(x, w)))
workers = [threading.Thread(target=compare) for _ in range(6)]
for t in workers: t.start()
for t in workers: t.join()
assert same == [True] * 6
for flush in (True, False):  # AMX heeds neither
    torch.set_flush_denormal(flush)
    assert same_bits(expected, conv1x1_ext.conv1x1(x, w))
"""


@runnable
def test_tiles_belong_to_a_thread(environment):
    expect_ok(run_python(FRESH, **environment))


@pytest.mark.skipif(NATIVE, reason="this CPU has AMX")
def test_without_amx_the_error_says_so():
    result = run_python("import conv1x1_ext; conv1x1_ext.build_info()", CONV1X1_ISA="avx512_amx", CONV1X1_TEST_AMX="")
    assert result.returncode != 0
    message = "CONV1X1_ISA: expected one of "
    (line,) = (line for line in result.stderr.splitlines() if message in line)
    assert "on this machine, got 'avx512_amx': " in line and "avx512_amx" not in line.split(" on this machine")[0]
    flags = build.cpu_flags()
    if flags and "amx_bf16" not in flags:
        assert line.endswith("this CPU has no AMX-TILE and AMX-BF16")


def test_the_product_has_no_emulator():
    library = Path(conv1x1_ext._library.path).read_bytes()
    assert b"amx_emulate" not in library and b"AMX emulator" not in library


# The emulator itself.


@functools.cache
def probe_path():
    return build.probe()


@pytest.fixture
def probe():
    lib = ctypes.CDLL(str(probe_path()))
    lib.amx_count.restype = lib.amx_configured_threads.restype = ctypes.c_long
    lib.amx_emulate()  # another library's may have come later
    return lib


def pointer(array):
    return ctypes.c_void_p(array.ctypes.data)


def flushed(x):
    """A float32 as an operand: denormals are zero."""
    x = float(x)
    return 0.0 if abs(x) < 2.0**-126 else x


def nearest(x):
    """A fraction as float32: round to nearest even; what is then below the smallest normal number is zero."""
    if x == 0:
        return 0.0
    exponent = abs(x).numerator.bit_length() - abs(x).denominator.bit_length()
    exponent -= Fraction(2) ** exponent > abs(x)
    ulp = Fraction(2) ** (exponent - 23)
    rounded = round(x / ulp) * ulp  # Python rounds halves to even
    if abs(rounded) < Fraction(2) ** -126:
        return 0.0
    return float(rounded) if abs(rounded) < Fraction(2) ** 128 else float("inf") * (1 if x > 0 else -1)


def plus(x, y):
    """float32 + a fraction or float32, rounded once."""
    if not math.isfinite(x) or not math.isfinite(y):
        return x + float(y)
    return nearest(Fraction(x) + Fraction(y))


def product_reference(c, a, b):
    """tdpbf16ps as its manual writes it, in fractions: chains of the even and of the odd k, joined, added to C."""
    out = c.copy()
    for m in range(c.shape[0]):
        for n in range(c.shape[1]):
            chains = [0.0, 0.0]
            for k in range(a.shape[1]):
                term = Fraction(flushed(a[m, k])) * Fraction(flushed(b[k, n]))
                chains[k % 2] = plus(chains[k % 2], term)
            out[m, n] = plus(flushed(c[m, n]), plus(*chains))
    return out


def bits(x):
    return np.ascontiguousarray(x).view(np.uint32) >> 16


def in_pairs(x, axis):
    high = np.moveaxis(bits(x), axis, 0)
    return np.ascontiguousarray(np.moveaxis(high[0::2] | high[1::2] << 16, 0, axis))


def bfloat16(x):
    return (np.ascontiguousarray(x, np.float32).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def product(probe, c, a, b):
    """C after the emulated instruction; rows with some bytes between them, which must stay."""
    (m, n), k = c.shape, a.shape[1] // 2
    arrays = [np.full((x.shape[0], x.shape[1] + 3), 0x12345678, np.uint32) for x in (c, in_pairs(a, 1), in_pairs(b, 0))]
    for array, x in zip(arrays, (c.view(np.uint32), in_pairs(a, 1), in_pairs(b, 0)), strict=True):
        array[:, : x.shape[1]] = x
    pitched = [v for array in arrays for v in (pointer(array), ctypes.c_int64(array.strides[0]))]
    probe.probe_product(m, n, k, *pitched)
    assert (arrays[0][:, n:] == 0x12345678).all()
    return np.ascontiguousarray(arrays[0][:, :n]).view(np.float32)


@emulated
@pytest.mark.parametrize("m,n,k", [(16, 16, 16), (1, 1, 1), (3, 5, 7), (16, 1, 2), (2, 16, 16)])
@pytest.mark.parametrize("scale", ["ordinary", "wide", "tiny", "huge"])
def test_products_are_exactly_as_documented(probe, m, n, k, scale):
    rng = np.random.default_rng(torch.initial_seed() % (1 << 32))
    exponents = {"ordinary": (0, 1), "wide": (-30, 30), "tiny": (-68, -58), "huge": (60, 64)}[scale]

    def values(*shape):
        return np.ldexp(rng.standard_normal(shape), rng.integers(*exponents, shape)).astype(np.float32)

    a, b = bfloat16(values(m, 2 * k)), bfloat16(values(2 * k, n))
    c = (values(m, n) * {"tiny": np.float32(2.0**-62), "huge": np.float32(2.0**60)}.get(scale, np.float32(1))).astype(
        np.float32
    )
    a[rng.random(a.shape) < 0.1] = np.float32(1e-39) if scale == "tiny" else 0  # denormal operands
    expected = product_reference(c, a, b)
    np.testing.assert_array_equal(product(probe, c, a, b), expected)


@emulated
def test_products_of_special_values(probe):
    inf, nan = np.inf, np.nan
    a = bfloat16([[inf, 1, 0, 0], [inf, -inf, 0, 0], [nan, 0, 0, 0], [inf, 0, 0, 0]])
    b = bfloat16([[1, 0], [1, 1], [0, 0], [0, 0]])
    expected = np.array([[inf, nan], [nan, nan], [nan, nan], [inf, nan]], np.float32)
    np.testing.assert_array_equal(product(probe, np.zeros((4, 2), np.float32), a, b), expected)


@emulated
def test_no_exceptions_and_no_rounding_mode(probe):
    """MXCSR is neither consulted nor updated."""
    a, b = bfloat16(np.full((1, 2), 1.5)), bfloat16(np.full((2, 1), 2.0**-30))
    c = np.ones((1, 1), np.float32)
    with np.errstate(all="raise"):
        first = product(probe, c, a, b)
    torch.set_flush_denormal(True)
    try:
        assert (product(probe, c, a, b) == first).all()
    finally:
        torch.set_flush_denormal(False)


@emulated
def test_every_form_of_address(probe):
    source = np.random.default_rng(0).integers(0, 256, (20, 64), np.uint8)
    out = np.zeros((8, 16, 64), np.uint8)
    probe.probe_addresses(pointer(source), pointer(out))
    for t in range(5):
        np.testing.assert_array_equal(out[t], source[:16])
    np.testing.assert_array_equal(out[5], source[15::-1])
    np.testing.assert_array_equal(out[6], np.broadcast_to(source[1], (16, 64)))
    assert (out[7] == 0).all()


@emulated
def test_configurations_are_stored_and_released(probe):
    stored = np.full(128, 7, np.uint8)
    probe.probe_configuration(pointer(stored))
    assert stored[0] == 1 and (stored[16:26:2] == 12).all() and (stored[48:53] == 7).all() and stored[53:].sum() == 0
    before = probe.amx_configured_threads()
    probe.probe_keep_configured()
    probe.probe_keep_configured()
    assert probe.amx_configured_threads() == before + 1
    probe.probe_release()
    assert probe.amx_configured_threads() == before


FAULTS = {
    "product without configuration": "tdpbf16ps: tiles are not configured",
    "load without configuration": "tileloadd: tiles are not configured",
    "zero without configuration": "tilezero: tiles are not configured",
    "palette": "ldtilecfg: palette 2",
    "reserved byte": "ldtilecfg: reserved byte 5 is 1",
    "ninth tile": "ldtilecfg: reserved byte 32 is 64",
    "rows of the ninth tile": "ldtilecfg: reserved byte 56 is 16",
    "start row": "ldtilecfg: start row 3",
    "17 rows": "ldtilecfg: tmm0: 17 rows of 64 bytes",
    "68 bytes": "ldtilecfg: tmm0: 16 rows of 68 bytes",
    "rows without bytes": "ldtilecfg: tmm0: 16 rows of 0 bytes",
    "C and A differ in rows": "tdpbf16ps: C has 16 rows, A 8",
    "A and B differ in k": "tdpbf16ps: A has 16 pairs in a row, B 15 rows",
    "C and B differ in columns": "tdpbf16ps: rows of C have 60 bytes, of B 64",
    "half a pair": "tdpbf16ps: rows that are no whole pairs",
    "same tile twice": "tdpbf16ps: tmm0, tmm4, tmm4: not three tiles",
    "tile left out": "tdpbf16ps: tmm6 has no rows in this configuration",
    "load of a tile left out": "tileloadd: tmm4 has no rows in this configuration",
    "product after release": "tdpbf16ps: tiles are not configured",
    "store after release": "tilestored: tiles are not configured",
    "store after palette 0": "tilestored: tiles are not configured",
    "other product": "a product that is not emulated",
}
KNOWN_FAULT = "import ctypes, sys; ctypes.CDLL(sys.argv[1]).probe_fault(sys.argv[2].encode()); print('went on')"


@emulated
@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_end_the_process(name):
    command = [sys.executable, "-c", KNOWN_FAULT, str(probe_path()), name]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 86 and "went on" not in result.stdout, result
    assert result.stderr.startswith("AMX emulator: at 0x") and FAULTS[name] in result.stderr, result.stderr


@emulated
def test_other_illegal_instructions_are_not_swallowed():
    code = "import ctypes, sys; ctypes.CDLL(sys.argv[1]).probe_other_illegal_instruction(); print('went on')"
    result = subprocess.run([sys.executable, "-c", code, str(probe_path())], capture_output=True, text=True)
    assert result.returncode == -4 and "went on" not in result.stdout, result
