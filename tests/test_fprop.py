"""The forward is F.conv{1,2,3}d + residual + activation, for every dtype, layout and size of every tail."""

import pytest
import torch
from covering import cover
from helpers import (
    ACTIVATIONS,
    CASES,
    DEVICE,
    DTYPES,
    FLOATS,
    FORMATS,
    LAYOUTS,
    WEIGHT_LAYOUTS,
    Case,
    check_forward,
    laid_out,
    randn,
    same_bits,
    stock_forward,
    weight_of,
)

import conv1x1_ext


def make(case, dtype, layout="contiguous", weight_layout="contiguous"):
    return laid_out(case.x_shape, dtype, layout, case.channel), weight_of(case.w_shape, dtype, weight_layout)


@cover(case=CASES, layout=FORMATS, dtype=DTYPES)
def test_shapes(case, layout, dtype):
    x, w = make(case, dtype, layout, layout)
    b, r = randn((case.c_out,), dtype), laid_out(case.y_shape, dtype, layout, case.channel)
    assert check_forward(x, w, b, case.stride, groups=case.groups, activation="relu", residual=r).shape == case.y_shape
    check_forward(x, w, None, case.stride, groups=case.groups)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_more_runs_than_are_packed_at_a_time(dtype):
    """Images of four pixels: a block of B is a hundred runs of them, and more."""
    check_forward(laid_out((240, 4, 2, 2), dtype, "contiguous"), weight_of((72, 4, 1, 1), dtype))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("c_in", [1, 2, 3, 5, 8, 17, 127, 128, 129, 255, 256, 257])
def test_channel_tails(c_in, layout, dtype):
    for c_out in (1, 2, 3, 4, 6, 7, 8, 9, 15, 16, 17, 24, 25, 47, 48, 49, 63, 64, 65):
        x, w = make(Case(2, c_in, c_out, (3, 5)), dtype, layout)
        check_forward(x, w, randn((c_out,), dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", FORMATS)
def test_pixel_tails(layout, dtype):
    for pixels in range(1, 67):
        x, w = make(Case(1, 6, 9, (1, pixels)), dtype, layout)
        check_forward(x, w, randn((9,), dtype), activation="relu6")


@cover(weight_layout=WEIGHT_LAYOUTS, layout=LAYOUTS, dtype=DTYPES, threads=(1, 3))
def test_layouts(weight_layout, layout, dtype, threads):
    torch.set_num_threads(threads)
    for case in (Case(3, 20, 12, (6, 9), 1, 2), Case(2, 70, 66, (8, 8), 2), Case(4, 65, 64, (4, 4))):
        x, w = make(case, dtype, layout, weight_layout)
        check_forward(x, w, None, case.stride, groups=case.groups)


@cover(shape=(((9,), True), ((9,), False), ((5, 6), False), ((3, 4, 5), True)), layout=LAYOUTS, dtype=FLOATS)
def test_layouts_in_other_dimensions(shape, layout, dtype):
    spatial, batched = shape
    case = Case(3, 10, 14, spatial, 2, 2, batched)
    x, w = make(case, dtype, layout)
    check_forward(x, w, randn((14,), dtype), 2, groups=2)


@cover(activation=ACTIVATIONS, residual_layout=(None, *LAYOUTS), dtype=DTYPES)
def test_epilogue(activation, residual_layout, dtype):
    for case in (Case(2, 24, 18, (7, 9)), Case(2, 18, 24, (6, 6), 2, 2)):
        for layout in FORMATS:
            x, w = make(case, dtype, layout)
            r = None if residual_layout is None else laid_out(case.y_shape, dtype, residual_layout, case.channel)
            check_forward(x, w, randn((case.c_out,), dtype), case.stride, groups=case.groups, activation=activation,
                          residual=r)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", FORMATS)
def test_bias_of_any_stride(layout, dtype):
    x, w = make(Case(2, 20, 30, (5, 5), 1, 2), dtype, layout)
    for b in (randn((30,), dtype), randn((61,), dtype)[1::2], randn((1,), dtype).expand(30), randn((31,), dtype)[1:]):
        check_forward(x, w, b, groups=2)


def test_activations_reach_both_ends():
    """Large pre-activations: ReLU6 and hardswish saturate, the smooth ones meet their tails."""
    for activation in ACTIVATIONS:
        x, w = 20 * randn((1, 8, 9, 9), torch.float32), randn((8, 8, 1, 1), torch.float32)
        check_forward(x, w, None, activation=activation)


def test_residual_is_not_changed_and_no_output_aliases_an_input():
    x, w, r = randn((2, 4, 5, 5), torch.float32), randn((4, 4, 1, 1), torch.float32), randn((2, 4, 5, 5), torch.float32)
    copies = [t.clone() for t in (x, w, r)]
    y = conv1x1_ext.conv1x1(x, w, activation="relu", residual=r)
    assert all(torch.equal(a, b) for a, b in zip(copies, (x, w, r), strict=True))
    assert y.data_ptr() not in {t.data_ptr() for t in (x, w, r)}


@pytest.mark.parametrize("layout", FORMATS)
def test_k_of_several_blocks(layout):
    for c_in in (1024, 2049, 5000):
        x, w = make(Case(1, c_in, 40, (7, 7)), torch.float32, layout)
        check_forward(x, w)


@pytest.mark.cpu_only(reason="chains of the CPU's kernels")
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("c_in,c_out,chain", [(2048, 8, 32), (256, 40, 64), (2048, 40, 128)])
def test_a_large_term_hides_no_more_small_ones_than_a_chain_has(c_in, c_out, chain, layout):
    """1 + 2^-25 is 1 in float32, but many of 2^-25 in a chain of their own are not lost."""
    small = 2.0**-25
    x, w = make(Case(1, c_in, c_out, (3, 5)), torch.float32, layout)
    x[:], w[:] = small, 1
    x[:, 0] = 1
    lost = 1 + (c_in - 1) * small - conv1x1_ext.conv1x1(x, w).double()
    assert (lost <= chain * small).all(), (lost.max() / small).item()


def check_batch(x, w, b, groups=1, residual=None):
    """Of results so large that the whole reference takes seconds: on the CPU one sample by it; of others the bits that
    they have alone, which is promised there; all of them roughly."""
    y = conv1x1_ext.conv1x1(x, w, b, groups=groups, activation="relu", residual=residual)
    if DEVICE.type != "cpu":
        check_forward(x, w, b, groups=groups, activation="relu", residual=residual, ours=y)
        return
    floats = [None if t is None else t.float() for t in (x, w, b, residual)]
    stock = stock_forward(*floats[:3], groups=groups, activation="relu", residual=floats[3])
    eps = torch.finfo(y.dtype).eps
    torch.testing.assert_close(y.float(), stock, rtol=2 * eps, atol=1e-3)
    for i in {0, len(x) // 2, len(x) - 1}:
        r = None if residual is None else residual[i : i + 1]
        alone = conv1x1_ext.conv1x1(x[i : i + 1], w, b, groups=groups, activation="relu", residual=r)
        assert same_bits(y[i : i + 1], alone), i
    last = slice(len(x) - 1, None)
    r = None if residual is None else residual[last]
    check_forward(x[last], w, b, groups=groups, activation="relu", residual=r, ours=y[last])


@cover(c_out=(128, 131), layout=FORMATS, dtype=(torch.float32, torch.bfloat16, torch.float16))
def test_results_stored_past_the_caches(c_out, layout, dtype):
    """Over 32 MiB; 131 channels last are not whole lines."""
    case = Case(16 // dtype.itemsize, 3, c_out, (8, 2177))
    x, w = make(case, dtype, layout)
    if DEVICE.type == "cpu":
        stores = [conv1x1_ext.explain(t, w)["stores"].split()[0] for t in (x, x[:1])]
        assert stores == ["past", "through"]
    b, r = randn((c_out,), dtype), laid_out(case.y_shape, dtype, layout)
    check_batch(x, w, b, residual=r)
    check_batch(x, w, b)


@cover(
    3,
    case=(
        Case(1, 64, 56, (6, 8)),
        Case(2, 96, 120, (28, 28)),
        Case(2, 64, 88, (55, 55)),
        Case(3, 128, 184, (9, 11)),
        Case(2, 320, 65, (28, 28)),
        Case(25, 64, 96, (84, 84), 1, 2),
    ),
    bias=(False, True),
    layout=FORMATS,
    dtype=(torch.bfloat16, torch.float32),
)
def test_whole_tiles_beside_partial_ones(case, bias, layout, dtype):
    """Without a residual AMX's whole tiles have a loop of their own, whose first tile finishes one of another kind."""
    x, w = make(case, dtype, layout)
    check_batch(x, w, randn((case.c_out,), dtype) if bias else None, groups=case.groups)


def test_strides_beyond_the_compact_encoding():
    x, w = randn((1, 3, 2100), torch.float32), randn((4, 3, 1), torch.float32)
    for stride in (1023, 1024, 2000, 5000):
        assert check_forward(x, w, None, stride).shape == (1, 4, (2100 - 1) // stride + 1)


def test_article_by_hand():
    """One channel weighted by 4, and a hand-computed mixture of two channels."""
    x = torch.arange(6.0).reshape(1, 1, 2, 3)
    assert torch.equal(conv1x1_ext.conv1x1(x, torch.full((1, 1, 1, 1), 4.0)), 4 * x)
    x = torch.tensor([[[[1.0, 2.0]], [[10.0, -20.0]]]])
    w = torch.tensor([[1.0, 1.0], [2.0, -1.0]]).reshape(2, 2, 1, 1)
    y = conv1x1_ext.conv1x1(x, w, torch.tensor([0.5, 1.0]), activation="relu")
    assert torch.equal(y, torch.tensor([[[[11.5, 0.0]], [[0.0, 25.0]]]]))
