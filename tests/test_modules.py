"""The modules are nn.Conv layers: initialisation, state, copies, conversion, and training like stock."""

import copy
import io
import pickle

import pytest
import torch
from helpers import ACTIVATIONS, activate
from torch import nn

import conv1x1_ext
from conv1x1_ext import Conv1x1, Conv1x1_1d, Conv1x1_3d, Conv1x1AvgPool, MLPConv

KINDS = [(Conv1x1_1d, nn.Conv1d, 1), (Conv1x1, nn.Conv2d, 2), (Conv1x1_3d, nn.Conv3d, 3)]
kinds = pytest.mark.parametrize("ours,stock,dims", KINDS, ids=lambda v: getattr(v, "__name__", str(v)))
MODULES = {"relu": nn.ReLU, "relu6": nn.ReLU6, "silu": nn.SiLU, "hardswish": nn.Hardswish, "gelu": nn.GELU}


def twins(ours, stock, *args, activation=None, **kwargs):
    torch.manual_seed(7)
    a = ours(*args, activation=activation, **kwargs)
    torch.manual_seed(7)
    c_in, c_out, *stride = args
    return a, stock(c_in, c_out, 1, *stride, **kwargs)


@kinds
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
def test_same_initialisation_state_and_output(ours, stock, dims, bias, groups):
    for activation in ACTIVATIONS:
        a, b = twins(ours, stock, 6, 8, 2, groups=groups, bias=bias, activation=activation)
        assert isinstance(a, stock)
        assert list(a.state_dict()) == list(b.state_dict()) == (["weight", "bias"] if bias else ["weight"])
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
        for x in (torch.randn(2, 6, *[5] * dims), torch.randn(6, *[5] * dims)):
            torch.testing.assert_close(a(x), activate(b(x), activation), atol=1e-5, rtol=1e-5)
            z = b(x)
            r = torch.randn_like(z)
            torch.testing.assert_close(a(x, r), activate(z + r, activation), atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(a(x, residual=r), a(x, r))


@kinds
def test_load_state_dict_both_ways(ours, stock, dims):
    a, b = ours(6, 8), stock(6, 8, 1)
    a.load_state_dict(b.state_dict())
    x = torch.randn(2, 6, *[3] * dims)
    torch.testing.assert_close(a(x), b(x))
    c = stock(6, 8, 1)
    c.load_state_dict(a.state_dict())
    assert torch.equal(c.weight, b.weight)


@kinds
def test_repr(ours, stock, dims):
    ones = "(" + ", ".join(["1"] * dims) + ("," if dims == 1 else "") + ")"
    assert repr(ours(3, 4)) == f"{ours.__name__}(3, 4, kernel_size={ones}, stride={ones})"
    text = repr(ours(4, 6, 2, groups=2, bias=False, activation="relu6"))
    assert "groups=2" in text and "bias=False" in text and text.endswith("activation='relu6')")


@kinds
def test_copies(ours, stock, dims):
    module = ours(6, 8, activation="silu").eval()
    module.weight.requires_grad_(False)
    x = torch.randn(2, 6, *[3] * dims)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded):
        assert type(other) is ours and other.activation == "silu" and not other.training
        assert other.weight is not module.weight and not other.weight.requires_grad
        assert torch.equal(other(x), module(x))


def test_a_pickle_from_before_the_activation_still_loads():
    module = Conv1x1(3, 4, activation="relu")
    state = module.__getstate__() if hasattr(module, "__getstate__") else module.__dict__
    state = {k: v for k, v in module.__dict__.items() if k != "activation"} if state is module.__dict__ else dict(state)
    state.pop("activation", None)
    other = Conv1x1.__new__(Conv1x1)
    other.__setstate__(state)
    assert other.activation is None and other(torch.randn(1, 3, 2, 2)).shape == (1, 4, 2, 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_to(dtype):
    a, b = twins(Conv1x1, nn.Conv2d, 6, 8)
    a, b = a.to(dtype).to(memory_format=torch.channels_last), b.to(dtype).to(memory_format=torch.channels_last)
    assert a.weight.dtype == dtype and a.weight.stride() == b.weight.stride()
    x = torch.randn(2, 6, 4, 4, dtype=dtype)
    assert a(x).stride() == b(x).stride() and a(x).dtype == dtype
    assert Conv1x1(3, 4, dtype=dtype).weight.dtype == dtype
    assert Conv1x1(3, 4, device="meta").weight.is_meta


@pytest.mark.parametrize("args,error", [
    ({"in_channels": 3, "out_channels": 4, "activation": "tanh"}, "activation: expected one of"),
    ({"in_channels": 3, "out_channels": 4, "groups": 2}, "in_channels must be divisible by groups"),
    ({"in_channels": 4, "out_channels": 3, "groups": 2}, "out_channels must be divisible by groups"),
    ({"in_channels": 3, "out_channels": 4, "stride": 0}, "stride: expected positive integers, got 0"),
    ({"in_channels": 3, "out_channels": 4, "stride": (1, -1)}, r"stride: expected positive integers, got \(1, -1\)"),
])  # fmt: skip
def test_constructor_errors(args, error):
    with pytest.raises(ValueError, match=error):
        Conv1x1(**args)


@pytest.mark.parametrize(
    "name,value", [("activation", "gelu"), ("activation", None), ("stride", (2, 1)), ("groups", 2)]
)
def test_attributes_may_change_between_calls(name, value):
    module, x = Conv1x1(4, 6, activation="relu"), torch.randn(2, 4, 5, 5)
    module(x)
    setattr(module, name, value)
    if name == "groups":
        module.weight = nn.Parameter(torch.randn(6, 2, 1, 1))
    plain = {"groups": module.groups, "activation": module.activation}
    expected = conv1x1_ext.conv1x1(x, module.weight, module.bias, module.stride, **plain)
    assert torch.equal(module(x), expected)


@kinds
def test_from_conv2d_shares_the_parameters(ours, stock, dims):
    conv = stock(6, 8, 1, stride=2, groups=2).eval()
    conv.weight.requires_grad_(False)
    module = ours.from_conv2d(conv, activation="relu")
    assert module.weight is conv.weight and module.bias is conv.bias and not module.training
    assert (module.stride, module.groups, module.padding) == (conv.stride, conv.groups, conv.padding)
    x = torch.randn(2, 6, *[5] * dims)
    torch.testing.assert_close(module(x), conv(x).relu())
    with torch.no_grad():
        conv.weight.mul_(2)
    torch.testing.assert_close(module(x), conv(x).relu())
    assert "activation='relu'" in repr(module) and list(module.state_dict()) == ["weight", "bias"]


def test_from_conv2d_takes_what_a_1x1_kernel_makes_harmless():
    for conv in (
        nn.Conv2d(3, 4, 1, dilation=3),
        nn.Conv2d(3, 4, 1, padding="same"),
        nn.Conv2d(3, 4, 1, padding="valid"),
    ):
        x = torch.randn(1, 3, 5, 5)
        torch.testing.assert_close(Conv1x1.from_conv2d(conv)(x), conv(x))
    assert Conv1x1.from_conv2d(nn.Conv2d(3, 4, 1, bias=False)).bias is None
    assert Conv1x1.from_conv2d(Conv1x1(3, 4, activation="relu")).activation is None


@pytest.mark.parametrize("make,error,message", [
    (lambda: nn.Conv2d(3, 4, 3), ValueError, r"expected kernel_size 1, got \(3, 3\)"),
    (lambda: nn.Conv2d(3, 4, 1, padding=1), ValueError, r"expected padding 0, got \(1, 1\)"),
    (lambda: nn.Conv2d(3, 4, 1, padding=(0, 2)), ValueError, r"expected padding 0, got \(0, 2\)"),
    (lambda: nn.Conv1d(3, 4, 1), TypeError, "expected an initialised Conv2d, got Conv1d"),
    (lambda: nn.ConvTranspose2d(3, 4, 1), TypeError, "expected an initialised Conv2d, got ConvTranspose2d"),
    (lambda: nn.LazyConv2d(4, 1), TypeError, "expected an initialised Conv2d, got LazyConv2d"),
    (lambda: nn.Linear(3, 4), TypeError, "expected an initialised Conv2d, got Linear"),
])  # fmt: skip
def test_from_conv2d_errors(make, error, message):
    with pytest.raises(error, match=f"Conv1x1.from_conv2d: conv: {message}"):
        Conv1x1.from_conv2d(make())


def test_from_conv2d_of_an_unknown_activation():
    with pytest.raises(ValueError, match="activation: expected one of"):
        Conv1x1.from_conv2d(nn.Conv2d(3, 4, 1), activation="mish")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_avg_pool_module(activation):
    a, b = twins(Conv1x1AvgPool, nn.Conv2d, 12, 10, activation=activation)
    x = torch.randn(3, 12, 6, 5)
    expected = activate(b(x), activation).mean((2, 3))
    torch.testing.assert_close(a(x), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(a(x[0]), expected[0], atol=1e-5, rtol=1e-5)
    assert isinstance(a, nn.Conv2d) and "Conv1x1AvgPool(12, 10" in repr(a)
    torch.testing.assert_close(Conv1x1AvgPool.from_conv2d(b, activation)(x), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(copy.deepcopy(a)(x), a(x))
    assert Conv1x1AvgPool(3, 4).activation == "relu"


def test_avg_pool_module_refuses_a_stride():
    with pytest.raises(RuntimeError, match=r"stride: expected 1, got \(2, 2\)"):
        Conv1x1AvgPool.from_conv2d(nn.Conv2d(3, 4, 1, stride=2), "relu")(torch.randn(1, 3, 4, 4))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mlpconv_is_conv_and_two_1x1_layers(activation):
    block = MLPConv(3, 16, 5, (24, 20), stride=2, padding=2, activation=activation)
    sizes = [tuple(m.weight.shape) for m in block if isinstance(m, nn.Conv2d)]
    assert sizes == [(24, 3, 5, 5), (20, 24, 1, 1), (16, 20, 1, 1)]
    x = torch.randn(2, 3, 13, 11)
    y = x
    for layer in (m for m in block if isinstance(m, nn.Conv2d)):
        y = activate(torch.conv2d(y, layer.weight, layer.bias, layer.stride, layer.padding), activation)
    torch.testing.assert_close(block(x), y, atol=1e-5, rtol=1e-5)


def test_mlpconv_defaults_and_errors():
    sizes = [tuple(m.weight.shape) for m in MLPConv(3, 8, 3) if isinstance(m, nn.Conv2d)]
    assert sizes == [(8, 3, 3, 3), (8, 8, 1, 1), (8, 8, 1, 1)]
    assert all(m.bias is None for m in MLPConv(3, 8, 3, bias=False) if isinstance(m, nn.Conv2d))
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
                stock[i], stock[i + 1] = Conv1x1.from_conv2d(stock[i], activation), nn.Identity()
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
