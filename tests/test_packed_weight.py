"""A weight's panels made beforehand: the bits of a call that packs for itself, for any pixels and thread count."""

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.cpu_only(reason="the CPU's panels")

SHAPES = [(64, 96, 49), (33, 17, 50), (512, 130, 9), (7, 64, 200), (1, 1, 1), (130, 300, 784), (150, 40, 81)]
DTYPES = ("float32", "float64", "bfloat16", "float16")


def memory_of(x: torch.Tensor) -> np.ndarray:
    return x.view(torch.int16).numpy().view(np.uint16) if x.element_size() == 2 else x.numpy()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("dgrad", [False, True], ids=["fprop", "dgrad"])
@pytest.mark.parametrize("c_in,c_out,pixels", SHAPES)
def test_same_bits(table, dtype, channels_last, dgrad, c_in, c_out, pixels):
    kind = getattr(torch, dtype)
    k, channels = (c_out, c_in) if dgrad else (c_in, c_out)
    w = torch.randn(c_out, c_in, dtype=torch.float64).to(kind)
    x = torch.randn(pixels, k, dtype=torch.float64).to(kind)
    given = x if channels_last else x.t().contiguous()
    outs, sizes = [], set()
    for threads in (1, 2, 3):
        for beforehand in (False, True):
            out = torch.zeros((pixels, channels) if channels_last else (channels, pixels), dtype=kind)
            arrays = (memory_of(t) for t in (given, w, out))
            sizes.add(table.with_packed_weight(dtype, *arrays, channels_last, dgrad, threads, beforehand))
            outs.append(out)
    assert all(torch.equal(outs[0], out) for out in outs)
    exact = x.double() @ (w.double() if dgrad else w.double().t())
    found = (outs[0] if channels_last else outs[0].t()).double()
    assert (found - exact).norm() <= 4 * torch.finfo(kind).eps * k**0.5 * exact.norm()
    # Where the weight is the vector operand there are always panels, whole vectors wide.
    (size,) = sizes
    assert size >= (w.numel() * w.element_size() if channels_last and min(c_in, c_out, pixels) > 1 else 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_panels_do_not_depend_on_the_pixels(table, dtype):
    """But that fewer than 32 (float16 with few channels out: 64) may be another kernel's, with other panels."""
    sizes = set()
    for pixels in (32, 49, 3136):
        kind = getattr(torch, dtype)
        x, w, out = (torch.zeros(s, dtype=kind) for s in ((pixels, 64), (256, 64), (pixels, 256)))
        sizes.add(table.with_packed_weight(dtype, *map(memory_of, (x, w, out)), True, False, 1, True))
    assert len(sizes) == 1 and sizes.pop() > 0
