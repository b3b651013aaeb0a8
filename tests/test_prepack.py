"""A packed weight kept between calls: the bits of a call that packs for itself, for any input."""

import copy
import io
import os
import subprocess
import sys

import pytest
import torch

import conv1x1_ext
from conv1x1_ext import Conv1x1, Conv1x1_1d, Conv1x1_3d, Conv1x1Act, conv1x1

pytestmark = pytest.mark.cpu_only(reason="CUDA kernels read the weight as it lies")

C_IN, C_OUT = 40, 70


def image(dtype=torch.float32, channels_last=True, size=(7, 7), batch=1):
    x = torch.randn(batch, C_IN, *size).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def layer(dtype=torch.float32, **kwargs):
    return Conv1x1Act(C_IN, C_OUT, activation="relu", dtype=dtype, **kwargs).eval()


def reference(m, x, residual=None):
    given = {"groups": m.groups, "activation": m.activation, "residual": residual}
    with torch.no_grad():
        return conv1x1(x, m.weight, m.bias, m.stride, **given)


def assert_right(m, x):
    with torch.no_grad():
        assert torch.equal(m(x), reference(m, x))


@pytest.fixture
def packed():
    m, x = layer(), image()
    m.prepack(x)
    assert m.prepacked
    assert_right(m, x)
    return m, x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("groups,stride", [(1, 1), (2, 1), (10, 2)])
def test_the_bits_of_a_call_that_packs(dtype, channels_last, groups, stride):
    m = layer(dtype, groups=groups, stride=stride)
    m.prepack(image(dtype, channels_last))
    for size, batch in (((7, 7), 1), ((1, 1), 1), ((1, 1), 5), ((14, 9), 3)):
        for layout in (channels_last, not channels_last):  # panels of another layout are left aside
            x = image(dtype, layout, size, batch)
            assert_right(m, x)
            with torch.no_grad():
                residual = torch.randn_like(m(x))
                expected = conv1x1_ext.conv1x1(
                    x, m.weight, m.bias, stride, groups=groups, activation="relu", residual=residual
                )
                assert torch.equal(m(x, residual), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("groups", [1, 2])
def test_many_pixels_on_two_threads(dtype, groups):
    """Each thread copies the panels then."""
    m = layer(dtype, groups=groups)
    m.prepack(image(dtype))
    torch.set_num_threads(2)
    assert_right(m, image(dtype, size=(45, 47), batch=2))


@pytest.mark.parametrize("module,shape", [(Conv1x1_1d, (2, C_IN, 9)), (Conv1x1_3d, (2, C_IN, 2, 3, 4))])
def test_other_dimensions(module, shape):
    m, x = module(C_IN, C_OUT).eval(), torch.randn(shape)
    m.prepack(x)
    assert_right(m, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("c_out", [48, 64, 130])
def test_panels_meet_channels_that_are_not_neighbours(c_out, dtype):
    """Every second channel of a channels-last tensor: x is read otherwise than the input the weight was packed for."""
    m = conv1x1_ext.Conv1x1(32, c_out, dtype=dtype).eval()
    whole = torch.randn(2, 64, 9, 7, dtype=dtype).contiguous(memory_format=torch.channels_last)
    m.prepack(whole[:, :32])
    for x in (whole[:, ::2], whole[:, :32], whole[:, 32:]):
        with torch.no_grad():
            assert torch.equal(m(x), conv1x1_ext.conv1x1(x, m.weight, m.bias, activation=m.activation))


def test_what_is_packed_is_used():
    m, x = layer(), image()
    m.prepack(x)
    with torch.profiler.profile() as profile, torch.no_grad():
        m(x)
    assert "conv1x1_ext::_fprop_packed" in {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_contiguous_weights_need_no_packing(dtype):
    """But where they are multiplied in parts."""
    m, x = layer().to(dtype), image(channels_last=False).to(dtype)
    m.prepack(x)
    in_parts = "as the sum of" in conv1x1_ext.explain(x, m.weight)["A"]
    assert m.prepacked == in_parts and not (in_parts and dtype == torch.float64)
    assert_right(m, x)


def leave_vectors_idle(x, stride):
    """Fifteen percent of them: 25 pixels do, but of AVX2's four float64."""
    lanes = {"scalar": 16, "avx2": 32}.get(conv1x1_ext.build_info()["isa"], 64) // max(x.itemsize, 4)
    pixels = x[0, 0, ::stride, ::stride].numel()
    return pixels < 0.85 * -(-pixels // lanes) * lanes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("groups,stride,size", [(1, 1, (5, 5)), (2, 1, (3, 3)), (1, 2, (9, 10)), (1, 1, (1, 1))])
def test_a_few_contiguous_pixels(dtype, activation, groups, stride, size):
    """They leave vectors half empty, which the packed weight fills: the same bits; other sizes are as before."""
    m = Conv1x1Act(520 * groups, 530 * groups, activation=activation, dtype=dtype, groups=groups, stride=stride).eval()
    x = torch.randn(1, m.in_channels, *size).to(dtype)
    m.prepack(x)
    assert m.prepacked or not leave_vectors_idle(x, stride)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for like in (x, x[:, :, :, 1:] if size[1] > 1 else x, torch.randn(3, *x.shape[1:]).to(dtype)):
                assert_right(m, like)
                with torch.no_grad():
                    residual = torch.randn_like(m(like))
                    given = {"stride": stride, "groups": groups, "activation": activation, "residual": residual}
                    expected = conv1x1_ext.conv1x1(like, m.weight, m.bias, **given)
                    assert torch.equal(m(like, residual), expected)
    finally:
        torch.set_num_threads(threads)


def test_a_few_contiguous_pixels_meet_the_panels():
    m, x = Conv1x1(130, 140, bias=False).eval(), torch.randn(1, 130, 3, 3)
    m.prepack(x)
    m._packed.panels[64:] = 0  # behind what tells their layout
    with torch.no_grad():
        assert not m(x).any()
        assert m(torch.randn(1, 130, 8, 8)).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_few_contiguous_pixels_of_very_many_channels(dtype):
    """More of k than L2 holds comes in pieces, whose sums are carried from one to the next."""
    m, x = Conv1x1Act(20_000, 140, activation="relu", dtype=dtype).eval(), torch.randn(1, 20_000, 3, 1, dtype=dtype)
    m.prepack(x)
    assert m.prepacked
    assert_right(m, x)


def test_inference_mode_around_the_call(packed):
    m, x = packed
    with torch.inference_mode():
        assert torch.equal(m(x), reference(m, x))
    assert m.prepacked


def test_bad_input_is_refused_as_by_forward():
    with pytest.raises(RuntimeError, match="input"):
        layer().prepack(torch.randn(1, C_IN + 1, 7, 7))


def test_never_in_the_state_dict_nor_in_a_pickle(packed):
    m, x = packed
    assert set(m.state_dict()) == {"weight", "bias"} and not list(m.buffers())
    file = io.BytesIO()
    torch.save(m, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    twin = copy.deepcopy(m)
    for other in (loaded, twin):
        assert not other.prepacked
        assert_right(other, x)
    with torch.no_grad():
        twin.weight.mul_(2)
    assert m.prepacked
    assert_right(m, x)


def test_compiled(packed):
    m, x = packed
    torch._dynamo.reset()
    compiled = torch.compile(m, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), reference(m, x))


def test_autocast(packed):
    m, x = packed
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert m(x).dtype == torch.bfloat16


PROGRAM = """
import os, torch, conv1x1_ext
m = conv1x1_ext.Conv1x1(40, 70).eval()
x = torch.randn(1, 40, 7, 7).contiguous(memory_format=torch.channels_last)
m.prepack(x)
with torch.no_grad():
    assert torch.equal(m(x), conv1x1_ext.conv1x1(x, m.weight, m.bias))
print(m.prepacked)
"""


@pytest.mark.parametrize("isa", ["scalar", "avx2"])
def test_every_instruction_set(isa):
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], env={**os.environ, "CONV1X1_ISA": isa}, capture_output=True, text=True
    )
    if "this CPU" in result.stderr:
        pytest.skip(result.stderr.splitlines()[-1])
    assert result.stdout.strip() == "True", result.stderr
