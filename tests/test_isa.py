"""CONV1X1_ISA forces an instruction set; every one gives right results; a wrong name is an error with the choices."""

from pathlib import Path

import pytest
import torch
from helpers import expect_ok, run_python

import conv1x1_ext

pytestmark = pytest.mark.cpu_only(reason="instruction sets of the CPU")

COMPACT = """
import sys, torch, conv1x1_ext
from covering import rows_of
from helpers import *
torch.manual_seed({seed})
isa = {isa!r}
assert conv1x1_ext.build_info()["isa"] == isa, conv1x1_ext.build_info()
x, w = torch.randn(1, 8, 4, 4), torch.randn(8, 8, 1, 1)
assert conv1x1_ext.explain(x, w)["isa"].split()[0].rstrip(",:") == isa
cases = [Case(2, 64, 96, (14, 14)), Case(3, 33, 17, (7, 7), 2), Case(1, 130, 50, (9, 5)), Case(2, 24, 36, (6, 5), 1, 4),
         Case(1, 5, 3, (11,)), Case(2, 7, 9, (3, 4, 5), 2), Case(4, 257, 10, (1, 1))]
layouts = ("contiguous", "channels_last", "sliced")
factors = {{"case": cases, "layout": layouts, "activation": ACTIVATIONS, "dtype": DTYPES}}
for case, layout, activation, dtype in rows_of(factors, 3, seed="{seed}"):
    x, w = laid_out(case.x_shape, dtype, layout), weight_of(case.w_shape, dtype)
    b, r = randn((case.c_out,), dtype), laid_out(case.y_shape, dtype, layout)
    rest = dict(groups=case.groups, activation=activation, residual=r)
    check_forward(x, w, b, case.stride, **rest)
    if layout != "sliced":
        check_gradients(x, w, b, case.stride, **rest)
print("ok")
"""


def isa_of(microkernel):
    """bfloat16_8x48_avx512_bf16 -> avx512_bf16"""
    return microkernel.split("_", 2)[2].replace("portable", "scalar")


def isas():
    """Those of this CPU."""
    return {isa_of(name) for name in conv1x1_ext.build_info()["microkernels"].split(", ")}


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512", "avx512_bf16", "avx512_amx"])
def test_each_instruction_set(isa):
    if isa not in isas():
        pytest.skip(f"this CPU does not run {isa}")
    code = COMPACT.format(isa=isa, seed=torch.initial_seed() % (1 << 31))
    assert "ok" in expect_ok(run_python(code, CONV1X1_ISA=isa))


def test_default_is_the_best_one():
    """The last one, but AVX512-BF16 on an Intel CPU without AMX: its vdpbf16ps is slower than converting to float32."""
    best = isa_of(conv1x1_ext.build_info()["microkernels"].split(", ")[-1])
    if best == "avx512_bf16" and "GenuineIntel" in Path("/proc/cpuinfo").read_text():
        best = "avx512"
    code = 'import conv1x1_ext; print(conv1x1_ext.build_info()["isa"])'
    assert expect_ok(run_python(code, CONV1X1_ISA="")).strip() == best


@pytest.mark.parametrize("name", ["sse9", "AVX2"])
def test_unknown_name(name):
    code = """
import torch, conv1x1_ext
x, w = torch.randn(1, 3, 4, 4), torch.randn(2, 3, 1, 1)
functions = [conv1x1_ext.conv1x1, conv1x1_ext.conv1x1_avg_pool, conv1x1_ext.explain]
for f in (*functions, lambda x, w: conv1x1_ext.build_info()):
    try:
        f(x, w)
    except RuntimeError as error:
        print(str(error).splitlines()[0])
    else:
        raise SystemExit("no error")
"""
    lines = expect_ok(run_python(code, CONV1X1_ISA=name)).splitlines()
    assert len(lines) == 4 and len(set(lines)) == 1
    assert lines[0].startswith("CONV1X1_ISA: expected one of scalar") and lines[0].endswith(f"got '{name}'")
    for kernel in conv1x1_ext.build_info()["microkernels"].split(", "):
        assert isa_of(kernel) in lines[0]


def test_build_info():
    info = conv1x1_ext.build_info()
    assert info["version"] == conv1x1_ext.__version__ and info["torch"] == torch.__version__
    assert info["torch_target"] == "2.10" and info["threads"] == str(torch.get_num_threads())
    assert {"isa", "microkernels", "compiler", "library", "cuda_archs"} <= set(info)


def test_explain():
    x, w, b = torch.randn(2, 64, 14, 14), torch.randn(96, 64, 1, 1), torch.randn(96)
    out = conv1x1_ext.explain(x, w, b, 2, activation="relu")
    assert out["gemm"].startswith("m 96, n 98, k 64") and out["dtype"].startswith("float32")
    assert out["kernel"].split(":")[0] in conv1x1_ext.build_info()["microkernels"]
    assert "epilogue" in out["activation"] and "fast path" in out["route"]
    text = str(out)
    assert all(key in text for key in out) and len(text.splitlines()) == len(out)
    assert "by torch" in conv1x1_ext.explain(x, w.requires_grad_(), activation="silu")["activation"]
    for direction in ("dgrad", "wgrad", "avg_pool"):
        assert conv1x1_ext.explain(x, w, b, direction=direction)["isa"].startswith(conv1x1_ext.build_info()["isa"])
