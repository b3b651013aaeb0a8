"""prepack freezes a layer: what would make the packed weight stale is refused, or raises at the next call."""

import pytest
import torch
from test_prepack import C_IN, C_OUT, assert_right, image, layer, reference
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils import prune

import conv1x1_ext
from conv1x1_ext import Conv1x1, Conv1x1Act, Conv1x1AvgPool, conv1x1

pytestmark = pytest.mark.cpu_only(reason="CUDA kernels read the weight as it lies")


@pytest.fixture
def packed():
    m, x = layer(), image()
    m.prepack(x)
    assert m.prepacked
    assert_right(m, x)
    return m, x


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


def test_training_mode_is_refused():
    with pytest.raises(RuntimeError, match=r"Conv1x1Act\.prepack: expected a module in eval mode.*call eval"):
        layer().train().prepack(image())
