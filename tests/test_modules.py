"""The layers beside their stock twins: initialisation, state, copies, repr, and training."""

import copy
import io
import pickle

import pytest
import torch
from helpers import ACTIVATIONS, DEVICE, activate
from torch import nn

from conv1x1_ext import (
    Conv1x1,
    Conv1x1_1d,
    Conv1x1_3d,
    Conv1x1Act,
    Conv1x1Act_1d,
    Conv1x1Act_3d,
    Conv1x1AvgPool,
    MLPConv,
)

KINDS = [
    (Conv1x1_1d, Conv1x1Act_1d, nn.Conv1d, 1),
    (Conv1x1, Conv1x1Act, nn.Conv2d, 2),
    (Conv1x1_3d, Conv1x1Act_3d, nn.Conv3d, 3),
]
kinds = pytest.mark.parametrize("linear,act,stock,dims", KINDS, ids=lambda v: getattr(v, "__name__", str(v)))
MODULES = {"relu": nn.ReLU, "relu6": nn.ReLU6, "silu": nn.SiLU, "hardswish": nn.Hardswish, "gelu": nn.GELU}


def seeded(make, *args, **kwargs):
    torch.manual_seed(7)
    return make(*args, **kwargs)


@kinds
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
def test_same_initialisation_state_and_output(linear, act, stock, dims, bias, groups):
    """By nn.Conv2d's own positional arguments."""
    args = (6, 8, 1, 2, 0, 1, groups, bias, "zeros", DEVICE, torch.float32)
    layers = [(seeded(linear, *args), None), *((seeded(act, *args, activation=f), f) for f in ACTIVATIONS)]
    b = seeded(stock, *args)
    for a, activation in layers:
        assert isinstance(a, stock) == isinstance(a, linear)
        assert a.activation == activation
        assert list(a.state_dict()) == list(b.state_dict()) == (["weight", "bias"] if bias else ["weight"])
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
        for x in (torch.randn(2, 6, *[5] * dims), torch.randn(6, *[5] * dims)):
            torch.testing.assert_close(a(x), activate(b(x), activation), atol=1e-5, rtol=1e-5)
            z = b(x)
            r = torch.randn_like(z)
            torch.testing.assert_close(a(x, r), activate(z + r, activation), atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(a(x, residual=r), a(x, r))


@kinds
def test_load_state_dict_both_ways(linear, act, stock, dims):
    x = torch.randn(2, 6, *[3] * dims)
    for a in (linear(6, 8), act(6, 8, activation="relu")):
        b, c = stock(6, 8, 1), stock(6, 8, 1)
        a.load_state_dict(b.state_dict())
        torch.testing.assert_close(a(x), activate(b(x), a.activation))
        c.load_state_dict(a.state_dict())
        assert torch.equal(c.weight, b.weight)


@kinds
def test_repr(linear, act, stock, dims):
    ones = "(" + ", ".join(["1"] * dims) + ("," if dims == 1 else "") + ")"
    assert repr(linear(3, 4)) == f"{linear.__name__}(3, 4, kernel_size={ones}, stride={ones})"
    text = repr(act(4, 6, stride=2, groups=2, bias=False, activation="relu6"))
    assert text.startswith(act.__name__) and "groups=2" in text and text.endswith("bias=False, activation='relu6')")


@kinds
@pytest.mark.parametrize("activation", [None, "silu"])
def test_copies(linear, act, stock, dims, activation):
    module = (linear(6, 8) if activation is None else act(6, 8, activation=activation)).eval()
    module.weight.requires_grad_(False)
    x = torch.randn(2, 6, *[3] * dims)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded):
        assert type(other) is type(module) and other.activation == activation and not other.training
        assert other.weight is not module.weight and not other.weight.requires_grad
        assert torch.equal(other(x), module(x))


def test_a_pickle_of_the_first_version_keeps_its_activation_or_is_refused():
    """Its Conv1x1 had an activation."""
    state = Conv1x1(3, 4).__getstate__()
    other = Conv1x1.__new__(Conv1x1)
    other.__setstate__({**state, "activation": None})
    assert other.activation is None and other(torch.randn(1, 3, 2, 2)).shape == (1, 4, 2, 2)
    with pytest.raises(RuntimeError, match=r"load its state_dict into Conv1x1Act\(..., activation='relu'\)"):
        Conv1x1.__new__(Conv1x1).__setstate__({**state, "activation": "relu"})


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_to(dtype):
    a, b = seeded(Conv1x1, 6, 8), seeded(nn.Conv2d, 6, 8, 1)
    a, b = a.to(dtype).to(memory_format=torch.channels_last), b.to(dtype).to(memory_format=torch.channels_last)
    assert a.weight.dtype == dtype and a.weight.stride() == b.weight.stride()
    x = torch.randn(2, 6, 4, 4, dtype=dtype)
    assert a(x).stride() == b(x).stride() and a(x).dtype == dtype
    assert Conv1x1(3, 4, dtype=dtype).weight.dtype == dtype
    assert Conv1x1(3, 4, device="meta").weight.is_meta


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_avg_pool_module(activation):
    a, b = seeded(Conv1x1AvgPool, 12, 10, activation=activation), seeded(nn.Conv2d, 12, 10, 1)
    x = torch.randn(3, 12, 6, 5)
    expected = activate(b(x), activation).mean((2, 3))
    torch.testing.assert_close(a(x), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(a(x[0]), expected[0], atol=1e-5, rtol=1e-5)
    assert not isinstance(a, nn.Conv2d) and "Conv1x1AvgPool(12, 10" in repr(a)
    torch.testing.assert_close(Conv1x1AvgPool.from_conv2d(b, activation)(x), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(copy.deepcopy(a)(x), a(x))
    assert Conv1x1AvgPool(3, 4).activation == "relu"


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mlpconv_is_conv_and_two_1x1_layers(activation):
    block = MLPConv(3, 16, 5, (24, 20), stride=2, padding=2, activation=activation)
    layers = [m for m in block if hasattr(m, "weight")]
    assert all(isinstance(m, nn.Conv2d) for m in (layers[:1] if activation else layers))
    sizes = [tuple(m.weight.shape) for m in layers]
    assert sizes == [(24, 3, 5, 5), (20, 24, 1, 1), (16, 20, 1, 1)]
    x = torch.randn(2, 3, 13, 11)
    y = x
    for layer in layers:
        y = activate(torch.conv2d(y, layer.weight, layer.bias, layer.stride, layer.padding), activation)
    torch.testing.assert_close(block(x), y, atol=1e-5, rtol=1e-5)


def test_mlpconv_defaults_and_errors():
    sizes = [tuple(m.weight.shape) for m in MLPConv(3, 8, 3) if hasattr(m, "weight")]
    assert sizes == [(8, 3, 3, 3), (8, 8, 1, 1), (8, 8, 1, 1)]
    assert all(m.bias is None for m in MLPConv(3, 8, 3, bias=False) if hasattr(m, "weight"))
    assert MLPConv(3, 8, 3, dtype=torch.float64)[0].weight.dtype == torch.float64
    with pytest.raises(ValueError, match="mlp_channels: expected at least one width"):
        MLPConv(3, 8, 3, ())
    with pytest.raises(ValueError, match="activation"):
        MLPConv(3, 8, 3, activation="tanh")


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("activation", list(MODULES))
def test_a_swapped_model_trains_with_the_same_losses(activation, memory_format):
    def model(fused):
        torch.manual_seed(3)
        stock = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), MODULES[activation](),
            nn.Conv2d(16, 32, 1, stride=2), MODULES[activation](),
            nn.Conv2d(32, 24, 1, groups=4), MODULES[activation](),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 5),
        )  # fmt: skip
        if fused:
            for i in (2, 4):
                stock[i], stock[i + 1] = Conv1x1Act.from_conv2d(stock[i], activation), nn.Identity()
        return stock.to(memory_format=memory_format)

    x = torch.randn(8, 3, 12, 12).to(memory_format=memory_format)
    target = torch.randint(5, (8,))
    losses = []
    for fused in (False, True):
        net = model(fused)
        optimiser = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        losses.append([])
        for _ in range(12):
            optimiser.zero_grad()
            loss = nn.functional.cross_entropy(net(x), target)
            loss.backward()
            optimiser.step()
            losses[-1].append(loss.item())
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), atol=1e-4, rtol=1e-3)
    assert losses[1][-1] < losses[1][0]
