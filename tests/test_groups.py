"""Groups of channels that lie side by side, channels last: they take turns at pixels that stay in cache."""

import pytest
import torch
from covering import cover
from helpers import expect_ok, run_python
from test_isa import isas

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
        if layout == "contiguous":  # whose groups never take turns: the suite's other files have them
            continue
        check_forward(x, w, b, case.stride, groups=case.groups, activation="relu", residual=r)
        check_gradients(x, w, b, case.stride, groups=case.groups, activation="relu", residual=r, dy=dy)
        results = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(run(x, w, b, r, dy, case.groups, case.stride))
        torch.set_num_threads(2)
        assert all(map(same_bits, *results)), (case, layout)
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


# Of this CPU: a combination with another one would be skipped, and its dtype with it.
ISAS = [isa for isa in ("avx2", "avx512", "avx512_bf16", "avx512_amx") if isa in isas()] or ["scalar"]


def has_kernels(isa, dtype):
    """Of its own; avx512_bf16's for the other types are avx512's."""
    return isa != "avx512_bf16" or dtype == "bfloat16"


@cover(1, keep=has_kernels, isa=ISAS, dtype=("float32", "bfloat16", "float16", "float64"))
def test_groups_take_turns(isa, dtype):
    """Right in every direction, the same bits for any thread count, for a sample alone and for a packed weight."""
    code = LARGE.format(seed=torch.initial_seed() % (1 << 31), dtype=dtype)
    assert expect_ok(run_python(code, CONV1X1_ISA=isa)).split() == ["dgrad", "fprop", "wgrad"]
