"""Low-rank adapters on Conv1x1, as on nn.Conv2d: they find it, build their own from its type, train, merge, unmerge."""

import copy

import pytest
import torch
from torch import nn

from conv1x1_ext import Conv1x1, Conv1x1_1d, Conv1x1_3d, Conv1x1Act

KINDS = [(Conv1x1_1d, nn.Conv1d, 1), (Conv1x1, nn.Conv2d, 2), (Conv1x1_3d, nn.Conv3d, 3)]


class LoRA(nn.Module):
    """What PEFT does: layers of the base's own type and attributes, and a merge into ``weight.data``."""

    def __init__(self, base: nn.Module, rank: int):
        super().__init__()
        self.base = base.requires_grad_(False)
        kind, one = type(base), (1,) * len(base.kernel_size)
        self.a = kind(base.in_channels, rank, base.kernel_size, base.stride, base.padding, bias=False)
        self.b = kind(rank, base.out_channels, one, one, bias=False)

    def forward(self, x):
        return self.base(x) + self.b(self.a(x))

    def delta(self):
        product = self.b.weight.flatten(1) @ self.a.weight.flatten(1)
        return product.reshape(self.base.weight.shape)

    def merge(self, sign=1):
        self.base.weight.data += sign * self.delta()


@pytest.mark.parametrize("kind,stock,dims", KINDS, ids=lambda v: getattr(v, "__name__", str(v)))
@pytest.mark.parametrize("stride,padding", [(1, 0), (2, 0), (1, "same")])
def test_an_adapter_of_the_layers_own_type(kind, stock, dims, stride, padding):
    theirs = LoRA(stock(6, 8, 1, stride, padding), 2)
    ours = LoRA(kind.from_conv2d(copy.deepcopy(theirs.base)), 2)
    ours.load_state_dict(theirs.state_dict())
    assert type(ours.a) is kind and isinstance(ours.base, stock)
    x, gradients = torch.randn(3, 6, *[5] * dims), []
    for adapter in (ours, theirs):
        before = adapter.base.weight.clone()
        optimizer = torch.optim.SGD((*adapter.a.parameters(), *adapter.b.parameters()), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            adapter(x).square().mean().backward()
            optimizer.step()
        gradients.append(adapter.a.weight.grad)
        with torch.no_grad():
            expected = adapter(x)
            adapter.merge()
            torch.testing.assert_close(adapter.base(x), expected, atol=1e-5, rtol=1e-5)
            adapter.merge(-1)
            torch.testing.assert_close(adapter.base.weight, before)
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-4)


METHODS = {
    "LoRA": ("LoraConfig", {"r": 4, "init_lora_weights": False}),
    "DoRA": ("LoraConfig", {"r": 4, "init_lora_weights": False, "use_dora": True}),
    "LoHa": ("LoHaConfig", {"r": 4, "init_weights": False}),
    "LoKr": ("LoKrConfig", {"r": 4, "init_weights": False}),
}


@pytest.mark.parametrize("method", list(METHODS))
def test_peft(method):
    """Against the same adapter on nn.Conv2d: outputs, gradients, merged, unmerged and merged for good."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    name, options = METHODS[method]

    def adapted(kind):
        torch.manual_seed(11)
        convs = [kind(8, 16, 1), kind(16, 12, 1, 2)]
        model = nn.Sequential(convs[0], nn.ReLU(), convs[1]).eval()
        return peft.get_peft_model(model, getattr(peft, name)(target_modules=["0", "2"], **options))

    theirs, ours = adapted(nn.Conv2d), adapted(Conv1x1)
    ours.load_state_dict(theirs.state_dict())
    assert sum(isinstance(m, Conv1x1) for m in ours.modules()) >= 2
    x = torch.randn(2, 8, 6, 5)
    plain = ours.get_base_model()[0].base_layer.weight.clone()
    for model in (ours, theirs):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    with torch.no_grad():
        expected = ours(x)
        torch.testing.assert_close(expected, theirs(x), atol=1e-4, rtol=1e-4)
        ours.merge_adapter()
        assert not torch.equal(ours.get_base_model()[0].base_layer.weight, plain)
        torch.testing.assert_close(ours(x), expected, atol=1e-4, rtol=1e-4)
        ours.unmerge_adapter()
        torch.testing.assert_close(ours.get_base_model()[0].base_layer.weight, plain, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours(x), expected, atol=1e-4, rtol=1e-4)
        merged = ours.merge_and_unload()
        assert type(merged[0]) is Conv1x1
        torch.testing.assert_close(merged(x), expected, atol=1e-4, rtol=1e-4)


def test_peft_refuses_a_layer_with_an_activation():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = nn.Sequential(Conv1x1Act(8, 8, activation="relu"))
    with pytest.raises(ValueError, match="is not supported"):
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"]))
