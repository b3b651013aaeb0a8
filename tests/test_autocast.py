"""Autocast regions: which tensors are cast, when a cast is shared, and for how long."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from conv1x1_ext import Conv1x1, Conv1x1AvgPool, conv1x1

pytestmark = pytest.mark.cpu_only(reason="the regions are the CPU's")
BF16 = torch.bfloat16


def region(**options):
    return torch.autocast("cpu", BF16, **options)


class Casts:
    """The weights that calls save, as bfloat16."""

    def __init__(self, shape):
        self.shape, self.seen, self.packed = shape, [], 0

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda t: t)
        self.hooks.__enter__()
        return self

    def pack(self, t):
        self.packed += 1
        if t.shape == self.shape and t.dtype == BF16 and all(t.data_ptr() != s.data_ptr() for s in self.seen):
            self.seen.append(t)
        return t

    def __exit__(self, *error):
        self.hooks.__exit__(*error)


def pair():
    ours, stock = Conv1x1(128, 128), nn.Conv2d(128, 128, 1)
    stock.load_state_dict(ours.state_dict())
    return ours, stock, torch.randn(2, 128, 3, 5)


def test_a_weight_is_cast_once_in_a_region():
    ours, stock, x = pair()
    for layer in (ours, stock):
        with region(), Casts(layer.weight.shape) as casts:
            y = sum(layer(x) for _ in range(3))
            with region():
                y = y + layer(x)
        assert len(casts.seen) == 1
        y.float().square().sum().backward()
    torch.testing.assert_close(ours.weight.grad, stock.weight.grad, atol=0.1, rtol=0.05)
    with region(cache_enabled=False), Casts(ours.weight.shape) as casts:
        ours(x), ours(x)
    assert len(casts.seen) == 2


def test_its_first_call_saves_nothing_of_its_own():
    ours, _, x = pair()
    with region(), Casts(ours.weight.shape) as first:
        ours(x)
    with region():
        ours(x)
        with Casts(ours.weight.shape) as second:
            ours(x)
    assert first.packed == second.packed


def test_a_cast_ends_with_its_region():
    ours, _, x = pair()
    with region(), torch.no_grad(), torch.autograd.graph.save_on_cpu():
        before = ours(x)
    with region(), Casts(ours.weight.shape) as casts:
        ours(x)
    kept = weakref.ref(casts.seen.pop())
    gc.collect()
    assert kept() is None
    original = ours.weight.detach().clone()
    ours.weight.data.add_(1)  # torch does not count it
    with region(), torch.no_grad():
        expected = nn.functional.conv2d(x, ours.weight, ours.bias)
        assert not torch.equal(ours(x), before)
        torch.testing.assert_close(ours(x), expected, atol=0.05, rtol=0.02)
        torch.clear_autocast_cache()
        ours.weight.data.copy_(original)
        assert torch.equal(ours(x), before)


def test_a_write_within_the_region_is_seen():
    ours, _, x = pair()
    with region(), torch.no_grad():
        before = ours(x)
        ours.weight.add_(1)
        after = ours(x)
    with region(), torch.no_grad():
        assert torch.equal(ours(x), after) and not torch.equal(before, after)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_call_without_gradients_leaves_those_of_the_next(mode):
    ours, _, x = pair()
    with region():
        with mode():
            ours(x)
        ours(x).float().sum().backward()
    with region(), torch.no_grad():
        pass
    expected = x.to(BF16).float().sum((0, 2, 3)).expand(128, 128).reshape(128, 128, 1, 1)
    torch.testing.assert_close(ours.weight.grad, expected, atol=0.2, rtol=0.02)


def test_checkpoint_in_and_around_a_region():
    ours, stock, x = pair()
    x.requires_grad_()
    for layer in (ours, stock):
        with region():
            y = checkpoint(lambda x, m=layer: m(m(x)), x, use_reentrant=False)
        y.float().square().sum().backward()
    torch.testing.assert_close(ours.weight.grad, stock.weight.grad, atol=0.3, rtol=0.1)


@pytest.mark.parametrize("tensors,autocast", [("meta", "cpu"), ("cpu", "cuda"), ("meta", "cuda")])
def test_regions_of_another_device_change_nothing(tensors, autocast):
    with torch.device(tensors):
        x, stock, ours = torch.randn(2, 4, 5, 5), nn.Conv2d(4, 6, 1), Conv1x1(4, 6)
        heads = [Conv1x1AvgPool(4, 6, activation=a) for a in (None, "relu")]
    torch.set_autocast_enabled(autocast, True)  # torch.autocast asks for a GPU
    try:
        y, z = ours(x), stock(x)
        pooled = [head(x) for head in heads]
    finally:
        torch.set_autocast_enabled(autocast, False)
    assert (y.shape, y.dtype, y.device) == (z.shape, z.dtype, z.device)
    assert all(p.shape == (2, 6) and p.dtype == z.dtype and p.device == z.device for p in pooled)
    assert conv1x1(x, ours.weight).shape == (2, 6, 5, 5)
