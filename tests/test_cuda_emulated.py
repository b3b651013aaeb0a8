"""The CUDA kernels, run on the CPU from their own sources, against float64; no GPU is needed.

This proves indices, masks, fragments, barriers and the arithmetic of the plans. It does not prove that nvcc compiles
the sources, nor anything about speed or about how the hardware sums in mma.
"""

import itertools
import os
import subprocess
import sys

import pytest
import torch
from covering import cover
from cuda_on_cpu import build
from cuda_on_cpu.cases import (
    BACKWARD_LAYOUTS,
    CASES,
    LARGE_TILES,
    LAYOUTS,
    LONG,
    MODES,
    SAMPLE,
    SMALL_GPU,
    TF32,
    TILED,
    avg_pool,
    avg_pool_backward,
    avg_pool_backward_in_pieces,
    backward,
    dtype_of,
    fprop,
    gradients,
    masked_copy,
    pool_gradients,
)
from cuda_on_cpu.harness import A10, A100, GPUS, H100, SANITIZED, T4, Emulator, Gpu, intact, placed, randn_in
from helpers import (
    ACTIVATIONS,
    HALVES,
    ROOT,
    Case,
    conv,
    same_bits,
    stock_forward,
)  # fmt: skip


def laid_out_in(t, layout):
    return t.contiguous(memory_format=getattr(torch, f"{layout}_format" if layout == "contiguous" else layout))


MMA_MODES = (TF32, torch.float16, torch.bfloat16)
IN_PIECES = Gpu(80, 108, 163 << 10, pooled_piece=1)  # an image at a time, or a quarter of them
MMA_TILES = ("128x128", "128x64", "64x128", "64x64")  # heuristics.h's, in its order


@pytest.fixture(scope="session")
def emulator():
    return Emulator()


# --- every direction: also run under the sanitizers ---------------------------------------------------------------


@cover(case=SAMPLE, layouts=LAYOUTS[:5], mode=MODES)
def test_sample(emulator, case, layouts, mode):
    fprop(emulator, case, mode, layouts, residual=True)
    backward(emulator, "dgrad", case, mode, layouts)
    backward(emulator, "wgrad", case, mode, layouts)
    if case.stride == 1:
        avg_pool(emulator, case, mode, layouts[0], "relu")
        avg_pool_backward(emulator, case, dtype_of(mode), layouts[0], "silu")
        avg_pool_backward(emulator, case, dtype_of(mode), layouts[0], "silu", gpu=IN_PIECES)
        masked_copy(emulator, case, dtype_of(mode), layouts, "relu")


@pytest.mark.skipif(SANITIZED, reason="this is the run under the sanitizers")
def test_sample_under_address_and_undefined_behaviour_sanitizers():
    path = build.build_kernels(sanitize=True)
    # -s: pytest would keep the sanitizer's report from a process that it ends.
    command = [sys.executable, "-m", "pytest", "-x", "-s", "-p", "no:xdist", "-p", "no:cacheprovider"]
    command.append(f"{__file__}::test_sample")
    environment = {**os.environ, **build.sanitizer_environment(), "CONV1X1_EMULATE_SANITIZED": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, f"{path}\n{result.stdout[-2000:]}\n{result.stderr[:6000]}"


# --- fprop ----------------------------------------------------------------------------------------------------------


@cover(case=CASES, layouts=LAYOUTS, mode=MODES)
def test_fprop(emulator, case, layouts, mode):
    fprop(emulator, case, mode, layouts)


@cover(activation=ACTIVATIONS, layouts=LAYOUTS[:2], mode=MODES)
def test_epilogue(emulator, activation, layouts, mode):
    case = Case(2, 40, 72, (7, 9))
    fprop(emulator, case, mode, layouts, activation, bias=True, residual=True)
    fprop(emulator, case, mode, layouts, activation, bias=False, residual=True)
    fprop(emulator, case, mode, layouts, activation, bias=False, residual=False)


# 3-wise: an address is aligned by size and offset together, for elements of each size.
@cover(3, offset=(0, 1, 2, 4), size=(40, 36, 34, 33), layouts=LAYOUTS[:2], mode=MODES)
def test_alignment_tiers(emulator, offset, size, layouts, mode):
    case = Case(2, size, size, (1, size))
    fprop(emulator, case, mode, layouts, residual=True, offset=offset)


# The saved output's address and strides count as the gradient's do.
@cover(direction=("dgrad", "wgrad", "masked_copy"), mask_offset=(0, 1, 2, 4), layouts=LAYOUTS[:2], mode=MODES)
def test_alignment_of_the_mask(emulator, direction, mask_offset, layouts, mode):
    case = Case(2, 40, 40, (5, 8))
    if direction == "masked_copy":
        masked_copy(emulator, case, dtype_of(mode), layouts, "relu", mask_offset)
    else:
        backward(emulator, direction, case, mode, layouts, mask_offset=mask_offset)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_nan_and_infinity_reach_the_output_where_they_belong(emulator, layout, mode):
    dtype, case = dtype_of(mode), Case(1, 40, 24, (5, 9))
    x, w = randn_in(case.x_shape, dtype, layout), randn_in(case.w_shape, dtype)
    x[0, 3, 2, 4], x[0, 7, 1, 1] = float("nan"), float("inf")
    y = placed(case.y_shape, dtype, layout)
    emulator.run("fprop", x=x, w=w, y=y, allow_tf32=mode == TF32, activation="relu")
    expected = stock_forward(x.double(), w.double(), activation="relu")
    assert torch.equal(y.isnan(), expected.isnan()) and torch.equal(y.isinf(), expected.isinf())


# --- dgrad, wgrad ---------------------------------------------------------------------------------------------------


@cover(case=CASES, layouts=BACKWARD_LAYOUTS, mode=MODES)
def test_dgrad(emulator, case, layouts, mode):
    backward(emulator, "dgrad", case, mode, layouts)


@cover(case=(*CASES, LONG), layouts=BACKWARD_LAYOUTS, mode=MODES)
def test_wgrad(emulator, case, layouts, mode):
    backward(emulator, "wgrad", case, mode, layouts)


@cover(
    3,
    layouts=(*LAYOUTS[:2], BACKWARD_LAYOUTS[-2]),
    activation=(None, "relu", "relu6"),
    direction=("dgrad", "wgrad"),
    mode=MODES,
)
def test_masks(emulator, layouts, activation, direction, mode):
    backward(emulator, direction, Case(3, 24, 40, (7, 7)), mode, layouts, activation)


@cover(case=(CASES[2], LONG), layouts=LAYOUTS[:2], mode=MODES)
def test_accumulated_weight_gradient(emulator, case, layouts, mode):
    backward(emulator, "wgrad", case, mode, layouts, accumulate=True)


@cover(wanted=("dw", "dbias"), case=(CASES[2], CASES[10], LONG), mode=MODES)
def test_one_of_two_gradients(emulator, wanted, case, mode):
    backward(emulator, "wgrad", case, mode, want_dw=wanted == "dw", want_dbias=wanted == "dbias")


# --- large tiles ----------------------------------------------------------------------------------------------------


@cover(case=LARGE_TILES, activation=(None, "relu"), layouts=LAYOUTS[:2], mode=MODES)
def test_large_tiles(emulator, case, activation, layouts, mode):
    kwargs = {"activation": activation, "gpu": SMALL_GPU}
    fprop(emulator, case, mode, layouts, residual=True, **kwargs)
    backward(emulator, "dgrad", case, mode, layouts, **kwargs)
    backward(emulator, "wgrad", case, mode, layouts, **kwargs)
    avg_pool(emulator, case, mode, layouts[0], "silu", gpu=SMALL_GPU)


# 3-wise: a kernel is of a tile, of layouts and of a mode.
@cover(3, case=TILED, tile=MMA_TILES, layouts=LAYOUTS[:2], mode=MMA_MODES)
def test_every_tile(emulator, case, tile, layouts, mode):
    gpu = Gpu(90, 132, 227 << 10, only_tile=MMA_TILES.index(tile))
    for residual in (False, True):
        fprop(emulator, case, mode, layouts, residual=residual, gpu=gpu)
    for direction, activation in itertools.product(("dgrad", "wgrad"), ("relu6", None)):
        backward(emulator, direction, case, mode, layouts, activation=activation, gpu=gpu)
    avg_pool(emulator, case, mode, layouts[0], "silu", gpu=gpu)


@pytest.mark.parametrize("case", [Case(2, 20, 300, (20, 20)), Case(2, 63, 45, (20, 20), 1, 3)], ids=str)
@pytest.mark.parametrize("slices", [1, 2, 3, 7])
def test_any_split(emulator, slices, case):
    for mode, direction in itertools.product(MMA_MODES, ("dgrad", "wgrad")):
        gpu = Gpu(90, 132, 227 << 10, only_tile=3, only_slices=slices)
        _, plan = backward(emulator, direction, case, mode, LAYOUTS[1], gpu=gpu)
        k, unit = (case.c_out // case.groups if direction == "dgrad" else 800), 4 * (16 if mode == TF32 else 32)
        units = -(-k // unit)
        assert plan["grid"].endswith(f", {-(-units // -(-units // min(slices, units)))} slices of k")
        avg_pool(emulator, case, mode, "channels_last", "relu", gpu=gpu)  # which is never split


def test_the_cases_do_use_every_tile(emulator):
    """Or the tests would prove nothing about the others."""
    tiles = {"simt": set(), "mma": set()}
    for case, layouts in itertools.product(LARGE_TILES, LAYOUTS[:2]):
        plans = [fprop(emulator, case, torch.float32, layouts, gpu=SMALL_GPU)[1]]
        plans += [backward(emulator, d, case, torch.float32, layouts, gpu=SMALL_GPU)[1] for d in ("dgrad", "wgrad")]
        tiles["simt"].update(plan["tile"].rsplit("x", 1)[0] for plan in plans)
    for tile, layouts in itertools.product(range(len(MMA_TILES)), LAYOUTS[:2]):
        gpu = Gpu(90, 132, 227 << 10, only_tile=tile)
        plan = fprop(emulator, TILED[0], torch.float16, layouts, gpu=gpu)[1]
        tiles["mma"].add(plan["tile"].rsplit("x", 1)[0])
    assert tiles["simt"] == {"128x128", "64x64"}
    assert tiles["mma"] == set(MMA_TILES)


# --- nothing to compute ---------------------------------------------------------------------------------------------


@cover(
    shape=((0, 33, 3, 3), (2, 33, 0, 3), (0, 32, 4, 4)),
    activation=("relu6", None),
    layout=("contiguous", "channels_last"),
    mode=MODES,
)
def test_no_images_and_no_pixels(emulator, shape, activation, layout, mode):
    """Gradients of the parameters are zeros, pooled outputs of no pixels NaN; nobody touches what is not there."""
    dtype, options = dtype_of(mode), {"allow_tf32": mode == TF32, "activation": activation}
    x, w, b = (torch.randn(s).to(dtype) for s in (shape, (17, shape[1], 1, 1), (17,)))
    x = laid_out_in(x, layout)
    y, dy = (laid_out_in(torch.empty(shape[0], 17, *shape[2:], dtype=dtype), layout) for _ in range(2))
    emulator.run("fprop", x=x, w=w, bias=b, y=y, **options)
    emulator.run("dgrad", x=x, w=w, y=y, dy=dy, dx=torch.empty_like(x), **options)
    dw, dbias = placed(w.shape, dtype), placed(b.shape, dtype)
    emulator.run("wgrad", x=x, w=w, y=y, dy=dy, dw=dw, dbias=dbias, **options)
    assert (dw == 0).all() and (dbias == 0).all()
    out, gradient = placed((shape[0], 17), dtype), torch.ones(shape[0], 17, dtype=dtype)
    emulator.run("avg_pool", x=x, w=w, bias=b, out=out, **options)
    assert out.isnan().all()
    dw, dbias = placed(w.shape, dtype), placed(b.shape, dtype)
    emulator.run(
        "avg_pool_backward", x=x, w=w, bias=b, dy=gradient, dx=torch.empty_like(x), dw=dw, dbias=dbias, **options
    )
    assert (dw == 0).all() and (dbias == 0).all()


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("size", [4, 5])
def test_masks_of_any_output(emulator, size, layout, mode):
    """conv1x1_backward takes any output, also what no ReLU6 gives; every route has the same mask."""
    dtype = dtype_of(mode)
    values = torch.tensor([7.0, 6.0, 5.0, 0.0, -0.0, -1.0, float("inf"), float("nan")])
    y = laid_out_in(values[torch.arange(2 * 24 * size * size) % 8].reshape(2, 24, size, size).to(dtype), layout)
    w, dy = torch.eye(24).reshape(24, 24, 1, 1).to(dtype), torch.ones_like(y)
    dx = torch.empty_like(y)
    for activation, passes in (("relu6", ~(y <= 0) & ~(y >= 6)), ("relu", ~(y <= 0))):
        emulator.run("dgrad", x=y, w=w, y=y, dy=dy, dx=dx, activation=activation, allow_tf32=mode == TF32)
        assert torch.equal(dx != 0, passes)


# --- devices and determinism ----------------------------------------------------------------------------------------


def far_apart(shape, dtype, layout):
    """Two images, or two rows of pixels, more than 2^31 elements apart; memory between them is never touched."""
    _, c, h, w = shape
    strides = (FAR, h * w, w, 1) if layout == "images" else (h * FAR, 1, FAR, c)
    extent = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    return torch.empty(extent, dtype=dtype).as_strided(shape, strides)


FAR = 2**31 + 8


@pytest.mark.parametrize("mode", [torch.bfloat16, torch.float32, TF32], ids=str)
@pytest.mark.parametrize("layout,shape", [("images", (2, 8, 3, 4)), ("rows", (1, 8, 2, 6))])
def test_offsets_are_64_bits(emulator, layout, shape, mode):
    dtype, c_out = dtype_of(mode), 16
    x, y = far_apart(shape, dtype, layout), far_apart((shape[0], c_out, *shape[2:]), dtype, layout)
    dx = far_apart(shape, dtype, layout)
    x.copy_(torch.randn(shape))
    w, dw = torch.randn(c_out, shape[1], 1, 1).to(dtype), torch.empty(c_out, shape[1], 1, 1, dtype=dtype)
    options = {"allow_tf32": mode == TF32}
    emulator.run("fprop", x=x, w=w, y=y, **options)
    compact = x.double().contiguous(), w.double()
    tolerance = {"rtol": 0, "atol": 0.25 if dtype == torch.bfloat16 else 0.05 if mode == TF32 else 1e-4}
    torch.testing.assert_close(y.double().contiguous(), conv(*compact, None, 1, 1), **tolerance)
    emulator.run("dgrad", x=x, w=w, dy=y, dx=dx, **options)
    emulator.run("wgrad", x=x, w=w, dy=y, dw=dw, **options)
    expected = gradients(*compact, y.double().contiguous(), Case(shape[0], shape[1], c_out, shape[2:]))
    for found, exact in zip((dx, dw), expected, strict=False):
        relative = (found.double().contiguous() - exact).norm() / exact.norm()
        assert relative < (4e-3 if dtype == torch.bfloat16 else 1e-3 if mode == TF32 else 1e-6)


@cover(gpu=GPUS, layouts=LAYOUTS[:2], mode=MODES)
def test_devices(emulator, gpu, layouts, mode):
    case = Case(2, 136, 200, (9, 9))
    fprop(emulator, case, mode, layouts, gpu=gpu)
    backward(emulator, "dgrad", case, mode, layouts, gpu=gpu)
    backward(emulator, "wgrad", case, mode, layouts, gpu=gpu)


@pytest.mark.parametrize("arch", [30, 70])
def test_an_architecture_without_code_is_refused(emulator, arch):
    x, w = randn_in((1, 8, 3, 3), torch.float32), randn_in((8, 8, 1, 1), torch.float32)
    y = placed((1, 8, 3, 3), torch.float32)
    with pytest.raises(RuntimeError, match=f"{arch // 10}\\.0"):
        emulator.run("fprop", x=x, w=w, y=y, gpu=Gpu(arch, 8, 48 << 10))
    assert intact(y) and y.isnan().all()


def test_tensor_cores_round_to_tf32_only_where_allowed(emulator):
    """1 + 2^-12 has no TF32 neighbour but 1."""
    x, w = torch.full((1, 32, 4, 8), 1 + 2.0**-12), torch.full((32, 32, 1, 1), 1 + 2.0**-12)
    results = []
    for allow, gpu in ((False, A100), (True, A100), (True, T4)):
        y = placed((1, 32, 4, 8), torch.float32)
        emulator.run("fprop", x=x, w=w, y=y, allow_tf32=allow, gpu=gpu)
        results.append(y.unique().tolist())
    exact = 32 * (1 + 2.0**-12) ** 2
    assert results[0] == pytest.approx([exact], rel=1e-6) and results[2] == pytest.approx([exact], rel=1e-6)
    assert results[1] == [32.0]


@cover(gpu=(A10, H100), case=(CASES[2], CASES[7], LONG), mode=MODES)
def test_the_same_bits_in_any_order_of_threads(emulator, gpu, case, mode):
    torch_state = torch.random.get_rng_state()
    runs = []
    for seed, os_threads in ((0, 1), (1, 2), (2, 3)):
        torch.random.set_rng_state(torch_state)
        kwargs = {"gpu": gpu, "seed": seed, "os_threads": os_threads}
        y, _ = fprop(emulator, case, mode, residual=True, **kwargs)
        dx, _ = backward(emulator, "dgrad", case, mode, **kwargs)
        dw, _ = backward(emulator, "wgrad", case, mode, **kwargs)
        runs.append([y, *dx, *dw])
    for run in runs[1:]:
        assert all(same_bits(a, b) for a, b in zip(runs[0], run, strict=True))


# --- pooling and the masked copy ------------------------------------------------------------------------------------


POOL_CASES = (
    Case(2, 24, 18, (7, 9)), Case(3, 20, 12, (5, 6), 1, 4), Case(1, 70, 130, (8, 8)), Case(6, 257, 1, (1, 1)),
    Case(2, 1, 50, (3, 3)), Case(2, 12, 7, (33,)), Case(2, 12, 8, (3, 4, 5), 1, 2),
)  # fmt: skip
POOL_DTYPES = tuple(m for m in MODES if m != TF32)


@cover(case=POOL_CASES, layout=("contiguous", "channels_last", "sliced"), dtype=POOL_DTYPES)
def test_avg_pool(emulator, case, layout, dtype):
    for activation in ("relu", "gelu"):
        avg_pool(emulator, case, dtype, layout, activation)


# Derivatives without a jump: the recomputed pre-activation may round to the other side of one.
@cover(case=POOL_CASES, layout=("contiguous", "channels_last", "sliced"), dtype=POOL_DTYPES)
def test_avg_pool_backward(emulator, case, layout, dtype):
    for activation in (None, "silu", "gelu"):
        avg_pool_backward(emulator, case, dtype, layout, activation)


@pytest.mark.parametrize("gpu", [IN_PIECES, Gpu(75, 40, 64 << 10, pooled_piece=1)], ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("want", [(1, 1), (1, 0), (0, 1)], ids=str)
def test_half_gradients_of_pieces_are_rounded_once(emulator, want, layout, dtype, gpu):
    for case in (Case(4, 24, 40, (4, 4)), Case(7, 18, 12, (8, 4), 1, 2)):  # 7: the last piece is smaller
        avg_pool_backward_in_pieces(emulator, case, dtype, layout, gpu, want)


@pytest.mark.parametrize("dtype", POOL_DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_avg_pool_backward_in_pieces(emulator, layout, dtype):
    for case in (Case(5, 24, 18, (7, 9)), Case(3, 20, 12, (5, 6), 1, 4), Case(6, 57, 1, (1, 1))):
        avg_pool_backward(emulator, case, dtype, layout, "silu", gpu=IN_PIECES)


@pytest.mark.parametrize("want", [(1, 0, 0), (0, 1, 0), (0, 0, 1)])
def test_avg_pool_backward_of_one_operand(emulator, want):
    avg_pool_backward(emulator, POOL_CASES[0], torch.float32, "contiguous", "silu", want)


@pytest.mark.parametrize("activation", ["relu", "relu6", "hardswish"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_avg_pool_backward_at_jumps(emulator, layout, activation):
    """In quarters, so that no pre-activation is rounded, and off the jumps by an eighth."""
    case = Case(2, 24, 18, (7, 9))
    x, w, b = (t.mul(2).round().div(2) for t in (torch.randn(case.x_shape), torch.randn(case.w_shape), torch.zeros(18)))
    b, dy = b + 0.125, torch.randn(2, 18)
    w[3], b[3], dy[:, 3] = 0, -5, torch.tensor([float("nan"), float("inf")])  # held back, whatever they are
    dx, dw, dbias = (placed(t.shape, t.dtype) for t in (x, w, b))
    x = placed(x.shape, x.dtype, layout, x)
    emulator.run(
        "avg_pool_backward", x=x, w=w, bias=b, dy=dy, dx=dx, dw=dw, dbias=dbias, activation=activation
    )  # fmt: skip
    for ours, ref in zip((dx, dw, dbias), pool_gradients(x, w, b, dy, case, activation), strict=True):
        torch.testing.assert_close(ours, ref, rtol=1e-4, atol=1e-5)


@cover(
    case=(Case(2, 3, 37, (7, 7)), Case(3, 2, 8, (16, 16)), Case(1, 1, 1, (1,))),
    layouts=BACKWARD_LAYOUTS,
    activation=("relu", "relu6"),
    dtype=POOL_DTYPES,
)
def test_masked_copy(emulator, case, layouts, activation, dtype):
    masked_copy(emulator, case, dtype, layouts, activation)
