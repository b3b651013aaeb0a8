"""The hardware does what csrc/cuda/ptx.cuh documents: fragment layouts of ldmatrix and mma, cp.async, TF32 rounding.

tests/ptx_hardware.cu is compiled for the visible GPU with nvcc and called through ctypes. The models of the layouts are
tested against a plain product on any machine.
"""

import ctypes
import subprocess

import pytest
import torch
from cuda_toolkit import find_nvcc
from helpers import ROOT

PRODUCTS = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
LANES = torch.arange(32, device="cpu")
G, T = LANES // 4, LANES % 4


@pytest.fixture(scope="module")
def hardware(tmp_path_factory):
    if not torch.cuda.is_available():
        pytest.skip("torch finds no GPU")
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("cp.async and these mma shapes need compute capability 8.0")
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc")
    library = tmp_path_factory.mktemp("ptx") / "libptx.so"
    arch = "sm_{}{}".format(*torch.cuda.get_device_capability())
    command = [nvcc, "-std=c++17", "-O2", f"-arch={arch}", "-shared", "-Xcompiler", "-fPIC", "-o", library]
    built = subprocess.run([*command, ROOT / "tests" / "ptx_hardware.cu"], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    torch.zeros(1, device="cuda")  # torch's context becomes the current one
    return ctypes.CDLL(str(library))


def call(function, *args):
    """Tensors on the CPU go to the GPU and back."""
    device = [t.contiguous().cuda() if isinstance(t, torch.Tensor) else t for t in args]
    torch.cuda.synchronize()
    code = function(
        *(ctypes.c_void_p(t.data_ptr()) if isinstance(t, torch.Tensor) else ctypes.c_int(t) for t in device)
    )
    assert code == 0, f"CUDA error {code}"
    return [t.cpu() if isinstance(t, torch.Tensor) else t for t in device]


def pack(low, high):
    """Two 16-bit tensors as the halves of an int32."""
    low, high = (t.contiguous().view(torch.int16).to(torch.int32) & 0xFFFF for t in (low, high))
    return low | high << 16


def a_fragment(a):
    """a (16, 16) of a 16-bit type, or (16, 8) float32: (32, 4) registers."""
    if a.dtype == torch.float32:
        registers = [a[G + r, T + k] for k in (0, 4) for r in (0, 8)]
        return torch.stack(registers, 1).contiguous().view(torch.int32)
    return torch.stack([pack(a[G + r, 2 * T + k], a[G + r, 2 * T + 1 + k]) for k in (0, 8) for r in (0, 8)], 1)


def b_fragment(b):
    """b (16, 8) of a 16-bit type, or (8, 8) float32: (32, 2) registers."""
    if b.dtype == torch.float32:
        return torch.stack([b[T + k, G] for k in (0, 4)], 1).contiguous().view(torch.int32)
    return torch.stack([pack(b[2 * T + k, G], b[2 * T + 1 + k, G]) for k in (0, 8)], 1)


def d_fragment(d):
    """d (16, 8) float32: (32, 4) registers."""
    return torch.stack([d[G + r, 2 * T + c] for r in (0, 8) for c in (0, 1)], 1).contiguous()


def test_fragments_hold_every_element_once():
    for dtype, k in ((torch.float16, 16), (torch.bfloat16, 16), (torch.float32, 8)):
        a = torch.arange(16 * k, dtype=torch.float32, device="cpu").reshape(16, k)
        b = torch.arange(k * 8, dtype=torch.float32, device="cpu").reshape(k, 8)
        if dtype != torch.float32:
            a, b = (t.to(torch.int16).view(dtype) for t in (a, b))
        for whole, fragment in ((a, a_fragment(a)), (b, b_fragment(b))):
            assert fragment.dtype == torch.int32
            bits = whole.view(torch.int16 if dtype != torch.float32 else torch.int32)
            held = fragment.contiguous().view(bits.dtype)
            assert torch.equal(held.flatten().sort().values, bits.flatten().sort().values)
    d = torch.arange(128.0, device="cpu").reshape(16, 8)
    assert torch.equal(d_fragment(d).flatten().sort().values, d.flatten())


@pytest.mark.parametrize("trans", [False, True])
def test_ldmatrix(hardware, trans):
    rows = torch.randint(-(1 << 15), 1 << 15, (4, 8, 8), dtype=torch.int16, device="cpu")
    _, out, _ = call(hardware.run_ldmatrix, rows, torch.zeros(32, 4, dtype=torch.int32, device="cpu"), int(trans))
    seen = rows.transpose(1, 2) if trans else rows
    expected = torch.stack([pack(m[G, 2 * T], m[G, 2 * T + 1]) for m in seen], 1)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", list(PRODUCTS), ids=str)
@pytest.mark.parametrize("values", ["integers", "random"])
def test_mma(hardware, values, dtype):
    k = 8 if dtype == torch.float32 else 16
    for _ in range(10):
        if values == "integers":  # every sum is exact
            a, b, d = (torch.randint(-8, 9, s, device="cpu").float() for s in ((16, k), (k, 8), (16, 8)))
        else:
            a, b, d = (torch.randn(s, device="cpu") for s in ((16, k), (k, 8), (16, 8)))
        a, b = (to_tf32(t) if dtype == torch.float32 else t.to(dtype) for t in (a, b))
        found = call(hardware.run_mma, a_fragment(a), b_fragment(b), d_fragment(d), PRODUCTS[dtype])[2]
        expected = d.double() + a.double() @ b.double()
        size = d.double().abs() + a.double().abs() @ b.double().abs()
        bound = 0 if values == "integers" else 2.0**-20  # tensor cores may truncate as they align the products
        assert ((found.double() - d_fragment(expected)).abs() <= bound * d_fragment(size)).all()


@pytest.mark.parametrize("size", [4, 8, 16])
def test_cp_async_fills_with_zeros(hardware, size):
    for _ in range(8):
        data = torch.randint(1, 255, (32, size), dtype=torch.uint8, device="cpu")
        valid = torch.randint(0, 2, (32,), dtype=torch.int32, device="cpu")
        out = call(hardware.run_cp_async, data, valid, torch.full_like(data, 0xEE), size)[2]
        assert torch.equal(out, torch.where(valid[:, None] > 0, data, torch.zeros_like(data)))


def to_tf32(t):
    """To nearest, ties away from zero, on the bits."""
    return ((t.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def test_rounding_to_tf32_model():
    t = torch.tensor([1.0, 1 + 2**-11, 1 + 2**-11 - 2**-23, -1 - 2**-11, 1 + 3 * 2**-11, float("inf")], device="cpu")
    expected = torch.tensor([1.0, 1 + 2**-10, 1.0, -1 - 2**-10, 1 + 2**-9, float("inf")], device="cpu")
    assert torch.equal(to_tf32(t), expected)


def test_round_to_tf32(hardware):
    t = torch.randn(1 << 16, device="cpu") * torch.randn(1 << 16, device="cpu").mul(20).exp()
    ties = torch.randn(1 << 12, device="cpu").view(torch.int32) & ~0x1FFF | 0x1000
    t = torch.cat([t, ties.view(torch.float32), torch.tensor([0.0, -0.0, float("inf"), -float("inf")], device="cpu")])
    t = t[(t == 0) | ((t.abs() > 1e-37) & (t.abs() < 3e38)) | t.isinf()]
    found = call(hardware.run_round_to_tf32, t.view(torch.int32), torch.zeros_like(t, dtype=torch.int32), len(t))[1]
    assert torch.equal(found & ~0x1FFF, to_tf32(t).view(torch.int32))  # the lower bits are not read


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_halves(hardware, dtype):
    """Rounding of pairs, x in the lower half; masks of what is neither <= 0 nor >= upper; ranges that NaN passes."""
    special = torch.tensor([0.0, -0.0, 6.0, -1.0, 1e-40, float("inf"), -float("inf"), float("nan")], device="cpu")
    x = torch.cat([torch.randn(4096, 2, device="cpu") * 4, torch.cartesian_prod(special, special)])
    y = x.flip(0).to(dtype)
    upper = torch.tensor([6.0, float("nan")], device="cpu").to(dtype)[torch.arange(len(x), device="cpu") % 2]
    found = call(
        hardware.run_halves, x, pack(y[:, 0], y[:, 1]), pack(upper, upper),
        *(torch.zeros(len(x), dtype=d, device="cpu") for d in (torch.int32, torch.int32, torch.float32)),
        len(x), int(dtype == torch.bfloat16),
    )  # fmt: skip
    packed = found[3].view(dtype).reshape(-1, 2)
    assert torch.equal(packed.isnan(), x.isnan()) and torch.equal(packed.nan_to_num(0), x.to(dtype).nan_to_num(0))
    passes = ~(y <= 0) & ~(y >= upper[:, None])
    assert torch.equal(found[4], pack(-passes[:, 0].short(), -passes[:, 1].short()))
    torch.testing.assert_close(found[5], x[:, 0].clamp(0, 6), rtol=0, atol=0, equal_nan=True)
