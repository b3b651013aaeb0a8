"""from_conv2d and to_conv2d keep everything that a layer holds, or refuse and say what would be lost."""

import copy

import pytest
import torch
import torch.ao.nn.qat as qat
import torch.ao.quantization as quantization
from helpers import ACTIVATIONS, activate
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import fuse_conv_bn_eval, parametrizations, prune
from torch.utils.mkldnn import to_mkldnn

from conv1x1_ext import (
    Conv1x1,
    Conv1x1_1d,
    Conv1x1_3d,
    Conv1x1Act,
    Conv1x1Act_1d,
    Conv1x1Act_3d,
    Conv1x1AvgPool,
)

KINDS = [
    (Conv1x1_1d, Conv1x1Act_1d, nn.Conv1d, 1),
    (Conv1x1, Conv1x1Act, nn.Conv2d, 2),
    (Conv1x1_3d, Conv1x1Act_3d, nn.Conv3d, 3),
]
kinds = pytest.mark.parametrize("linear,act,stock,dims", KINDS, ids=lambda v: getattr(v, "__name__", str(v)))


@kinds
@pytest.mark.parametrize("activation", [None, "relu"])
def test_there_and_back_with_the_same_parameters(linear, act, stock, dims, activation):
    conv = stock(6, 8, 1, stride=2, groups=2).eval()
    conv.weight.requires_grad_(False)
    conv.note = "kept"
    module = linear.from_conv2d(conv) if activation is None else act.from_conv2d(conv, activation)
    assert module.weight is conv.weight and module.bias is conv.bias and not module.training
    assert (module.stride, module.groups, module.padding, module.note) == ((2,) * dims, 2, (0,) * dims, "kept")
    assert module.activation == activation and list(module.state_dict()) == ["weight", "bias"]
    x = torch.randn(2, 6, *[5] * dims)
    torch.testing.assert_close(module(x), activate(conv(x), activation))
    with torch.no_grad():
        conv.weight.mul_(2)
    torch.testing.assert_close(module(x), activate(conv(x), activation))
    back = module.to_conv2d()
    assert torch.equal(back(x), activate(conv(x), activation)) and not back.training
    if activation is not None:
        assert type(back) is nn.Sequential and type(back[1]) is nn.ReLU
        back = back[0]
    assert type(back) is stock and repr(back) == repr(conv)
    assert vars(back).keys() == vars(conv).keys() and back.weight is conv.weight and back.note == "kept"


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_back_to_stock_layers_of_the_same_function(activation):
    x = torch.randn(3, 6, 5, 4)
    for layer in (Conv1x1Act(6, 8, activation=activation), Conv1x1AvgPool(6, 8, activation=activation)):
        stock = layer.to_conv2d()
        assert not any(type(m).__module__.startswith("conv1x1_ext") for m in stock.modules())
        for input in (x, x[0]):
            torch.testing.assert_close(stock(input), layer(input))


def test_what_a_1x1_kernel_makes_harmless_is_kept():
    for kwargs in ({"dilation": 3}, {"padding": "same"}, {"padding": "valid"}, {"padding_mode": "circular"}):
        conv, x = nn.Conv2d(3, 4, 1, **kwargs), torch.randn(1, 3, 5, 5)
        ours = Conv1x1.from_conv2d(conv)
        torch.testing.assert_close(ours(x), conv(x))
        assert repr(ours.to_conv2d()) == repr(conv)
    assert Conv1x1.from_conv2d(nn.Conv2d(3, 4, 1, bias=False)).bias is None
    assert Conv1x1Act.from_conv2d(Conv1x1(3, 4), "relu").activation == "relu"


def test_a_subclass_that_only_builds_otherwise_is_taken():
    class Pointwise(nn.Conv2d):
        """Sets arguments and draws its own weights."""

        def __init__(self, channels: int):
            super().__init__(channels, channels, 1, bias=False)

        def reset_parameters(self):
            nn.init.ones_(self.weight)

    conv, x = Pointwise(3), torch.randn(1, 3, 2, 2)
    torch.testing.assert_close(Conv1x1.from_conv2d(conv)(x), conv(x))


def test_the_head_has_relu_unless_told_otherwise():
    conv, x = nn.Conv2d(4, 5, 1), torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(Conv1x1AvgPool.from_conv2d(conv)(x), conv(x).relu().mean((2, 3)))
    torch.testing.assert_close(Conv1x1AvgPool.from_conv2d(conv, None)(x), conv(x).mean((2, 3)))
    with pytest.raises(ValueError, match=r"stride: expected 1, got \(2, 2\)"):
        Conv1x1AvgPool.from_conv2d(nn.Conv2d(4, 5, 1, stride=2))


def another_weight(size):
    conv = nn.Conv2d(3, 4, 1)
    conv.weight = nn.Parameter(torch.randn(size))
    return conv


@pytest.mark.parametrize("make,error,message", [
    (lambda: nn.Conv2d(3, 4, 3), ValueError, r"expected kernel_size 1, got \(3, 3\)"),
    (lambda: another_weight((4, 3, 3, 3)), ValueError, r"expected kernel_size 1, .* a weight of shape \[4, 3, 3, 3\]"),
    (lambda: nn.Conv2d(3, 4, 1, padding=1), ValueError, r"expected padding 0, got \(1, 1\)"),
    (lambda: nn.Conv2d(3, 4, 1, padding=(0, 2)), ValueError, r"expected padding 0, got \(0, 2\)"),
    (lambda: nn.Conv1d(3, 4, 1), TypeError, "expected an initialised Conv2d, got Conv1d"),
    (lambda: nn.ConvTranspose2d(3, 4, 1), TypeError, "expected an initialised Conv2d, got ConvTranspose2d"),
    (lambda: nn.LazyConv2d(4, 1), TypeError, "expected an initialised Conv2d, got LazyConv2d"),
    (lambda: nn.Linear(3, 4), TypeError, "expected an initialised Conv2d, got Linear"),
    (lambda: Conv1x1Act(3, 4, activation="relu"), TypeError, ".* got Conv1x1Act, whose activation cannot be kept"),
    (lambda: Conv1x1AvgPool(3, 4), TypeError, ".* got Conv1x1AvgPool, whose activation cannot be kept"),
])  # fmt: skip
@pytest.mark.parametrize("convert", [Conv1x1.from_conv2d, lambda c: Conv1x1Act.from_conv2d(c, "relu")])
def test_other_layers_are_refused(make, error, message, convert):
    with pytest.raises(error, match=rf"Conv1x1(Act)?\.from_conv2d: conv: {message}"):
        convert(make())


class Standardised(nn.Conv2d):
    """Weight standardisation, as in BiT."""

    def forward(self, x):
        return F.conv2d(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


class Padded(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(F.pad(input, (1, 1)), weight, bias)


def with_forward_of_its_own(conv):
    conv.forward = lambda x: x


def with_hook(conv):
    conv.register_forward_hook(lambda *args: None)


def with_buffer(conv):
    conv.register_buffer("scale", torch.ones(1))


def with_module(conv):
    conv.norm = nn.BatchNorm2d(3)


LOSSES = {
    "forward hooks": with_hook,
    "forward pre hooks": lambda conv: conv.register_forward_pre_hook(lambda *args: None),
    "backward hooks": lambda conv: conv.register_full_backward_hook(lambda *args: None),
    "state dict hooks": lambda conv: conv.register_state_dict_post_hook(lambda *args: None),
    "load state dict post hooks": lambda conv: conv.register_load_state_dict_post_hook(lambda *args: None),
    "the parametrization of weight": parametrizations.weight_norm,
    "parameters bias, weight_orig in place of weight": lambda conv: prune.identity(conv, "weight"),
    "the buffers scale": with_buffer,
    "the modules norm inside it": with_module,
    "forward, set on the layer itself": with_forward_of_its_own,
    "_compiled_call_impl, set on the layer itself": lambda conv: conv.compile(backend="eager"),
}


@pytest.mark.parametrize("message", list(LOSSES))
def test_what_a_layer_would_lose_is_named(message):
    for make, convert in (
        (lambda: nn.Conv2d(3, 3, 1), Conv1x1.from_conv2d),
        (lambda: nn.Conv2d(3, 3, 1), Conv1x1AvgPool.from_conv2d),
        (lambda: Conv1x1(3, 3), lambda conv: Conv1x1Act.from_conv2d(conv, "relu")),
        (lambda: Conv1x1(3, 3), lambda layer: layer.to_conv2d()),
        (lambda: Conv1x1Act(3, 3, activation="relu"), lambda layer: layer.to_conv2d()),
    ):
        conv = make()
        LOSSES[message](conv)
        with pytest.raises(ValueError, match=f"cannot keep .*{message}"):
            convert(conv)


@pytest.mark.parametrize("make,message", [
    (lambda: Standardised(3, 3, 1), r"forward of .*\.Standardised"),
    (lambda: Padded(3, 3, 1), r"_conv_forward of .*\.Padded"),
    (lambda: qat.Conv2d(3, 3, 1, qconfig=quantization.default_qat_qconfig), "forward, .*weight_fake_quant"),
    (lambda: Conv1x1(40, 70).eval().prepack(torch.randn(1, 40, 3, 3)), r"its prepacked weight \(call unpack\(\)"),
])  # fmt: skip
def test_layers_of_another_function_are_refused(make, message):
    for convert in (Conv1x1.from_conv2d, Conv1x1AvgPool.from_conv2d):
        with pytest.raises(ValueError, match=f"from_conv2d: conv: cannot keep .*{message}"):
            convert(make())


@pytest.mark.cpu_only(reason="MKLDNN tensors are the CPU's")
def test_tools_that_go_by_isinstance_keep_the_values():
    """to_mkldnn and the folding of BatchNorm take a Conv1x1 for what it is, and pass a Conv1x1Act by."""
    linear, act = Conv1x1(8, 8).eval(), Conv1x1Act(8, 8, activation="relu").eval()
    x, bn = torch.randn(2, 8, 5, 5), nn.BatchNorm2d(8).eval()
    bn.running_mean.normal_()
    with torch.no_grad():
        converted = to_mkldnn(nn.Sequential(copy.deepcopy(linear)))
        torch.testing.assert_close(converted(x.to_mkldnn()).to_dense(), linear(x), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(fuse_conv_bn_eval(linear, bn)(x), bn(linear(x)))
        kept = to_mkldnn(nn.Sequential(copy.deepcopy(act)))
        assert type(kept[0]) is Conv1x1Act and torch.equal(kept(x), act(x))
