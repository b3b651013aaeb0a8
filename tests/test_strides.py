"""The output's strides are nn.Conv2d's in every case, in eager and for fake tensors."""

import itertools
import random

import pytest
import torch
from covering import cover, full
from helpers import DTYPES, FLOATS, FORMATS, HALVES, LAYOUTS, WEIGHT_LAYOUTS, conv, laid_out, weight_of
from torch._subclasses import FakeTensorMode

import conv1x1_ext

SPATIAL = {1: [(7,), (1,)], 2: [(5, 6), (1, 6), (5, 1), (1, 1)], 3: [(2, 3, 4), (1, 3, 1), (1, 1, 1), (2, 1, 1)]}


def grid(dims, batched, dtype, share=1.0):
    """Every memory format of input and weight with every pattern of sizes of one; of other layouts a share."""
    for spatial, n, (c_in, c_out) in itertools.product(
        SPATIAL[dims], (1, 3) if batched else (1,), ((1, 1), (4, 1), (1, 6), (4, 6))
    ):
        for x_layout, w_layout in itertools.product(LAYOUTS, WEIGHT_LAYOUTS):
            if not full() and random.random() >= share and not {x_layout, w_layout} <= set(FORMATS):
                continue
            groups = random.choice([g for g in (1, 2) if c_in % g == 0 and c_out % g == 0])
            stride = random.choice([1, 2, tuple(random.choice([1, 3]) for _ in spatial)])
            x_shape = (*((n,) if batched else ()), c_in, *spatial)
            x = laid_out(x_shape, dtype, x_layout, 1 if batched else 0)
            w = weight_of((c_out, c_in // groups, *[1] * dims), dtype, w_layout)
            yield x, w, stride, groups, (x_layout, w_layout, x_shape, w.shape, x.stride(), w.stride(), stride, groups)


@pytest.fixture(autouse=True)
def seed_python(seed_and_threads):
    random.seed(torch.initial_seed())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_strides_of_stock(dims, batched, dtype):
    for x, w, stride, groups, what in grid(dims, batched, dtype):
        expected = conv(x, w, None, stride, groups)
        ours = conv1x1_ext.conv1x1(x, w, None, stride, groups=groups)
        assert (ours.shape, ours.stride()) == (expected.shape, expected.stride()), what
        w.requires_grad_()
        assert conv1x1_ext.conv1x1(x, w, None, stride, groups=groups).stride() == expected.stride(), what


@cover(dims=(1, 2, 3), batched=(True, False), dtype=DTYPES)
def test_fake_tensors_have_the_real_strides(dims, batched, dtype):
    mode = FakeTensorMode()
    for x, w, stride, groups, what in grid(dims, batched, dtype, 0.15):
        real = conv1x1_ext.conv1x1(x, w, None, stride, groups=groups, activation="relu")
        with mode:
            fake = conv1x1_ext.conv1x1(
                mode.from_tensor(x), mode.from_tensor(w), None, stride, groups=groups, activation="relu"
            )
        assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype), what


@pytest.mark.parametrize("shape", [(2, 3, 0, 4), (2, 3, 4, 0), (3, 0, 6), (0, 3, 4, 6)], ids=str)
def test_fake_tensors_of_nothing_have_the_real_sizes(shape):
    mode, x, w = FakeTensorMode(), torch.randn(shape), torch.randn(6, 3, 1, 1)
    real = conv1x1_ext.conv1x1(x, w, None, (2, 3))
    with mode:
        fake = conv1x1_ext.conv1x1(mode.from_tensor(x), mode.from_tensor(w), None, (2, 3))
    assert fake.shape == real.shape


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_fake_gradients_have_the_real_strides(dims, dtype):
    mode, backward = FakeTensorMode(), torch.ops.conv1x1_ext.conv1x1_backward
    for x, w, stride, groups, what in grid(dims, True, dtype, 0.15):
        y = conv1x1_ext.conv1x1(x, w, None, stride, groups=groups, activation="relu")
        stride = [stride] * dims if isinstance(stride, int) else list(stride)
        rest = (stride, groups, "relu", False, True, True, True, True)
        tensors = (torch.ones_like(y), x, w, y)
        real = backward(*tensors, *rest)
        with mode:
            fake = backward(*map(mode.from_tensor, tensors), *rest)
        assert [t.stride() for t in fake] == [t.stride() for t in real], what


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("layout,weight_layout", list(itertools.product(FORMATS, repeat=2)))
def test_half_types_have_float32s_strides(layout, weight_layout, dtype):
    for dims in (1, 2, 3):
        x = laid_out((2, 3, *[4] * dims), dtype, layout)
        w = weight_of((5, 3, *[1] * dims), dtype, weight_layout)
        assert conv1x1_ext.conv1x1(x, w).stride() == conv(x.float(), w.float()).stride()


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_residual_and_activation_do_not_change_the_strides(layout, activation):
    x, w = laid_out((2, 3, 4, 5), torch.float32, layout), weight_of((6, 3, 1, 1), torch.float32)
    for residual_layout in LAYOUTS:
        r = laid_out((2, 6, 4, 5), torch.float32, residual_layout)
        assert conv1x1_ext.conv1x1(x, w, activation=activation, residual=r).stride() == conv(x, w).stride()


@pytest.mark.parametrize("to", [torch.contiguous_format, torch.channels_last])
def test_memory_format_of_the_module_decides(to):
    ours, stock = conv1x1_ext.Conv1x1(3, 6).to(memory_format=to), torch.nn.Conv2d(3, 6, 1).to(memory_format=to)
    for x in (torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)):
        assert ours(x).stride() == stock(x).stride()


def test_avg_pool_is_contiguous():
    x, w = laid_out((3, 4, 5, 6), torch.float32, "channels_last"), weight_of((7, 4, 1, 1), torch.float32)
    for activation in (None, "relu"):
        assert conv1x1_ext.conv1x1_avg_pool(x, w, activation=activation).stride() == (7, 1)
