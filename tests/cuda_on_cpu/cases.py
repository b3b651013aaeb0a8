"""What the emulated CUDA kernels are asked, and held against float64: one function a direction, shapes and layouts."""

import torch
from helpers import (
    HALVES,
    SLOPE,
    Case,
    activate,
    assert_close_to_reference,
    chain_bound,
    conv,
    stock_forward,
)

from .harness import A100, Gpu, intact, placed, randn_in

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
# More than a tile, and a tail, of each size along pixels and along channels out or in.
TILED = (Case(1, 70, 136, (10, 13)), Case(1, 136, 36, (11, 12)))
LONG = Case(2, 12, 20, (37, 40))  # wgrad cuts its k, the pixels


def dtype_of(mode):
    return torch.float32 if mode == TF32 else mode


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


def saved_output(case, x, w, activation, layout, offset=0):
    """An output as the forward leaves it behind, and its mask."""
    z = conv(x, w, None, case.stride, case.groups)
    if activation == "relu6":
        z = 4 * z
    y = placed(z.shape, z.dtype, layout if layout != "expanded" else "contiguous", activate(z, activation), offset)
    keep = torch.ones_like(z, dtype=torch.bool)
    if activation is not None:
        keep = ~(y <= 0)
    if activation == "relu6":
        keep &= ~(y >= 6)
    return y, keep


def backward(
    emulator, direction, case, mode, layouts=LAYOUTS[0], activation="relu", offset=0, gpu=A100, accumulate=False,
    want_dw=True, want_dbias=True, mask_offset=0, **kwargs,
):  # fmt: skip
    """Runs and checks dgrad (layouts: of dy and dx) or wgrad (of dy and x); returns the gradients and the plan."""
    dtype = dtype_of(mode)
    x, w = randn_in(case.x_shape, dtype, layouts[1], offset), randn_in(case.w_shape, dtype, offset=offset)
    y, keep = saved_output(case, x, w, activation, layouts[0], mask_offset)
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


def pooled(x, w, b, case, activation):
    z = stock_forward(x, w, b, groups=case.groups, activation=activation)
    return z.mean(tuple(range(2, z.dim())))


def avg_pool(emulator, case, mode, layout, activation, gpu=A100, **kwargs):
    dtype = dtype_of(mode)
    x, w = randn_in(case.x_shape, dtype, layout), randn_in(case.w_shape, dtype)
    b, out = randn_in((case.c_out,), dtype), placed((case.n, case.c_out), dtype)
    emulator.run(
        "avg_pool", x=x, w=w, bias=b, out=out, groups=case.groups, activation=activation, gpu=gpu,
        allow_tf32=mode == TF32, **kwargs,
    )  # fmt: skip
    assert intact(out)
    ref = pooled(x.double(), w.double(), b.double(), case, activation)
    size = pooled(*transformed((x, w, b), torch.abs), case, None)
    stock = pooled(x, w, b, case, activation)
    assert_close(out, stock, ref, size, w.shape[1] + x[0, 0].numel(), mode)
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


def avg_pool_backward_in_pieces(emulator, case, dtype, layout, gpu, want=(1, 1)):
    """dw and dbias of pieces that nearly cancel: a sum that were rounded from piece to piece would show it.

    Powers of two for the pixels, and multiples of an eighth, so that the gradients of the pixels are exact.
    """
    images = torch.randn(1, *case.x_shape[1:]).mul(8).round().div(8).expand(case.x_shape)
    x, w = placed(case.x_shape, dtype, layout, images.to(dtype)), randn_in(case.w_shape, dtype)
    large, small = (torch.randn(case.c_out).mul(8).round().div(8) for _ in range(2))
    dy = torch.stack([large, *[small * 0] * (case.n - 3), small / 64, -large]).to(dtype)
    assert torch.equal(dy.double().sum(0), small.double() / 64)
    results = [placed(case.w_shape, dtype) if want[0] else None, placed((case.c_out,), dtype) if want[1] else None]
    emulator.run(
        "avg_pool_backward", x=x, w=w, bias=None, dy=dy, dw=results[0], dbias=results[1], groups=case.groups,
        activation=None, gpu=gpu,
    )  # fmt: skip
    pixels = x[0, 0].numel()
    dz = (dy.double() / pixels)[..., None, None].expand(case.y_shape)
    exact = gradients(x.double(), w.double(), dz, case)[1:]
    size = gradients(x.double().abs(), w.double().abs(), dz.abs(), case)[1:]
    for ours, ref, magnitude in zip(results, exact, size, strict=True):
        if ours is None:
            continue
        assert intact(ours)
        rounding = torch.finfo(dtype).eps / 2 * ref.abs() + torch.finfo(dtype).tiny
        allowed = rounding + SLOPE * chain_bound(case.n * pixels, torch.float32) * magnitude
        assert ((ours.double() - ref).abs() <= allowed).all()


def masked_copy(emulator, case, dtype, layouts, activation, mask_offset=0):
    x, w = randn_in(case.x_shape, dtype), randn_in(case.w_shape, dtype)
    y, keep = saved_output(case, x, w, activation, layouts[0], mask_offset)
    dy, dz = randn_in(case.y_shape, dtype, layouts[0]), placed(case.y_shape, dtype, layouts[1])
    y[0, 0].fill_(float("nan"))  # passes the gradient
    keep[0, 0] = True
    emulator.run("masked_copy", x=x, w=w, y=y, dy=dy, dz=dz, groups=case.groups, activation=activation)
    assert intact(dz)
    assert torch.equal(dz, torch.where(keep, dy, torch.zeros_like(dy)))
