"""Operands of one call of a microkernel by the pybind11 table, as its panels and memory hold them."""

import pytest
import torch

from bench.microkernel_table import in_parts

np = pytest.importorskip("numpy")

TILES = {  # instruction set, operand -> MR x NR, the one for most shapes last; and what B is where it is another type
    ("scalar", "float32"): ["4x8"],
    ("scalar", "float64"): ["4x4"],
    ("avx2", "float32"): ["6x16"],
    ("avx2", "float64"): ["6x8"],
    ("avx512", "float32"): ["6x64", "16x16", "14x32", "8x48-float16", "8x48"],
    ("avx512", "float64"): ["8x24"],
    ("avx512_bf16", "bfloat16"): ["6x64", "16x16", "8x48"],
    ("avx512_amx", "bfloat16"): ["32x32"],
    ("avx512_amx", "float32"): ["32x32"],
    ("avx512_amx", "float16"): ["32x32"],
}
KERNELS = [(*key, tile) for key, tiles in TILES.items() for tile in tiles]
CANARY = 12345.678


def random(rng, shape, kernel):
    return rng.standard_normal(shape).astype(kernel["dtype"])


def rounded(x, kernel):
    """x as an operand in memory holds it."""
    if kernel["operand"] == "bfloat16":
        return bfloat16_bits(x).astype(np.uint32).__lshift__(16).view(np.float32)
    return x if kernel["b"] != "float16" else x.astype(np.float16).astype(np.float32)


def half_bits(x, kernel):
    """x as the kernel stores it in its half type."""
    return x.astype(np.float16).view(np.uint16) if kernel["operand"] == "float16" else bfloat16_bits(x)


def bfloat16_bits(x):
    return torch.from_numpy(np.array(x)).bfloat16().view(torch.int16).numpy().view(np.uint16)


def in_pairs(x, axis):
    """bfloat16 along k as pairs, the first in the low half; an odd last one followed by zero."""
    bits = np.moveaxis(bfloat16_bits(x).astype(np.uint32), axis, 0)
    if len(bits) % 2:
        bits = np.concatenate([bits, np.zeros_like(bits[:1])])
    return np.ascontiguousarray(np.moveaxis(bits[0::2] | bits[1::2] << 16, 0, axis))


def in_groups(pairs, axis, ks):
    """Zeros up to whole groups of steps."""
    zeros = [(0, 0), (0, 0)]
    zeros[axis] = (0, -pairs.shape[axis] % ks)
    return np.pad(pairs, zeros)


def readable_behind(x, count):
    """x, followed by so many more elements."""
    memory = np.empty(x.size + count, x.dtype)
    memory[: x.size] = x.reshape(-1)
    return memory[: x.size].reshape(x.shape)


class Tile:
    """Operands of one call, and a poisoned output that is larger than the tile."""

    def __init__(self, rng, kernel, rows, m, n, k):
        if rows and kernel["parts"] > 1:
            pytest.skip("operands in parts are always panels")
        self.kernel, self.rows, self.m, self.n, self.k = kernel, rows, m, n, k
        self.a = rounded(random(rng, (m, k), kernel), kernel)
        vectors = -(-n // kernel["vector"]) * kernel["vector"]
        self.b = rounded(random(rng, (k, vectors + 3), kernel), kernel)
        self.b[:, n:] = np.nan  # reading it is allowed only where the result is thrown away
        self.out = np.full((m + 2, n + 19), CANARY, kernel["dtype"])

    def run(self, table, **epilogue):
        a, b = self.operands()
        table.run(self.kernel["name"], self.rows, a, b, self.out, self.n, **epilogue)
        outside = self.out.copy()
        outside[: self.m, : self.n] = CANARY
        assert (outside == self.out.dtype.type(CANARY)).all(), "written outside the tile"
        return self.out[: self.m, : self.n]

    def operands(self):
        a, b, ks, parts = self.a, self.b, self.kernel["ks"], self.kernel["parts"]
        if parts > 1:
            a = np.ascontiguousarray(in_parts(np.ascontiguousarray(a.T), parts).swapaxes(2, 3))
            a = readable_behind(a.reshape(-1, self.m), 15 * ks)
            return a, in_parts(b, parts).reshape(-1, b.shape[1])
        if self.kernel["kr"] == 2:
            a, b = in_groups(in_pairs(a, 1), 1, ks), in_groups(in_pairs(b, 0), 0, ks)
        if self.kernel["b"] == "float16":
            b = b.astype(np.float16).view(np.uint16)
        if not self.rows:  # (k / KS, m, KS) in memory
            steps = a.shape[1]
            a = np.ascontiguousarray(a.reshape(self.m, -1, ks).swapaxes(0, 1)).reshape(steps, self.m)
        return a, b

    def reference(self):
        """The exact sum, and the bound on a chain of k multiply-adds."""
        a, b = self.a.astype(np.longdouble), self.b[:, : self.n].astype(np.longdouble)
        return a @ b, (self.k + 6) * np.finfo(self.out.dtype).eps * (abs(a) @ abs(b))


def accesses(kernel):
    return (True, False) if kernel["parts"] == 1 else (False,)


def check(actual, exact, bound):
    assert np.isfinite(actual).all()
    assert (abs(actual - exact) <= bound + np.finfo(actual.dtype).tiny).all()
