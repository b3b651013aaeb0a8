"""Arguments of layers and functions: nn.Conv2d's signature and integers, one clear message, edits that count."""

import inspect
import subprocess
import sys

import numpy as np
import pytest
import torch
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
    conv1x1,
    conv1x1_avg_pool,
    explain,
)

LAYERS = [
    (Conv1x1_1d, nn.Conv1d, 1), (Conv1x1, nn.Conv2d, 2), (Conv1x1_3d, nn.Conv3d, 3),
    (Conv1x1Act_1d, nn.Conv1d, 1), (Conv1x1Act, nn.Conv2d, 2), (Conv1x1Act_3d, nn.Conv3d, 3),
]  # fmt: skip
layers = pytest.mark.parametrize("kind,stock,dims", LAYERS, ids=lambda v: getattr(v, "__name__", str(v)))
EXTRA = {
    kind: {} if issubclass(kind, nn.Conv1d | nn.Conv2d | nn.Conv3d) else {"activation": None} for kind, *_ in LAYERS
}
TWO = np.int64(2)
two_ways = pytest.mark.parametrize(
    "two", [TWO, np.uint8(2), torch.tensor(2), np.array(2)], ids=lambda v: type(v).__name__
)


@layers
def test_the_signature_is_the_stock_layers(kind, stock, dims):
    ours, theirs = (list(inspect.signature(c).parameters.values()) for c in (kind, stock))
    assert [p.name for p in ours][: len(theirs)] == [p.name for p in theirs]
    defaults = {p.name: p.default for p in theirs} | {"kernel_size": 1}
    assert all(p.default == defaults[p.name] for p in ours[: len(theirs)])
    assert all(p.kind in (p.KEYWORD_ONLY, p.VAR_KEYWORD) for p in ours[len(theirs) :])


@layers
@pytest.mark.parametrize("kwargs", [
    {"kernel_size": "ones", "stride": "ones", "padding": "zeros"}, {"padding": "same"},
    {"padding": "valid", "stride": 2}, {"dilation": 3}, {"padding_mode": "reflect"},
    {"stride": "twos", "groups": 2, "bias": False}, {"stride": [2]},
], ids=str)  # fmt: skip
def test_what_means_no_padding_is_taken(kind, stock, dims, kwargs):
    words = {"ones": (1,) * dims, "zeros": [0] * dims, "twos": (2,) * dims}
    kwargs = {k: words.get(v, v) if isinstance(v, str) else v for k, v in kwargs.items()}
    ours, theirs = kind(4, 6, **kwargs, **EXTRA[kind]), stock(4, 6, **{"kernel_size": 1, **kwargs})
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 4, *[5] * dims)
    torch.testing.assert_close(ours(x), theirs(x))
    for name in ("kernel_size", "dilation", "padding_mode", "groups", "in_channels", "out_channels"):
        assert getattr(ours, name) == getattr(theirs, name)


WRONG = {
    "kernel 3": ({"kernel_size": 3}, ValueError, "kernel_size: expected 1, got 3"),
    "kernel None": ({"kernel_size": None}, TypeError, "kernel_size: expected an integer or .* got None"),
    "kernel True": ({"kernel_size": True}, TypeError, "kernel_size: expected an integer or .* got True"),
    "kernel of 4 dimensions": (
        {"kernel_size": (1,) * 4},
        ValueError,
        r"kernel_size: expected 1 .*, got \(1, 1, 1, 1\)",
    ),
    "padding 1": ({"padding": 1}, ValueError, "padding: expected 0, 'valid' or 'same', got 1"),
    "padding False": ({"padding": False}, TypeError, "padding: expected an integer or .* got False"),
    "padding full": ({"padding": "full"}, ValueError, "padding: expected 0, 'valid' or 'same', got 'full'"),
    "padding same and a stride": (
        {"padding": "same", "stride": 2},
        ValueError,
        "padding: 'same' is not supported with",
    ),
    "stride 0": ({"stride": 0}, ValueError, "stride: expected positive integers, got 0"),
    "stride 2.0": ({"stride": 2.0}, TypeError, "stride: expected an integer or a sequence of integers, got 2.0"),
    "stride '2'": ({"stride": "2"}, TypeError, "stride: expected an integer or a sequence of integers, got '2'"),
    "stride None": ({"stride": None}, TypeError, "stride: expected an integer or a sequence of integers, got None"),
    "stride with a bool": ({"stride": (True,)}, TypeError, r"stride: expected an integer or .* got \(True,\)"),
    "dilation 0": ({"dilation": 0}, ValueError, "dilation: expected positive integers, got 0"),
    "groups True": ({"groups": True}, TypeError, "groups: expected an integer, got True"),
    "groups 2.0": ({"groups": 2.0}, TypeError, "groups: expected an integer, got 2.0"),
    "groups do not divide": ({"groups": 3}, ValueError, "divisible by groups"),
    "channels 4.0": ({"in_channels": 4.0}, TypeError, "in_channels: expected an integer, got 4.0"),
    "channels None": ({"out_channels": None}, TypeError, "out_channels: expected an integer, got None"),
    "padding mode": ({"padding_mode": "none"}, ValueError, "padding_mode"),
    "unknown": ({"strides": 1}, TypeError, "unexpected"),
}


@layers
def test_constructor_errors(kind, stock, dims):
    for change, error, message in WRONG.values():
        with pytest.raises(error, match=message) as info:
            kind(**{"in_channels": 4, "out_channels": 6, **EXTRA[kind], **change})
        of_torch = message in ("divisible by groups", "padding_mode", "unexpected")
        assert of_torch or str(info.value).startswith(f"{kind.__name__}: "), info.value


def test_the_positions_of_the_first_version_are_not_misread():
    """It had stride, groups, bias where nn.Conv2d has kernel_size, stride, padding."""
    layer = Conv1x1(64, 128, 1, 2)
    assert layer.stride == (2, 2) and layer.groups == 1
    for args, error in (((64, 128, 2), ValueError), ((64, 128, 1, 1, False), TypeError)):
        with pytest.raises(error):
            Conv1x1(*args)


@pytest.mark.parametrize(
    "kind,named", [(Conv1x1_1d, "Conv1x1Act_1d"), (Conv1x1, "Conv1x1Act"), (Conv1x1_3d, "Conv1x1Act_3d")]
)
def test_a_linear_layer_has_no_activation(kind, named):
    layer, edited = kind(3, 4), kind(3, 4)
    assert layer.activation is None
    edited.activation = "relu"
    for wrong in (
        lambda: kind(3, 4, activation="relu"),
        lambda: kind.from_conv2d(layer, "relu"),
        lambda: edited(torch.randn(1, 3, *[2] * layer.weight[0, 0].dim())),
        edited.to_conv2d,
    ):
        with pytest.raises(TypeError, match=rf"^{kind.__name__}.* it has no activation.*: use {named}\b"):
            wrong()
    with pytest.raises(TypeError, match="activation"):
        Conv1x1Act(3, 4)


@pytest.mark.parametrize("make", [
    lambda f: Conv1x1Act(3, 4, activation=f), lambda f: Conv1x1AvgPool(3, 4, activation=f),
    lambda f: MLPConv(3, 4, 3, activation=f), lambda f: Conv1x1Act.from_conv2d(nn.Conv2d(3, 4, 1), f),
    lambda f: Conv1x1AvgPool.from_conv2d(nn.Conv2d(3, 4, 1), f),
])  # fmt: skip
@pytest.mark.parametrize("activation", ["tanh", 1, True], ids=str)
def test_unknown_activations(make, activation):
    with pytest.raises(ValueError, match="activation: expected one of"):
        make(activation)


@two_ways
def test_integers_of_other_libraries(two):
    x, w = torch.randn(2, 4, 5, 5), torch.randn(6, 2, 1, 1)
    expected = conv1x1(x, w, stride=2, groups=2)
    assert torch.equal(conv1x1(x, w, stride=two, groups=two), expected)
    assert torch.equal(conv1x1(x, w, stride=(two, two), groups=two), expected)
    assert torch.equal(conv1x1_avg_pool(x, w, groups=two), conv1x1_avg_pool(x, w, groups=2))
    assert str(explain(x, w, stride=two, groups=two)) == str(explain(x, w, stride=2, groups=2))
    for layer in (
        Conv1x1(two * 2, 6, 1, two, groups=two),
        Conv1x1Act(4, two * 3, 1, (two, two), 0, 1, two, activation=None),
    ):
        assert repr(layer).split("(", 1)[1].startswith("4, 6, kernel_size=(1, 1), stride=(2, 2), groups=2")
        assert torch.equal(layer(x), conv1x1(x, layer.weight, layer.bias, 2, groups=2))
    head = Conv1x1AvgPool(two, two, two)
    assert head(x[:, :2]).shape == (2, 2)


@pytest.mark.parametrize(
    "value", [True, 2.0, None, "2", np.float64(2), np.bool_(True), torch.tensor(2.0), torch.tensor(True)], ids=repr
)
def test_what_is_no_integer(value):
    x, w = torch.randn(2, 4, 5, 5), torch.randn(6, 2, 1, 1)
    for call in (
        lambda: conv1x1(x, w, groups=value),
        lambda: conv1x1_avg_pool(x, w, groups=value),
        lambda: conv1x1_avg_pool(x, w, groups=value, activation=None),
        lambda: explain(x, w, groups=value),
        lambda: conv1x1(x, w, groups=2, stride=value),
        lambda: conv1x1(x, w, groups=2, stride=[1, value]),
        lambda: explain(x, w, groups=2, stride=value),
    ):
        with pytest.raises(TypeError, match=r"^conv1x1: (groups|stride): expected an integer"):
            call()


POISON = """
import numpy as np, torch, conv1x1_ext
from conv1x1_ext import Conv1x1, Conv1x1Act, _eager, conv1x1
x, w = torch.randn(1, 8, 7, 7), torch.randn(8, 8, 1, 1)
for one in (np.int64(1), torch.tensor(1)):
    conv1x1(x, w, stride=one, groups=one)
    Conv1x1(8, 8, groups=one, stride=one)(x)
for wrong in (True, 1.0):
    for arguments in ({"groups": wrong}, {"stride": wrong}, {"stride": (wrong, wrong)}):
        try:
            conv1x1(x, w, **arguments)
        except TypeError:
            continue
        raise SystemExit(arguments)
calls, fprop = [], _eager._fprop
_eager._fprop = lambda *args: calls.append(args) or fprop(*args)
conv1x1(x, w), Conv1x1(8, 8)(x), Conv1x1Act(8, 8, activation="relu")(x)
x = torch.randn(4, 256, 14, 14).to(memory_format=torch.channels_last)
print(len(calls), Conv1x1(256, 256).eval().prepack(x).frozen)
"""


def test_no_call_depends_on_the_arguments_of_others():
    """In a process of its own, where these calls come first: one key of a cache may be 1, True and np.int64(1)."""
    result = subprocess.run([sys.executable, "-c", POISON], capture_output=True, text=True)
    assert result.stdout.strip() == "3 True", (result.stdout, result.stderr)


@pytest.mark.parametrize("kind", [Conv1x1, Conv1x1Act, Conv1x1AvgPool])
@pytest.mark.parametrize("name,value,error", [
    ("padding", (1, 1), "padding: expected 0"), ("padding", "full", "padding: expected 0"),
    ("padding", [0, 1], "padding"),
    ("stride", 0, "stride: expected positive"), ("stride", 2.0, "stride: expected an integer"),
    ("stride", True, "stride: expected an integer"), ("dilation", 0, "dilation: expected positive"),
    ("groups", 2.0, "groups: expected an integer"), ("groups", True, "groups: expected an integer"),
], ids=str)  # fmt: skip
def test_edited_attributes_are_heeded(kind, name, value, error):
    layer = kind(4, 6) if kind is Conv1x1 else kind(4, 6, activation="relu")
    x = torch.randn(2, 4, 5, 5)
    layer(x)
    torch._dynamo.reset()
    setattr(layer, name, value)
    for call in (layer, layer, torch.compile(layer, backend="eager")):
        with pytest.raises((TypeError, ValueError), match=error):
            call(x)


@pytest.mark.parametrize(
    "name,value",
    [("activation", "gelu"), ("activation", None), ("stride", (2, 1)), ("stride", TWO), ("groups", 2)],
    ids=str,
)
def test_attributes_may_change_between_calls(name, value):
    layer, x = Conv1x1Act(4, 6, activation="relu"), torch.randn(2, 4, 5, 5)
    layer(x)
    setattr(layer, name, value)
    if name == "groups":
        layer.weight = nn.Parameter(torch.randn(6, 2, 1, 1))
    plain = {"groups": layer.groups, "activation": layer.activation}
    expected = conv1x1(x, layer.weight, layer.bias, layer.stride, **plain)
    assert torch.equal(layer(x), expected)


def test_lists_changed_in_place():
    layer, x = Conv1x1(4, 6), torch.randn(2, 4, 5, 5)
    layer.stride, layer.padding = [1, 1], [0, 0]
    assert layer(x).shape == (2, 6, 5, 5)
    layer.stride[0] = 2
    assert layer(x).shape == (2, 6, 3, 5)
    layer.padding[1] = 1
    with pytest.raises(ValueError, match=r"padding: expected 0, 'valid' or 'same', got \[0, 1\]"):
        layer(x)


def test_the_head_refuses_a_stride():
    head = Conv1x1AvgPool(4, 6)
    head.stride = (2, 2)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"Conv1x1AvgPool: stride: expected 1, got \(2, 2\)"):
            head(torch.randn(2, 4, 5, 5))


@pytest.mark.parametrize("kind", [Conv1x1, Conv1x1Act, Conv1x1AvgPool])
def test_torch_jit_script_says_what_to_use(kind):
    layer = kind(4, 6) if kind is Conv1x1 else kind(4, 6, activation="relu")
    with pytest.raises(RuntimeError, match=rf"{kind.__name__}: torch.jit.script cannot compile this layer: use"):
        torch.jit.script(nn.Sequential(layer))
