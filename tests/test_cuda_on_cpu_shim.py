"""The CPU emulation of CUDA computes what the hardware does, and reports the faults planted in small kernels."""

import ctypes
import itertools

import pytest
import torch
from cuda_on_cpu import build
from helpers import run_python

SHARED_LIMIT = 100 << 10


class Kernels:
    """tests/cuda_on_cpu/kernels.cu: functions by name; tensors become pointers, a fault becomes RuntimeError."""

    def __init__(self, path):
        self.library = ctypes.CDLL(str(path))
        self.library.last_error.restype = ctypes.c_char_p
        self.library.numbers.restype = ctypes.c_double
        self.configure(0)

    def configure(self, seed, os_threads=2, shared_limit=SHARED_LIMIT):
        self.library.configure(ctypes.c_int64(seed), os_threads, shared_limit)

    def __getattr__(self, name):
        function = getattr(self.library, name)

        def call(*args):
            pointers = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else a for a in args]
            result = function(*pointers)
            error = self.library.last_error().decode()
            if error:
                raise RuntimeError(error)
            return result

        return call


def library(**kwargs):
    return build.build("shim", [build.HERE / "kernels.cu"], **kwargs)


@pytest.fixture(scope="module")
def kernels():
    return Kernels(library())


@pytest.fixture(scope="module")
def sanitized():
    """Runs one exported function with ctypes arguments under AddressSanitizer; returns the process."""
    path = library(sanitize=True)

    def run(call):
        code = f"""
import ctypes, sys
k = ctypes.CDLL({str(path)!r})
k.last_error.restype = ctypes.c_char_p
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
def floats(count):
    memory = ctypes.c_void_p(libc.malloc(ctypes.c_size_t(4 * count)))
    ctypes.memset(memory, 0, 4 * count)
    return memory
{call}
sys.stderr.write(k.last_error().decode())
"""
        return run_python(code, **build.sanitizer_environment())

    return run


def sgemm(kernels, fault=0, m=70, n=50, k=45):
    a, b = torch.randn(m, k), torch.randn(k, n)
    c = torch.full((m, n), float("nan"))
    kernels.run_sgemm(fault, a, b, c, m, n, k)
    return c, a.double() @ b.double()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("os_threads", [1, 3])
def test_tiled_sgemm(kernels, seed, os_threads):
    kernels.configure(seed, os_threads)
    c, expected = sgemm(kernels)
    torch.testing.assert_close(c.double(), expected, rtol=1e-5, atol=1e-5)


def test_tiled_sgemm_with_ucontext():
    c, expected = sgemm(Kernels(library(defines=["CONV1X1_EMULATOR_UCONTEXT"])))
    torch.testing.assert_close(c.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fault", [1, 2])
@pytest.mark.parametrize("seed", range(4))
def test_missing_barrier_gives_wrong_results(kernels, fault, seed):
    kernels.configure(seed)
    c, expected = sgemm(kernels, fault)
    assert not torch.allclose(c.double(), expected, rtol=1e-2, atol=1e-2)


def test_block_and_thread_indices(kernels):
    out = torch.zeros(12, 24, dtype=torch.int32)
    kernels.run_indices(out)
    assert torch.equal(out, 1000 * torch.arange(12)[:, None] + torch.arange(24))


def test_shared_memory_is_poisoned_for_every_block(kernels):
    kernels.configure(0, os_threads=1)
    out = torch.zeros(3 * 256)
    kernels.run_unwritten(out, 3)
    assert out.isnan().all()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("divergent_exit", r"64 threads have exited, 64 wait in __syncthreads at .*kernels\.cu:\d+"),
        ("divergent_sites", r"__syncthreads at .*kernels\.cu:\d+, while \d+ of 128 threads wait in __syncthreads at"),
        ("divergent_warp", r"32 threads have exited, 32 wait in __syncwarp at .*kernels\.cu:\d+"),
        ("partial_mask", "not that of a full warp"),
        ("partial_warp", "needs a full warp"),
    ],
)
def test_divergence_is_reported(kernels, function, message):
    out = torch.zeros(160, dtype=torch.int32)
    with pytest.raises(RuntimeError, match=message):
        getattr(kernels, f"run_{function}")(out)
    sgemm(kernels)  # and the next launch is as good as ever


COPY_FAULTS = ("none", "no wait", "wait too weak", "no commit", "not finished", "misaligned", "not shared")


def copies(kernels, fault, valid=True):
    given, out = torch.randn(1025), torch.zeros(1024)
    kernels.run_copies(COPY_FAULTS.index(fault), given, out, int(valid))
    return given[:1024].view(-1, 4), out.view(-1, 4)


@pytest.mark.parametrize("valid", [False, True])
def test_asynchronous_copies_fill_with_zeros(kernels, valid):
    given, out = copies(kernels, "none", valid)
    assert torch.equal(out, 2 * given if valid else torch.zeros_like(given))


@pytest.mark.parametrize(("fault", "poisoned"), [("no wait", [0, 1]), ("wait too weak", [1])])
def test_missing_wait_reads_poison(kernels, fault, poisoned):
    _, out = copies(kernels, fault)
    for s in (0, 1):
        assert out[128 * s : 128 * (s + 1)].isnan().all() == (s in poisoned)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("no commit", "cp_async at .*not waited for when the thread ended"),
        ("not finished", "cp_async at .*not waited for when the thread ended"),
        ("misaligned", "cp_async at .*global address 0x.* is not a multiple of 16"),
        ("not shared", "cp_async at .* are not in the block's shared memory"),
    ],
)
def test_faulty_copies_are_reported(kernels, fault, message):
    with pytest.raises(RuntimeError, match=message):
        copies(kernels, fault)


@pytest.mark.parametrize("transposed", [False, True], ids=["ldmatrix", "ldmatrix_trans"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_fragments_of_16_bits(kernels, dtype, transposed):
    a, b, d = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype), torch.randn(16, 8)
    expected = d.double() + a.double() @ b.double()
    given_b = b if transposed else b.t().contiguous()
    run = kernels.run_mma_half if dtype == torch.float16 else kernels.run_mma_bfloat16
    run(a, given_b, d, int(transposed), 0)
    torch.testing.assert_close(d.double(), expected, rtol=1e-5, atol=1e-5)


def test_mma_adds_in_the_order_of_k(kernels):
    a, b, d = torch.randn(16, 16).half(), torch.randn(16, 8).half(), torch.randn(16, 8)
    expected = d.clone()
    for k in range(16):
        expected += a[:, k, None].float() * b[k].float()
    kernels.run_mma_half(a, b, d, 1, 0)
    assert torch.equal(d, expected)


def test_misaligned_ldmatrix_is_reported(kernels):
    a, b, d = torch.zeros(16, 16).half(), torch.zeros(16, 8).half(), torch.zeros(16, 8)
    with pytest.raises(RuntimeError, match=r"ldmatrix_x4 at .*kernels.cu.* is not a multiple of 16"):
        kernels.run_mma_half(a, b, d, 0, 8)


def truncated_to_tf32(t):
    return (t.view(torch.int32) & ~0x1FFF).view(torch.float32)


def test_fragments_of_tf32_read_the_upper_19_bits(kernels):
    a, b = torch.randn(16, 8), torch.randn(8, 8)
    d = torch.zeros(16, 8)
    kernels.run_mma_tf32(a, b, d)
    expected = truncated_to_tf32(a).double() @ truncated_to_tf32(b).double()
    torch.testing.assert_close(d.double(), expected, rtol=1e-6, atol=1e-6)


def shuffled(lane, width, kind):
    segment = lane // width * width
    if kind == "index":
        return segment + 5 % width
    if kind == "xor":
        return lane ^ 6 if lane ^ 6 < segment + width else lane
    other = lane + 3 if kind == "down" else lane - 3
    return other if segment <= other < segment + width else lane


@pytest.mark.parametrize("width", [4, 8, 32])
def test_shuffles(kernels, width):
    given, out = torch.randint(100, (32,), dtype=torch.int32), torch.zeros(5, 32, dtype=torch.int32)
    kernels.run_shuffles(given, out, width)
    for row, kind in zip(out, ("index", "xor", "down", "up"), strict=False):
        assert row.tolist() == [given[shuffled(lane, width, kind)].item() for lane in range(32)], kind
    ballot = sum(1 << lane for lane in range(32) if given[lane] % 3 == 0)
    assert (out[4].long() & 0xFFFFFFFF).unique().tolist() == [ballot]


def hard_floats():
    """Random bit patterns, every half and bfloat16, and the midpoints between neighbours of either, and beside them."""
    random = torch.randint(-(2**31), 2**31, (200_000,)).to(torch.int32)
    half = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    half = half[half.isfinite()].sort().values
    middle = ((half[1:].double() + half[:-1].double()) / 2).float().view(torch.int32)
    bfloat16 = (torch.arange(65536, dtype=torch.int32) << 16) + 0x8000
    tf32 = (torch.randint(-(2**18), 2**18, (20_000,)).to(torch.int32) << 13) + 0x1000
    near = [t + step for t, step in itertools.product((middle, bfloat16, tf32), (-1, 0, 1))]
    limits = torch.tensor([65504.0, 65519.996, 65520.0, 3.4e38, float("inf"), float("nan"), 0.0, -0.0])
    return torch.cat([random, half.view(torch.int32), *near, limits.view(torch.int32)]).view(torch.float32)


def assert_same_values(ours, theirs, integer):
    assert torch.equal(ours.isnan(), theirs.isnan())
    numbers = ~ours.isnan()
    assert torch.equal(ours[numbers].view(integer), theirs[numbers].view(integer))


def test_rounding_to_half_types(kernels):
    given = hard_floats()
    count = given.numel()
    half, bfloat16 = torch.empty(count, dtype=torch.float16), torch.empty(count, dtype=torch.bfloat16)
    tf32 = torch.empty(count, dtype=torch.int32)
    kernels.run_float_to_half(given, half, bfloat16, tf32, count)
    assert_same_values(half, given.half(), torch.int16)
    assert_same_values(bfloat16, given.bfloat16(), torch.int16)
    for canonical in (half.view(torch.int16), bfloat16.view(torch.int16)):
        assert (canonical[given.isnan()] == 0x7FFF).all()
    # To nearest, ties away from zero, in exact arithmetic. 2^-136 is the unit of the subnormals.
    finite = given.isfinite()
    exact = given[finite].double()
    unit = torch.exp2((torch.frexp(exact).exponent - 11).clamp(min=-136).double())
    expected = exact.sign() * (exact.abs() / unit + 0.5).floor() * unit
    assert torch.equal(tf32[finite].view(torch.float32), expected.float())
    assert (tf32.view(torch.float32)[given.isnan()].isnan()).all()


def test_every_half_becomes_a_float(kernels):
    bits = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    half, bfloat16 = torch.empty(65536), torch.empty(65536)
    kernels.run_half_to_float(half, bfloat16)
    assert_same_values(half, bits.view(torch.float16).float(), torch.int32)
    assert_same_values(bfloat16, bits.view(torch.bfloat16).float(), torch.int32)


def test_intrinsics(kernels):
    assert [kernels.numbers(i) for i in range(7)] == [-1, 3, 1, 3, 2, 1, 0]


def test_launch_limits(kernels):
    out = torch.zeros(64)
    kernels.run_with_shared(out, 48 << 10, 32)
    with pytest.raises(RuntimeError, match="49153 bytes of dynamic shared memory, allowed are 49152"):
        kernels.run_with_shared(out, (48 << 10) + 1, 32)
    with pytest.raises(RuntimeError, match=r"cudaFuncSetAttribute: 102401 bytes .* the device has 102400"):
        kernels.opt_in(SHARED_LIMIT + 1)
    assert kernels.opt_in(SHARED_LIMIT) == 0
    kernels.run_with_shared(out, SHARED_LIMIT, 32)
    with pytest.raises(RuntimeError, match=r"invalid grid .* or block"):
        kernels.run_with_shared(out, 1 << 13, 1025)


def test_store_beyond_shared_memory_is_reported(kernels):
    with pytest.raises(RuntimeError, match="a store beyond the 128 bytes of dynamic shared memory"):
        kernels.run_store_shared(torch.zeros(32), 1)


def test_sanitizers_pass_what_is_right(sanitized):
    result = sanitized("k.run_sgemm(0, floats(70 * 45), floats(45 * 50), floats(70 * 50), 70, 50, 45)")
    assert result.returncode == 0 and result.stderr == "", result.stderr


def test_sanitizers_pass_what_follows_an_aborted_launch(sanitized):
    result = sanitized("""
k.run_divergent_exit(floats(128))
assert b"divergence" in k.last_error()
k.run_sgemm(0, floats(70 * 45), floats(45 * 50), floats(70 * 50), 70, 50, 45)""")
    assert result.returncode == 0 and result.stderr == "", result.stderr


@pytest.mark.parametrize(
    ("call", "kernel"),
    [
        ("k.run_store_shared(floats(32), 1)", "store_shared"),
        ("k.run_store_global(floats(32), 1)", "store_global"),
        ("k.run_store_global(floats(32), -1)", "store_global"),
        ("k.run_copies(0, floats(1023), floats(1024), 16)", "cp_async_wait"),
    ],
)
def test_address_sanitizer_names_a_planted_overrun(sanitized, call, kernel):
    result = sanitized(call)
    assert result.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in result.stderr, result.stderr
    assert kernel in result.stderr and "kernels.cu" in result.stderr, result.stderr
