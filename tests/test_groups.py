"""Groups of channels that lie side by side, channels last: they take turns at pixels that stay in cache."""

import pytest
import torch
from helpers import expect_ok, run_python
from test_isa import isa_of

import conv1x1_ext

pytestmark = pytest.mark.cpu_only(reason="blocks of the CPU's kernels")

LARGE = """
import torch, conv1x1_ext
from helpers import *
torch.manual_seed({seed})
dtype = torch.{dtype}

def run(x, w, b, r, dy, groups, stride):
    leaves = [t.detach().requires_grad_() for t in (x, w, b, r)]
    y = conv1x1_ext.conv1x1(*leaves[:3], stride, groups=groups, activation="relu", residual=leaves[3])
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

torch.set_num_threads(2)
turns = set()
for case in (Case(8, 160, 96, (40, 40), 1, 8), Case(6, 99, 198, (52, 47), 1, 3), Case(5, 192, 384, (80, 78), 2, 2)):
    for layout in ("channels_last", "contiguous"):
        x, w = laid_out(case.x_shape, dtype, layout), weight_of(case.w_shape, dtype)
        b, r = randn((case.c_out,), dtype), laid_out(case.y_shape, dtype, layout)
        dy = laid_out(case.y_shape, dtype, layout)
        for direction in ("fprop", "dgrad", "wgrad"):
            plan = conv1x1_ext.explain(x, w, None, case.stride, groups=case.groups, direction=direction)
            if "groups take turns" in plan["block"]:
                assert layout == "channels_last"
                turns.add(direction)
        check_forward(x, w, b, case.stride, groups=case.groups, activation="relu", residual=r)
        check_gradients(x, w, b, case.stride, groups=case.groups, activation="relu", residual=r, dy=dy)
        results = []
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(run(x, w, b, r, dy, case.groups, case.stride))
        torch.set_num_threads(2)
        for other in results[1:]:
            assert all(map(same_bits, results[0], other)), (case, layout)
        alone = run(x[:1], w, b, r[:1], dy[:1], case.groups, case.stride)
        assert all(same_bits(results[0][i][:1], alone[i]) for i in (0, 1, 4)), (case, layout)
        layer = conv1x1_ext.Conv1x1(case.c_in, case.c_out, stride=case.stride, groups=case.groups, dtype=dtype)
        layer = layer.eval().to(memory_format=getattr(torch, layout + "_format" * (layout == "contiguous")))
        with torch.no_grad():
            y = layer(x)
            layer.prepack(x)
            assert same_bits(layer(x), y), (case, layout)
print(*sorted(turns))
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("isa", ["avx2", "avx512", "avx512_bf16", "avx512_amx"])
def test_groups_take_turns(isa, dtype):
    """Right in every direction, the same bits for any thread count, for a sample alone and for a packed weight."""
    if isa not in map(isa_of, conv1x1_ext.build_info()["microkernels"].split(", ")):
        pytest.skip(f"this CPU does not run {isa}")
    if isa == "avx512_bf16" and dtype != "bfloat16":
        pytest.skip("avx512's kernels")
    code = LARGE.format(seed=torch.initial_seed() % (1 << 31), dtype=dtype)
    assert expect_ok(run_python(code, CONV1X1_ISA=isa)).split() == ["dgrad", "fprop", "wgrad"]
