"""float32 and float16 stay what they are where a kernel multiplies them as sums of bfloat16 (AMX).

Infinities, NaN, zeros and numbers near both ends of the range, in every kernel; and no neighbour changes a bit.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from covering import cover

from conv1x1_ext import Conv1x1, build_info, conv1x1, conv1x1_avg_pool, explain

pytestmark = pytest.mark.cpu_only(reason="the CPU's kernels")
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
PARTED = (torch.float32, torch.float16)
INF, NAN = math.inf, math.nan


@pytest.fixture(params=LAYOUTS.values(), ids=list(LAYOUTS))
def layout(request):
    return request.param


# What make() takes: of a weight that is one tile, activations are read in place.
SIZES = {"tiles of the weight": {}, "one tile": {"c_out": 24, "size": 9}}


@pytest.fixture(params=SIZES.values(), ids=list(SIZES))
def sizes(request):
    return request.param


def make(layout, dtype=torch.float32, n=3, c_in=96, c_out=80, size=7):
    """Images and a weight of one tile or more, none of them whole."""
    x = torch.randn(n, c_in, size, size).to(dtype).to(memory_format=layout)
    return x, (torch.randn(c_out, c_in, 1, 1) / c_in**0.5).to(dtype)


def exact(x, w):
    return F.conv2d(x.double(), w.double())


def check(y, reference, x, w, units=64):
    """What a chain of float32 multiply-adds may be off by; and numbers below 2^-134 may count as zero.

    `units` is in float32's eps of the sum of magnitudes: half its k bounds every chain; of random numbers, no chain
    came to 2.5 in 2 million outputs.
    """
    x, w = (t.abs().nan_to_num(0, 0, 0) for t in (x, w))
    stored = torch.finfo(y.dtype)
    allowed = units * torch.finfo(torch.float32).eps * exact(x, w)
    allowed = allowed + stored.eps * (reference.abs() + stored.smallest_normal)
    allowed = allowed + 2.0**-134 * (1 + exact(x, torch.ones_like(w)) + exact(torch.ones_like(x), w))
    rounded = reference.to(y.dtype)
    assert torch.equal(y.isnan(), rounded.isnan())
    assert torch.equal(y.isinf(), rounded.isinf()) and torch.equal(y[y.isinf()], rounded[y.isinf()])
    finite = y.isfinite()
    assert ((y.double() - reference).abs() <= allowed)[finite].all()


@cover(
    3,
    layout=LAYOUTS,
    sizes=SIZES,
    c_in=(96, 600, 1100),  # 600: several chains; 1100: several pieces of k as well
    where=("x", "w", "both"),
    bad=(NAN, INF, -INF, "largest"),
    dtype=PARTED,
)
def test_special_values_reach_the_outputs_that_read_them_and_no_others(layout, sizes, dtype, bad, where, c_in):
    x, w = make(LAYOUTS[layout], dtype, c_in=c_in, **SIZES[sizes])
    clean = conv1x1(x, w)
    bad = torch.finfo(dtype).max if bad == "largest" else bad
    by_x, by_w = (torch.zeros_like(clean, dtype=torch.bool) for _ in range(2))
    if where in ("x", "both"):
        x[1, 17, 3, 4] = x[2, 95, 6, 6] = bad
        by_x[1, :, 3, 4] = by_x[2, :, 6, 6] = True
    if where in ("w", "both"):
        w[5, 40] = w[-1, 3] = bad
        by_w[:, [5, -1]] = True
    y, reference = conv1x1(x, w), exact(x, w)
    assert torch.equal(y[~(by_x | by_w)], clean[~(by_x | by_w)])
    if bad == torch.finfo(dtype).max:  # one of two such terms may overflow where their exact sum does not
        y = torch.where(by_x & by_w, reference.to(dtype), y)
    check(y, reference, x, w)


# 24 channels out: one tile; 300: several calls of several tiles, and a tail.
@cover(layout=LAYOUTS, c_out=(24, 80, 300), c_in=(96, 600, 1100))
def test_pooled_tiles_are_those_of_the_convolution(layout, c_out, c_in):
    x, w = make(LAYOUTS[layout], c_in=c_in, c_out=c_out, size=13)
    b = torch.randn(c_out)
    x[1, 17, 3, 4], w[5, 40], w[c_out - 3] = INF, NAN, 1e-30
    y = conv1x1(x, w, b, activation="relu").double().mean((2, 3))
    assert y[:, 5].isnan().all() and y[1].isinf().any() and y[0].isfinite().sum() == c_out - 1
    torch.testing.assert_close(conv1x1_avg_pool(x, w, b).double(), y, rtol=2e-7, atol=0, equal_nan=True)


def test_zero_times_infinity_is_nan(layout, sizes):
    x, w = make(layout, **sizes)
    x[0, 3, 0, 0], w[7, 3] = INF, 0
    assert conv1x1(x, w)[0, 7, 0, 0].isnan()


def test_sums_that_overflow_are_infinite(layout, sizes):
    x, w = make(layout, **sizes)
    x[1], w[:] = 1e38, 1
    w[3] = -1
    y = conv1x1(x, w)[1]
    assert (y[3] == -INF).all() and (y[[0, 1, 2, 4, -1]] == INF).all()


@pytest.mark.parametrize(
    "scales", [(-140, 0), (-126, 0), (-100, -20), (-60, -60), (-40, -90), (-90, 25), (90, -60), (100, 20)]
)
def test_numbers_at_the_ends_of_the_range(layout, sizes, scales):
    """Products of parts that are too small for a tile, and operands too large for the first part times the weight."""
    x, w = make(layout, **sizes)
    x, w = x * 2.0 ** scales[0], w * 2.0 ** scales[1]
    check(conv1x1(x, w), exact(x, w), x, w)


def test_small_numbers_beside_ordinary_ones(layout, sizes):
    """A pixel and an output channel whose numbers are small; a small number that alone meets no zero."""
    x, w = make(layout, c_in=1100, **sizes)
    x[0, :, 2, 2] *= 2.0**-110
    w[9] *= 2.0**-90
    x[1, :, 5, 5], w[11, 8] = 0, 1
    x[1, 8, 5, 5] = 2.0**-130
    y = conv1x1(x, w)
    check(y, exact(x, w), x, w)
    assert y[1, 11, 5, 5] == 2.0**-130


def test_zeros_stay_zero(layout, sizes):
    x, w = make(layout, **sizes)
    x[1], w[20] = 0, 0
    y = conv1x1(x, w)
    assert (y[1] == 0).all() and (y[:, 20] == 0).all() and (y[0, :20] != 0).all()


@pytest.mark.parametrize("c_in", [88, 96])  # 88: a tail, which lies beside the next pixel
@pytest.mark.parametrize("dtype", PARTED, ids=str)
def test_a_sample_has_its_bits_whatever_stands_beside_it(layout, sizes, dtype, c_in):
    x, w = make(layout, dtype, n=5, c_in=c_in, **sizes)
    x[2, :, 6, 6] = 0
    x[2, 5, 6, 6] = 2.0**-140
    x[2, :, 5, 5] = 2.0**-48 * (1 - 2.0**-12)  # small, or, once rounded to bfloat16, just not
    w[7] *= 2.0**-20
    alone = conv1x1(x[2:3].clone(memory_format=layout), w)
    for value in (NAN, INF, 0.0, torch.finfo(dtype).smallest_normal, torch.finfo(dtype).max):
        x[[0, 1, 3, 4]] = value
        assert torch.equal(conv1x1(x, w)[2:3], alone), value


@pytest.mark.parametrize("dtype", PARTED, ids=str)
@pytest.mark.parametrize(
    ("c_in", "c_out", "size"),
    [(80, 72, 9), (1100, 72, 7), (1100, 72, 12), (2080, 72, 7), (150, 40, 9), (1100, 24, 9), (70, 17, 12)],
)
def test_bits_do_not_depend_on_the_layout(c_in, c_out, size, dtype):
    x = torch.randn(3, c_in, size, size).to(dtype)
    w = (torch.randn(c_out, c_in, 1, 1) / c_in**0.5).to(dtype)
    assert torch.equal(conv1x1(x, w), conv1x1(x.to(memory_format=torch.channels_last), w))


@pytest.mark.parametrize("dtype", PARTED, ids=str)
@pytest.mark.parametrize(
    ("c_in", "c_out", "size", "parts"),
    [(64, 64, 6, True), (64, 16, 8, True), (64, 32, 8, True), (63, 32, 8, False), (64, 15, 8, False),
     (64, 16, 7, False), (64, 40, 8, False), (128, 40, 8, "float16")],
)  # fmt: skip
def test_which_layers_are_multiplied_in_parts(layout, dtype, c_in, c_out, size, parts):
    if build_info()["isa"] != "avx512_amx":
        pytest.skip("this CPU, or CONV1X1_ISA, has no AMX, which alone multiplies parts")
    parts = parts == "float16" and dtype == torch.float16 if isinstance(parts, str) else parts
    kernel = explain(*make(layout, dtype, c_in=c_in, c_out=c_out, size=size))["kernel"]
    assert kernel.endswith("_32x32_avx512_amx: for " + str(dtype)[6:] + " in avx512_amx") == parts, kernel


@cover(
    3,
    layout=LAYOUTS,
    image=((64, 8, 0), (90, 9, 0), (300, 12, 0), (600, 13, 1), (65, 20, 3)),
    c=(16, 31),
    activation=(None, "relu", "relu6"),
    dtype=PARTED,
)
def test_activations_split_between_products(layout, image, c, activation, dtype):
    """Forward to c channels and dx of c channels: tails of k and of pixels, which span images; a cropped image, whose
    pixels are no one run; a mask; a residual. A sample alone and a batch have the same bits."""
    k, size, cut = image

    def batch(channels):
        return torch.randn(3, channels, size, size + cut).to(dtype).to(memory_format=LAYOUTS[layout])[..., :size]

    x, w, residual = batch(k), (torch.randn(c, k, 1, 1) / k**0.5).to(dtype), batch(c)
    if build_info()["isa"] == "avx512_amx" and not cut:
        assert "split between the products" in " ".join(explain(x, w).values())
    y = conv1x1(x, w, activation=activation, residual=residual)
    assert torch.equal(y[1:2], conv1x1(x[1:2], w, activation=activation, residual=residual[1:2]))
    reference = exact(x, w) + residual.double()
    reference = reference.clamp(0 if activation else -INF, 6 if activation == "relu6" else INF)
    check(y, reference, x, w, units=8)

    x, w, dy = batch(c).requires_grad_(), (torch.randn(k, c, 1, 1) / c**0.5).to(dtype), batch(k)
    y = conv1x1(x, w, activation=activation)
    (dx,) = torch.autograd.grad(y, x, dy)
    dz = dy.double() * ((y > 0) | (activation is None)) * ((y < 6) | (activation != "relu6"))
    check(dx, exact(dz, w.transpose(0, 1)), dz, w.transpose(0, 1), units=8)
    (one,) = torch.autograd.grad(conv1x1(x[1:2], w, activation=activation), x, dy[1:2])
    assert torch.equal(one[1:2], dx[1:2])


@cover(3, channels=((64, 80), (88, 300), (600, 72)), stride=(1, 2), activation=(None, "relu", "relu6"), dtype=PARTED)
def test_rows_packed_between_products(channels, stride, activation, dtype):
    """Forward and dx: tails of rows, of k and of columns, a mask, rows of the image that are left out."""
    c_in, c_out = channels
    x, w = make(torch.channels_last, dtype, n=2, c_in=c_in, c_out=c_out, size=13)
    x, w = (2 * x).requires_grad_(), w.requires_grad_()
    if build_info()["isa"] == "avx512_amx" and c_in < 600:  # whose weight half of a small L2 does not hold
        for direction in ("fprop", "dgrad"):
            plan = explain(x, w, stride=stride, activation=activation, direction=direction)
            assert "a row of tiles between the products of the one before" in plan["A"], plan
    y = conv1x1(x, w, stride=stride, activation=activation)
    dy = torch.randn(y.shape).to(dtype).to(memory_format=torch.channels_last)
    (dx,) = torch.autograd.grad(y, x, dy)
    reference = F.conv2d(x.double(), w.double(), stride=stride)
    dz = dy.double()
    if activation:
        dz = dz * (y > 0) * (y < 6 if activation == "relu6" else 1)
        reference = reference.clamp(0, 6 if activation == "relu6" else math.inf)
    tolerance = {torch.float32: 2e-6, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(y.double(), reference, rtol=tolerance, atol=tolerance)
    expected = torch.zeros_like(x, dtype=torch.float64)
    expected[:, :, ::stride, ::stride] = torch.einsum("nohw,oi->nihw", dz, w.detach()[:, :, 0, 0].double())
    torch.testing.assert_close(dx.double(), expected, rtol=tolerance, atol=2 * tolerance)
    one = conv1x1(x.detach()[:1].clone(memory_format=torch.channels_last), w, stride=stride, activation=activation)
    assert torch.equal(one, y[:1])


def test_gradients_keep_special_values_apart(layout):
    x, w = make(layout, n=4)
    b = torch.randn(80)
    dy = torch.randn(4, 80, 7, 7).to(memory_format=layout)
    clean = [t.clone().requires_grad_() for t in (x, w, b)]
    expected = torch.autograd.grad(conv1x1(*clean), clean, dy)
    dy[1, 6, 0, 0], dy[2, 50, 3, 3], dy[3, 51, 1, 1] = INF, NAN, torch.finfo(torch.float32).max / 16
    leaves = [t.clone().requires_grad_() for t in (x, w, b)]
    dx, dw, db = torch.autograd.grad(conv1x1(*leaves), leaves, dy)
    others = [c for c in range(80) if c not in (6, 50, 51)]
    assert torch.equal(dw[others], expected[1][others]) and torch.equal(db[others], expected[2][others])
    assert db[6] == INF and db[50].isnan()
    assert not dw[6].isfinite().any() and dw[50].isnan().all()
    torch.testing.assert_close(db[51].double(), dy[:, 51].double().sum(), rtol=1e-6, atol=0)
    torch.testing.assert_close(
        dw[51, :, 0, 0].double(), torch.einsum("nhw,nchw->c", dy[:, 51].double(), x.double()), rtol=1e-5, atol=0
    )
    touched = torch.zeros(4, 7, 7, dtype=torch.bool)
    touched[1, 0, 0] = touched[2, 3, 3] = touched[3, 1, 1] = True
    touched = touched[:, None].expand_as(dx)
    assert torch.equal(dx[~touched], expected[0][~touched])
    assert dx[2, :, 3, 3].isnan().all() and not dx[1, :, 0, 0].isfinite().any()


@pytest.mark.parametrize("dtype", PARTED, ids=str)
@pytest.mark.parametrize("activation", ["relu", "relu6"])
def test_a_gradient_passes_where_the_output_is_nan(layout, sizes, activation, dtype):
    """As in torch, whose comparison keeps back what is not above zero and lets what cannot be compared pass."""
    x, w = make(layout, dtype, **sizes)
    x[1, 0, 2, 3] = NAN
    y = conv1x1(x.requires_grad_(), w, activation=activation)
    assert y[1, :, 2, 3].isnan().all()
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    torch.testing.assert_close(dx[1, :, 2, 3], (w[:, :, 0, 0].double().t() @ dy[1, :, 2, 3].double()).to(dtype))


@pytest.mark.parametrize("scale", [2.0**-60, 2.0**-110, 2.0**-140])
def test_small_gradients(layout, scale):
    """As those of a mean over very many elements; dbias as well."""
    x, w = make(layout)
    dy = torch.randn(3, 80, 7, 7).to(memory_format=layout) * scale
    dy[:, 13] = 0
    leaves = [t.clone().requires_grad_() for t in (x, w, torch.zeros(80))]
    dx, dw, db = torch.autograd.grad(conv1x1(*leaves), leaves, dy)
    check(dx, exact(dy, w.transpose(0, 1)), dy, w.transpose(0, 1))
    pixels = dy.transpose(0, 1).reshape(1, 80, -1, 1).transpose(1, 2)  # wgrad as a convolution over the pixels
    channels = x.transpose(0, 1).reshape(96, -1, 1, 1)
    check(dw.reshape(80, 96).t()[None, :, :, None], exact(pixels, channels), pixels, channels)
    assert (dw[13] == 0).all() and db[13] == 0
    torch.testing.assert_close(db.double(), dy.double().sum((0, 2, 3)), rtol=0, atol=1e-5 * scale + 2.0**-126)


def test_float16_products_are_exact(layout):
    """Sums of two products of eleven bits each, whose lowest bits decide the result."""
    x, w = make(layout, torch.float16, c_in=64, c_out=64)
    x[:], w[:] = 0, 0
    a = 1 + 2.0**-10
    x[:, 0], w[:, 0] = a, a  # 1 + 2^-9 + 2^-20
    x[:, 1], w[:, 1] = -1, 1 + 2.0**-9
    assert (conv1x1(x, w) == 2.0**-20).all()


@pytest.mark.parametrize("dtype", PARTED, ids=str)
def test_panels_made_beforehand_keep_special_values(layout, dtype):
    x, w = make(layout, dtype)
    w[3, 8], w[60, 90], w[61] = INF, NAN, w[61] * 2.0**-12
    module = Conv1x1(96, 80, bias=False).to(dtype).to(memory_format=layout).eval()
    with torch.no_grad():
        module.weight.copy_(w)
        expected = module(x)
        module.prepack(x)
        torch.testing.assert_close(module(x), expected, rtol=0, atol=0, equal_nan=True)
        check(expected, exact(x, w), x, w)


@pytest.mark.parametrize("k", [32, 96, 256, 300, 1024, 1100, 2048])
def test_float32_is_no_less_accurate_than_twice_stock(layout, k):
    x, w = make(layout, c_in=k, c_out=64)
    for inputs in (x, x.abs()):
        reference = exact(inputs, w)
        error = [(y.double() - reference).norm() / reference.norm() for y in (conv1x1(inputs, w), F.conv2d(inputs, w))]
        assert error[0] <= 2 * error[1], error
