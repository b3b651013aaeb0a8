"""A packed weight kept between calls: the same bits. What makes it stale is refused, or raises where torch knows."""

import copy
import io
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils import prune

import conv1x1_ext
from conv1x1_ext import Conv1x1, Conv1x1_1d, Conv1x1_3d, Conv1x1Act, Conv1x1AvgPool, conv1x1

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


def in_place(m):
    with torch.no_grad():
        m.weight.mul_(2)


def optimizer_step(m):
    m.weight.grad = torch.ones_like(m.weight)
    torch.optim.SGD([m.weight], lr=0.5).step()


def new_parameter(m):
    m.weight = nn.Parameter(torch.randn_like(m.weight))


def new_data(m):
    m.weight.data = torch.randn_like(m.weight)


def rounded(m):
    """Two assignments, the second of which could end where the weight lay before."""
    m.weight.data = m.weight.data.to(torch.bfloat16)
    m.weight.data = m.weight.data.float()


def through_a_view(m):
    with torch.no_grad():
        m.weight[3].zero_()


def through_detach(m):
    m.weight.detach().add_(1)


def initialised(m):
    nn.init.normal_(m.weight)


def parametrized(m):
    nn.utils.parametrizations.weight_norm(m)


CHANGES = [in_place, optimizer_step, new_parameter, new_data, rounded, through_a_view, through_detach, initialised]


@pytest.mark.parametrize("change", [*CHANGES, parametrized], ids=lambda f: f.__name__)
def test_a_call_after_a_change_that_torch_knows_of_raises(packed, change):
    m, x = packed
    change(m)
    assert not m.prepacked and m.frozen
    with torch.no_grad():
        for residual in (None, torch.randn(1, C_OUT, 7, 7)):
            with pytest.raises(RuntimeError, match=r"Conv1x1Act: weight: it .*: call unpack\(\), or prepack\(\) again"):
                m(x, residual)
    if change is not parametrized:
        m.prepack(x)
        assert m.prepacked
        assert_right(m, x)
        change(m)
    assert m.unpack() is m and not m.frozen
    with torch.no_grad():
        assert torch.equal(m(x), conv1x1(x, m.weight, m.bias, activation="relu"))


def test_no_other_weight_comes_to_lie_at_its_address(packed):
    """Its memory is kept, until it is unpacked."""
    m, _ = packed
    memory = StorageWeakRef(m.weight.untyped_storage())
    m.weight.data = torch.randn_like(m.weight)
    assert not memory.expired()
    m.unpack()
    assert memory.expired()


def test_a_weight_of_functional_call_is_another_one(packed):
    m, x = packed
    with torch.no_grad(), pytest.raises(RuntimeError, match="is another tensor"):
        torch.func.functional_call(m, {"weight": nn.Parameter(torch.randn_like(m.weight))}, (x,))
    assert_right(m, x)


STATE = {"weight": torch.ones(C_OUT, C_IN, 1, 1, device="cpu"), "bias": torch.ones(C_OUT, device="cpu")}
REFUSED = {
    "train": (lambda m: m.train(), r"Conv1x1Act: train\(\)"),
    "load_state_dict": (lambda m: m.load_state_dict(STATE), "weight, bias: load_state_dict"),
    "load_state_dict of a part": (
        lambda m: m.load_state_dict({"bias": STATE["bias"]}, strict=False),
        "load_state_dict",
    ),
    "load_state_dict by assignment": (lambda m: m.load_state_dict(STATE, assign=True), "load_state_dict"),
    "double": (lambda m: m.double(), "weight: conversion to torch.float64 on cpu"),
    "to a dtype": (lambda m: m.to(torch.bfloat16), "weight: conversion to torch.bfloat16 on cpu"),
    "to a device": (lambda m: m.to("meta"), "weight: conversion to torch.float32 on meta"),
    "to other memory": (lambda m: m.to_empty(device="cpu"), "weight: a move to other memory"),
}


@pytest.mark.parametrize("whole_model", [False, True])
@pytest.mark.parametrize("name", list(REFUSED))
def test_what_would_make_it_stale_is_refused(packed, name, whole_model):
    m, x = packed
    run, message = REFUSED[name]
    before = m.weight.clone()
    outer = nn.Sequential(m).eval()
    if whole_model and "load" in name:
        outer[0], message = m, message.replace("weight, bias", "0.weight, 0.bias")
        keys = ["bias"] if "part" in name else list(STATE)
        attempt = lambda: outer.load_state_dict(  # noqa: E731
            {f"0.{key}": STATE[key] for key in keys}, strict=False, assign="assignment" in name
        )
    else:
        attempt = lambda: run(outer if whole_model else m)  # noqa: E731
    with pytest.raises(RuntimeError, match=f"{message}.*the layer is prepacked, for inference: unpack\\(\\) it first"):
        attempt()
    assert m.prepacked and not m.training and torch.equal(m.weight, before)
    assert_right(m, x)
    outer.eval()
    conv1x1_ext.unpack(outer)
    attempt()


def test_what_changes_nothing_is_not_refused(packed):
    m, x = packed
    m.eval()
    m.float().to("cpu").to(torch.float32).requires_grad_(False)
    nn.Sequential(m, nn.Linear(2, 2)).load_state_dict({"1.weight": torch.ones(2, 2)}, strict=False)
    assert m.prepacked
    assert_right(m, x)


def test_a_weight_in_shared_memory_lies_elsewhere(packed):
    m, x = packed
    m.share_memory()
    with torch.no_grad(), pytest.raises(RuntimeError, match="lies elsewhere in memory"):
        m(x)


@pytest.mark.parametrize("of", ["weight", "input", "bias", "residual"])
def test_gradients_are_refused(packed, of):
    m, x = packed
    residual = torch.randn(1, C_OUT, 7, 7)
    m.requires_grad_(False)
    {"weight": m.weight, "bias": m.bias, "input": x, "residual": residual}[of].requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(m, backend="eager")
    for call in (m, compiled):
        with pytest.raises(RuntimeError, match=r"without gradients: call it under torch.no_grad\(\).*or unpack\(\)"):
            call(x, residual)
    with torch.no_grad():
        assert torch.equal(m(x, residual), reference(m, x, residual))
        assert torch.equal(compiled(x, residual), reference(m, x, residual))
    m.unpack()(x, residual).sum().backward()


@pytest.mark.parametrize("make", [lambda: Conv1x1(8, 8), lambda: Conv1x1AvgPool(C_IN, C_OUT)], ids=["small", "pooled"])
def test_a_layer_with_nothing_to_pack_is_frozen_too(make):
    m = make().eval()
    x = torch.randn(1, m.in_channels, 7, 7).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        before = m(x)
        assert m.prepack(x) is m and m.frozen and not m.prepacked
        assert torch.equal(m(x), before)
        m.weight.mul_(2)  # read as it is
        after = m(x)
        assert torch.equal(after, m.unpack()(x)) and not torch.equal(after, before)
        m.prepack(x)
    for refused in (lambda: m(x), m.train, m.double, lambda: m.load_state_dict(m.state_dict())):
        with pytest.raises(RuntimeError, match=r"unpack\(\)"):
            refused()


def through_data(m):
    m.weight.data.copy_(torch.randn_like(m.weight))


def through_numpy(m):
    m.weight.detach().numpy()[:] = 3


def through_dlpack(m):
    torch.from_dlpack(m.weight.detach()).fill_(3)


def through_a_fused_optimizer(m):
    m.weight.grad = torch.ones_like(m.weight)
    torch.optim.AdamW([m.weight], lr=0.5, fused=True).step()


UNSEEN = [through_data, through_numpy, through_dlpack, through_a_fused_optimizer]


@pytest.mark.parametrize("change", UNSEEN, ids=lambda f: f.__name__)
def test_a_change_that_torch_does_not_count_wants_another_prepack(packed, change):
    m, x = packed
    change(m)
    m.prepack(x)
    assert_right(m, x)


@pytest.mark.parametrize("change", UNSEEN, ids=lambda f: f.__name__)
def test_a_forgotten_prepack_is_an_error_where_asked_for(monkeypatch, change):
    monkeypatch.setenv("CONV1X1_CHECK_PACKED", "1")
    m, x = layer(), image()
    m.prepack(x)
    assert_right(m, x)
    change(m)
    with (
        pytest.raises(RuntimeError, match=r"weight: it was written.*call unpack\(\), or prepack\(\) again"),
        torch.no_grad(),
    ):
        m(x)


@pytest.mark.parametrize("change", [nn.utils.parametrizations.weight_norm, lambda m: prune.identity(m, "weight")])
def test_a_weight_that_is_made_at_every_call_is_refused(change):
    m = layer()
    change(m)
    with pytest.raises(TypeError, match="weight: expected a plain Parameter of the layer, got Tensor"):
        m.prepack(image())


def test_autocast_regions_are_refused():
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match=r"prepack: .*autocast region"):
        layer().prepack(image())


class Model(nn.Module):
    """Layers of all kinds: called once, twice, by name, behind a stock layer, never."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, C_IN, 3), nn.BatchNorm2d(C_IN))
        self.twice = Conv1x1(C_IN, C_IN)
        self.act = Conv1x1Act(C_IN, C_OUT, activation="silu")
        self.head = Conv1x1AvgPool(C_OUT, 10)
        self.never = Conv1x1(C_IN, C_OUT)
        self.register_buffer("calls", torch.zeros(()))
        self.seen = []

    def forward(self, x, scale=1.0):
        self.calls += 1
        self.seen.append((self.training, torch.is_grad_enabled()))
        x = self.twice(self.twice(self.stem(x)[:, :, ::2, ::2]) * scale)
        return self.head(self.act(input=x))


def test_a_whole_model():
    model, x = Model().eval().to(memory_format=torch.channels_last), torch.randn(2, 3, 9, 9)
    x = x.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = model(x)
    assert conv1x1_ext.prepack(model, x) is model
    assert model.seen[-1] == (False, False) and model.calls == 1
    assert model.twice.prepacked and model.act.prepacked and model.head.frozen and not model.never.frozen
    assert not model.act._forward_pre_hooks
    with torch.no_grad():
        assert torch.equal(model(x), expected)
        model.act.weight.mul_(2)
        with pytest.raises(RuntimeError, match="Conv1x1Act: weight: it was written"):
            model(x)
        conv1x1_ext.prepack(model, (x, 2.0))  # as the weights are now
        conv1x1_ext.prepack(model, x, scale=2.0)
        frozen = model(x)
        assert conv1x1_ext.unpack(model) is model and not model.act.frozen
        assert torch.equal(model(x), frozen)
    model.train()
    model(x).sum().backward()


def test_a_compiled_model():
    torch._dynamo.reset()
    model, x = nn.Sequential(Conv1x1(C_IN, C_OUT), nn.ReLU()).eval(), image()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        expected = compiled(x)
        assert conv1x1_ext.prepack(compiled, x) is compiled and model[0].prepacked
        torch.testing.assert_close(compiled(x), expected)


def test_a_whole_model_errors():
    model, x = Model().eval(), torch.randn(2, 3, 9, 9)
    model.stem[1].train()
    with pytest.raises(RuntimeError, match=r"its module 'stem.1' is in training mode: call model.eval\(\)"):
        conv1x1_ext.prepack(model, x)
    with pytest.raises(ValueError, match="the example reaches no layer of conv1x1_ext"):
        conv1x1_ext.prepack(nn.Linear(3, 3).eval(), torch.randn(2, 3))
    model.eval()
    with pytest.raises(RuntimeError, match=r"autocast region.*layer 'twice' of the model"), torch.autocast("cpu"):
        conv1x1_ext.prepack(model, x)
    with pytest.raises(RuntimeError, match="expected input"):
        conv1x1_ext.prepack(model, torch.randn(2, 4, 9, 9))
    conv1x1_ext.prepack(model, x)
    before = model.act._packed
    prune.identity(model.head, "weight")
    with pytest.raises(TypeError, match=r"plain Parameter.*layer 'head' of the model"):
        conv1x1_ext.prepack(model, x)
    assert model.act._packed is before and model.calls == 0


def test_inference_tensors_are_refused():
    with torch.inference_mode():
        m = layer()
        x = image()
    with pytest.raises(RuntimeError, match="weight: expected a tensor that counts its writes, got an inference tensor"):
        m.prepack(x)
    with torch.inference_mode():
        assert torch.equal(m(x), reference(m, x))


def test_inference_mode_around_the_call(packed):
    m, x = packed
    with torch.inference_mode():
        assert torch.equal(m(x), reference(m, x))
    assert m.prepacked


def test_training_mode_is_refused():
    with pytest.raises(RuntimeError, match=r"Conv1x1Act\.prepack: expected a module in eval mode.*call eval"):
        layer().train().prepack(image())


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
    in_place(twin)
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
