"""The benchmarks' own arithmetic: layers with groups, the reference that they check against, what they select."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT

sys.path.insert(0, str(ROOT))
from bench import blocks, op, peers, scaling
from bench.harness import NETS, Layer, load_shapes

pytestmark = pytest.mark.cpu_only(reason="the CPU's benchmarks")


def test_every_shape_file_is_read():
    for net in NETS:
        for layer in load_shapes([net], [2]):
            assert layer.n == 2 and layer.c_in % layer.groups == layer.c_out % layer.groups == 0
    grouped = Layer(1, 60, 240, 28, 28, 1, 3)
    assert grouped in load_shapes(["shufflenet"], [1]) and str(grouped) == "1x 60->240 28x28 g3"
    assert grouped.flops == 2 * 28 * 28 * 240 * 20
    assert grouped.bytes(4) == 4 * (28 * 28 * (60 + 240) + 240 * 20)


@pytest.mark.parametrize("stride,groups", [(1, 1), (2, 1), (1, 3), (2, 3)])
def test_the_reference_is_the_convolution(stride, groups):
    x, w, b = (torch.randn(s, dtype=torch.float64) for s in ((2, 6, 5, 4), (9, 6 // groups, 1, 1), (9,)))
    leaves = [t.requires_grad_() for t in (x, w, b)]
    y = F.relu(F.conv2d(x, w, b, stride, groups=groups))
    dy = torch.randn_like(y)
    expected = [y, *torch.autograd.grad(y, leaves, dy)]
    found = peers.products(*(t.detach() for t in leaves), dy, stride, groups)
    torch.testing.assert_close(list(found), expected)


@pytest.mark.parametrize("train", [False, True])
def test_peers_agree_on_a_grouped_layer(train):
    """Preparing compares every candidate with the reference."""
    case = peers.Case(Layer(2, 12, 18, 6, 5, 1, 3), "float32", torch.get_num_threads())
    chosen = [p for p in (peers.TRAIN if train else peers.FORWARD) if p.name not in ("compile", "onnxruntime")]
    with torch.inference_mode(not train):
        calls, _, skipped = op.prepare(case, chosen, train)
    assert {"ours NCHW", "ours NHWC", "stock NCHW", "stock NHWC"} <= set(calls)
    assert "linear NHWC" in skipped and not any(s.startswith("wrong") for s in skipped.values())


@pytest.mark.parametrize("layout", peers.LAYOUTS)
def test_blocks_are_checked_before_they_are_timed(layout):
    threads = torch.get_num_threads()
    first, second = (peers.Case(Layer(3, c, 8, 5, 4), "float32", threads) for c in (6, 8))
    assert set(blocks.pool_calls(first, layout, True)) == set(blocks.POOLS)
    assert set(blocks.pair_calls(first, second, layout)) == {"ours", "stock", "pieces"}


def test_compute_bound_layers():
    chosen = scaling.compute_bound(["seed", "resnet50"], [16], "float32", 40)
    assert Layer(16, 512, 512, 12, 12) in chosen and Layer(16, 8, 8, 7, 7) not in chosen


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_a_command_begins_anew_with_kept_pages():
    code = "import sys; from bench.harness import keep_pages, pages; keep_pages(); print(pages(), sys.argv[1:])"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, "-c", code, "--rounds", "3"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "kept by malloc ['--rounds', '3']"
