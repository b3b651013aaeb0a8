"""The CUDA kernels, run on the CPU from their own sources, against float64; no GPU is needed.

This proves indices, masks, fragments, barriers and the arithmetic of the plans. It does not prove that nvcc compiles
the sources, nor anything about speed or about how the hardware sums in mma.
"""

import os
import subprocess
import sys

import pytest
import torch
from cuda_on_cpu import build
from cuda_on_cpu.harness import A10, A100, GPUS, H100, SANITIZED, T4, Emulator, Gpu, intact, placed, randn_in
from helpers import (
    ACTIVATIONS,
    HALVES,
    ROOT,
    SLOPE,
    Case,
    activate,
    assert_close_to_reference,
    chain_bound,
    conv,
    same_bits,
    stock_forward,
)  # fmt: skip

TF32 = "tf32"
MODES = (torch.float32, TF32, torch.float64, torch.float16, torch.bfloat16)
LAYOUTS = (
    ("contiguous", "contiguous"), ("channels_last", "channels_last"), ("contiguous", "channels_last"),
    ("channels_last", "contiguous"), ("sliced", "padded"), ("padded", "sliced"),
)  # fmt: skip
SAMPLE = (
    Case(2, 20, 40, (5, 7)),
    Case(2, 18, 12, (5, 4), 2, 2),
    Case(2, 70, 130, (13, 5)),  # every tile and k has a tail; odd pixels
)
CASES = (
    *SAMPLE,
    Case(3, 72, 136, (7, 7)),  # tiles span images
    Case(1, 64, 128, (8, 16)),  # no tail
    Case(1, 1, 1, (1, 1)),
    Case(130, 40, 5, (1, 1)),
    Case(1, 1500, 10, (3, 3)),  # long k, few outputs
    Case(2, 33, 1, (3,)),
    Case(2, 24, 40, (2, 3, 4)),
    Case(2, 36, 60, (5, 6), 1, 3),
    Case(2, 8, 8, (6, 5), 1, 8),
    Case(2, 20, 24, (9, 8), 2),
    Case(1, 16, 24, (4, 6, 5), (1, 2, 3)),
)
BACKWARD_LAYOUTS = (*LAYOUTS, ("expanded", "contiguous"), ("expanded", "channels_last"))
# One multiprocessor has work enough for large tiles in problems that are small here.
SMALL_GPU = Gpu(80, 1, 163 << 10)
LARGE_TILES = (
    Case(2, 136, 130, (13, 5)), Case(2, 120, 127, (9, 7)), Case(2, 40, 130, (5, 4)), Case(2, 130, 40, (5, 4)),
    Case(2, 40, 33, (13, 12)),
)  # fmt: skip
LONG = Case(2, 12, 20, (37, 40))  # wgrad cuts its k, the pixels


def dtype_of(mode):
    return torch.float32 if mode == TF32 else mode


@pytest.fixture(scope="session")
def emulator():
    return Emulator()


def assert_close(ours, stock, ref, magnitude, k, mode):
    if mode != TF32:
        assert_close_to_reference(ours, stock, ref, magnitude, k)
        return
    # Both factors of a product are rounded to 11 bits.
    per_product = 2.0**-10 * (1 + 2.0**-10)
    allowed = SLOPE * (per_product + chain_bound(k, torch.float32)) * magnitude + torch.finfo(torch.float32).tiny
    assert ours.dtype == torch.float32 and torch.isfinite(ours).all()
    assert ((ours.double() - ref).abs() <= allowed).all()


def transformed(tensors, function):
    return [None if t is None else function(t.detach().double()) for t in tensors]


def fprop(
    emulator, case, mode, layouts=LAYOUTS[0], activation="relu", bias=True, residual=False, offset=0, gpu=A100, **kwargs
):
    """Runs and checks one forward; returns y and the plan."""
    dtype = dtype_of(mode)
    x, w = randn_in(case.x_shape, dtype, layouts[0], offset), randn_in(case.w_shape, dtype, offset=offset)
    b = randn_in((case.c_out,), dtype) if bias else None
    r = randn_in(case.y_shape, dtype, layouts[1], offset) if residual else None
    y = placed(case.y_shape, dtype, layouts[1], offset=offset)
    plan = emulator.run(
        "fprop", x=x, w=w, bias=b, residual=r, y=y, stride=case.stride, groups=case.groups, activation=activation,
        gpu=gpu, allow_tf32=mode == TF32, **kwargs,
    )  # fmt: skip
    assert intact(y)

    def oracle(tensors, activation):
        return stock_forward(*tensors[:3], case.stride, groups=case.groups, activation=activation, residual=tensors[3])

    operands = (x, w, b, r)
    magnitude = oracle(transformed(operands, torch.abs), None)
    ref = oracle(transformed(operands, lambda t: t), activation)
    assert_close(y, oracle(operands, activation), ref, magnitude, w.shape[1], mode)
    return y, plan


def gradients(x, w, dz, case):
    """dx, dw and dbias by torch. Contiguous operands: see helpers._oracle_gradients."""
    leaves = [t.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for t in (x, w)]
    y = conv(*leaves, None, case.stride, case.groups)
    dx, dw = torch.autograd.grad(y, leaves, dz)
    return dx, dw, dz.sum([d for d in range(dz.dim()) if d != 1])


def saved_output(case, x, w, activation, layout):
    """An output as the forward leaves it behind, and its mask."""
    z = conv(x, w, None, case.stride, case.groups)
    if activation == "relu6":
        z = 4 * z
    y = placed(z.shape, z.dtype, layout if layout != "expanded" else "contiguous", activate(z, activation))
    keep = torch.ones_like(z, dtype=torch.bool)
    if activation is not None:
        keep = ~(y <= 0)
    if activation == "relu6":
        keep &= ~(y >= 6)
    return y, keep


def backward(
    emulator, direction, case, mode, layouts=LAYOUTS[0], activation="relu", offset=0, gpu=A100, accumulate=False,
    want_dw=True, want_dbias=True, **kwargs,
):  # fmt: skip
    """Runs and checks dgrad (layouts: of dy and dx) or wgrad (of dy and x); returns the gradients and the plan."""
    dtype = dtype_of(mode)
    x, w = randn_in(case.x_shape, dtype, layouts[1], offset), randn_in(case.w_shape, dtype, offset=offset)
    y, keep = saved_output(case, x, w, activation, layouts[0])
    dy = randn_in(case.y_shape, dtype, layouts[0], offset)
    dz = torch.where(keep, dy, torch.zeros_like(dy))
    if direction == "dgrad":
        # With a stride the caller's zero fill covers dense gradients only, which is what the binding allocates.
        dense = case.stride == 1 or layouts[1] in ("contiguous", "channels_last")
        results = [placed(case.x_shape, dtype, layouts[1] if dense else "contiguous", offset=offset), None, None]
    else:
        before = randn_in if accumulate else placed
        dw = before(case.w_shape, dtype, offset=offset) if want_dw else None
        results = [None, dw, before((case.c_out,), dtype) if want_dbias else None]
    started = [None if t is None or not accumulate else t.clone() for t in results]
    plan = emulator.run(
        direction, x=x, w=w, y=y if activation else None, dy=dy, dx=results[0], dw=results[1], dbias=results[2],
        stride=case.stride, groups=case.groups, activation=activation, accumulate=accumulate, gpu=gpu,
        allow_tf32=mode == TF32, **kwargs,
    )  # fmt: skip

    stock = gradients(x, w, dz, case)
    exact = gradients(x.double(), w.double(), dz.double(), case)
    size = gradients(x.double().abs(), w.double().abs(), dz.double().abs(), case)
    pixels = dz.numel() // case.c_out
    for i, k in enumerate((case.c_out // case.groups, pixels, pixels)):
        if results[i] is None:
            continue
        assert intact(results[i])
        first = started[i]
        expected = [stock[i], exact[i], size[i]]
        if first is not None:
            expected = [stock[i] + first, exact[i] + first.double(), size[i] + first.double().abs()]
        # The sum of one operand's rows has no products: full precision whatever the mode.
        assert_close(results[i], *expected, k, torch.float32 if i == 2 and mode == TF32 else mode)
    return [t for t in results if t is not None], plan


# --- every direction: also run under the sanitizers ---------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("layouts", LAYOUTS[:5], ids="-".join)
@pytest.mark.parametrize("case", SAMPLE, ids=str)
def test_sample(emulator, case, layouts, mode):
    fprop(emulator, case, mode, layouts, residual=True)
    backward(emulator, "dgrad", case, mode, layouts)
    backward(emulator, "wgrad", case, mode, layouts)
    if case.stride == 1:
        avg_pool(emulator, case, dtype_of(mode), layouts[0], "relu")
        avg_pool_backward(emulator, case, dtype_of(mode), layouts[0], "silu")
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


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("layouts", LAYOUTS, ids="-".join)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_fprop(emulator, case, layouts, mode):
    fprop(emulator, case, mode, layouts)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("layouts", LAYOUTS[:2], ids="-".join)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_epilogue(emulator, activation, layouts, mode):
    case = Case(2, 40, 72, (7, 9))
    fprop(emulator, case, mode, layouts, activation, bias=True, residual=True)
    fprop(emulator, case, mode, layouts, activation, bias=False, residual=True)
    fprop(emulator, case, mode, layouts, activation, bias=False, residual=False)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("layouts", LAYOUTS[:2], ids="-".join)
@pytest.mark.parametrize("size", [40, 36, 34, 33])
@pytest.mark.parametrize("offset", [0, 1, 2, 4])
def test_alignment_tiers(emulator, size, offset, layouts, mode):
    case = Case(2, size, size, (1, size))
    fprop(emulator, case, mode, layouts, residual=True, offset=offset)


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


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("layouts", BACKWARD_LAYOUTS, ids="-".join)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_dgrad(emulator, case, layouts, mode):
    backward(emulator, "dgrad", case, mode, layouts)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("layouts", BACKWARD_LAYOUTS, ids="-".join)
@pytest.mark.parametrize("case", (*CASES, LONG), ids=str)
def test_wgrad(emulator, case, layouts, mode):
    backward(emulator, "wgrad", case, mode, layouts)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("direction", ["dgrad", "wgrad"])
@pytest.mark.parametrize("activation", [None, "relu", "relu6"])
@pytest.mark.parametrize("layouts", (*LAYOUTS[:2], BACKWARD_LAYOUTS[-2]), ids="-".join)
def test_masks(emulator, layouts, activation, direction, mode):
    backward(emulator, direction, Case(3, 24, 40, (7, 7)), mode, layouts, activation)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("layouts", LAYOUTS[:2], ids="-".join)
@pytest.mark.parametrize("case", [CASES[2], LONG], ids=str)
def test_accumulated_weight_gradient(emulator, case, layouts, mode):
    backward(emulator, "wgrad", case, mode, layouts, accumulate=True)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("case", [CASES[2], CASES[10], LONG], ids=str)
@pytest.mark.parametrize("wanted", ["dw", "dbias"])
def test_one_of_two_gradients(emulator, wanted, case, mode):
    backward(emulator, "wgrad", case, mode, want_dw=wanted == "dw", want_dbias=wanted == "dbias")


# --- large tiles ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("layouts", LAYOUTS[:2], ids="-".join)
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("case", LARGE_TILES, ids=str)
def test_large_tiles(emulator, case, activation, layouts, mode):
    kwargs = {"activation": activation, "gpu": SMALL_GPU}
    fprop(emulator, case, mode, layouts, residual=True, **kwargs)
    backward(emulator, "dgrad", case, mode, layouts, **kwargs)
    backward(emulator, "wgrad", case, mode, layouts, **kwargs)
    if mode != TF32:
        avg_pool(emulator, case, mode, layouts[0], "silu", gpu=SMALL_GPU)


def test_the_cases_do_use_every_tile(emulator):
    """Or the tests would prove nothing about the others."""
    tiles = {"simt": set(), "mma": set()}
    for case in LARGE_TILES:
        for layouts in LAYOUTS[:2]:
            for mode in (torch.float32, torch.float16):
                plans = [fprop(emulator, case, mode, layouts, gpu=SMALL_GPU)[1]]
                plans += [backward(emulator, d, case, mode, layouts, gpu=SMALL_GPU)[1] for d in ("dgrad", "wgrad")]
                for plan in plans:
                    tiles[plan["kernel"].split("_")[0]].add(plan["tile"].rsplit("x", 1)[0])
    assert tiles["simt"] >= {"128x128", "64x64"}
    assert tiles["mma"] >= {"128x128", "128x64", "64x128", "64x64"}


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


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("layouts", LAYOUTS[:2], ids="-".join)
@pytest.mark.parametrize("gpu", GPUS, ids=str)
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


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("case", [CASES[2], CASES[7], LONG], ids=str)
@pytest.mark.parametrize("gpu", [A10, H100], ids=str)
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


def pooled(x, w, b, case, activation):
    z = stock_forward(x, w, b, groups=case.groups, activation=activation)
    return z.mean(tuple(range(2, z.dim())))


def avg_pool(emulator, case, dtype, layout, activation, gpu=A100, **kwargs):
    x, w = randn_in(case.x_shape, dtype, layout), randn_in(case.w_shape, dtype)
    b, out = randn_in((case.c_out,), dtype), placed((case.n, case.c_out), dtype)
    emulator.run("avg_pool", x=x, w=w, bias=b, out=out, groups=case.groups, activation=activation, gpu=gpu, **kwargs)
    assert intact(out)
    ref = pooled(x.double(), w.double(), b.double(), case, activation)
    size = pooled(*transformed((x, w, b), torch.abs), case, None)
    stock = pooled(x, w, b, case, activation)
    assert_close_to_reference(out, stock, ref, size, w.shape[1] + x[0, 0].numel())
    return out


def pool_gradients(x, w, b, dy, case, activation):
    leaves = [t.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for t in (x, w, b)]
    return torch.autograd.grad(pooled(*leaves, case, activation), leaves, dy)


def avg_pool_backward(emulator, case, dtype, layout, activation, want=(1, 1, 1), gpu=A100, **kwargs):
    x, w = randn_in(case.x_shape, dtype, layout), randn_in(case.w_shape, dtype)
    b, dy = randn_in((case.c_out,), dtype), randn_in((case.n, case.c_out), dtype)
    results = [placed(case.x_shape, dtype, layout), placed(case.w_shape, dtype), placed((case.c_out,), dtype)]
    dx, dw, dbias = (t if wanted else None for t, wanted in zip(results, want, strict=True))
    emulator.run(
        "avg_pool_backward", x=x, w=w, bias=b, dy=dy, dx=dx, dw=dw, dbias=dbias, groups=case.groups,
        activation=activation, gpu=gpu, **kwargs,
    )  # fmt: skip
    stock = pool_gradients(x, w, b, dy, case, activation)
    exact = pool_gradients(x.double(), w.double(), b.double(), dy.double(), case, activation)
    size = pool_gradients(*transformed((x, w, b, dy), torch.abs), case, None)
    for ours, wanted, theirs, ref, magnitude in zip(results, want, stock, exact, size, strict=True):
        assert intact(ours)
        if not wanted:
            continue
        error, stock_error = ((t.double() - ref).norm() / ref.norm() for t in (ours, theirs))
        if dtype in HALVES:
            assert error <= 2 * stock_error + torch.finfo(dtype).eps
        else:
            assert ((ours.double() - ref).abs() <= 60 * torch.finfo(dtype).eps * magnitude.max()).all()
    return results


POOL_CASES = (
    Case(2, 24, 18, (7, 9)), Case(3, 20, 12, (5, 6), 1, 4), Case(1, 70, 130, (8, 8)), Case(6, 257, 1, (1, 1)),
    Case(2, 1, 50, (3, 3)), Case(2, 12, 7, (33,)), Case(2, 12, 8, (3, 4, 5), 1, 2),
)  # fmt: skip
POOL_DTYPES = tuple(m for m in MODES if m != TF32)


@pytest.mark.parametrize("dtype", POOL_DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("case", POOL_CASES, ids=str)
def test_avg_pool(emulator, case, layout, dtype):
    for activation in ("relu", "gelu"):
        avg_pool(emulator, case, dtype, layout, activation)


# Derivatives without a jump: the recomputed pre-activation may round to the other side of one.
@pytest.mark.parametrize("dtype", POOL_DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("case", POOL_CASES, ids=str)
def test_avg_pool_backward(emulator, case, layout, dtype):
    for activation in (None, "silu", "gelu"):
        avg_pool_backward(emulator, case, dtype, layout, activation)


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


def masked_copy(emulator, case, dtype, layouts, activation):
    x, w = randn_in(case.x_shape, dtype), randn_in(case.w_shape, dtype)
    y, keep = saved_output(case, x, w, activation, layouts[0])
    dy, dz = randn_in(case.y_shape, dtype, layouts[0]), placed(case.y_shape, dtype, layouts[1])
    y[0, 0].fill_(float("nan"))  # passes the gradient
    keep[0, 0] = True
    emulator.run("masked_copy", x=x, w=w, y=y, dy=dy, dz=dz, groups=case.groups, activation=activation)
    assert intact(dz)
    assert torch.equal(dz, torch.where(keep, dy, torch.zeros_like(dy)))


@pytest.mark.parametrize("dtype", POOL_DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["relu", "relu6"])
@pytest.mark.parametrize("layouts", BACKWARD_LAYOUTS, ids="-".join)
@pytest.mark.parametrize("case", [Case(2, 3, 37, (7, 7)), Case(3, 2, 8, (16, 16)), Case(1, 1, 1, (1,))], ids=str)
def test_masked_copy(emulator, case, layouts, activation, dtype):
    masked_copy(emulator, case, dtype, layouts, activation)
