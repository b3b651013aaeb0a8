"""y and dx: the same bits for any thread count, batch and alignment. dw and dbias: for any thread count."""

import itertools
import threading

import pytest
import torch
from helpers import ACTIVATIONS, DTYPES, FORMATS, Case, expect_ok, laid_out, randn, run_python, same_bits, weight_of
from test_isa import isas

import conv1x1_ext

pytestmark = pytest.mark.cpu_only(reason="CUDA promises equal bits from run to run: tests/test_cuda.py")
THREADS = (1, 2, 3, 5)
CASES = [
    Case(4, 64, 96, (20, 20)),
    Case(3, 130, 70, (13, 17), 2),
    Case(5, 257, 129, (7, 7)),
    Case(2, 48, 96, (24, 24), 1, 4),
    Case(6, 64, 64, (15, 15), 3, 2),
    Case(64, 200, 100, (1, 1)),
    Case(3, 40, 48, (300,)),
    Case(2, 40, 48, (6, 9, 11), 2),
]


def tensors(case, dtype, layout):
    return (
        laid_out(case.x_shape, dtype, layout), weight_of(case.w_shape, dtype), randn((case.c_out,), dtype),
        laid_out(case.y_shape, dtype, layout), laid_out(case.y_shape, dtype, layout),
    )  # fmt: skip


def run(case, x, w, b, r, dy, activation="relu"):
    """y, dx, dw, dbias and the residual's gradient."""
    leaves = [t.detach().requires_grad_() for t in (x, w, b, r)]
    kwargs = {"groups": case.groups, "activation": activation, "residual": leaves[3]}
    y = conv1x1_ext.conv1x1(*leaves[:3], case.stride, **kwargs)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def all_same(a, b):
    return [same_bits(p, q) for p, q in zip(a, b, strict=True)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_any_thread_count(case, layout, dtype):
    operands = tensors(case, dtype, layout)
    results = []
    for threads in THREADS:
        torch.set_num_threads(threads)
        results.append(run(case, *operands))
    for threads, result in zip(THREADS[1:], results[1:], strict=True):
        assert all(all_same(results[0], result)), (threads, all_same(results[0], result))


def test_the_cases_do_use_several_threads():
    """Or the test above would prove nothing."""
    torch.set_num_threads(5)
    x, w, *_ = tensors(CASES[0], torch.float32, "contiguous")
    for direction in ("fprop", "dgrad", "wgrad", "avg_pool"):
        used = {}
        for threads in (1, 5):
            torch.set_num_threads(threads)
            used[threads] = int(conv1x1_ext.explain(x, w, direction=direction)["threads"].split()[0])
        assert used[1] == 1 and used[5] > 1, (direction, used)


SHARED = [
    ("channels_last", Case(4, 64, 96, (12, 12))), ("channels_last", Case(4, 64, 64, (12, 12))),
    ("channels_last", Case(4, 1024, 640, (12, 12))), ("contiguous", Case(4, 1024, 2048, (7, 7), 1, 2)),
]  # fmt: skip


@pytest.mark.parametrize("layout,case", SHARED, ids=str)
def test_what_threads_share(layout, case):
    """Panels of a large weight, which all threads pack together before any of them reads them; and the tiles of dw cut
    along both sides, of whose panels one thread alone sums dbias."""
    operands = tensors(case, torch.float32, layout)
    results = []
    for threads in (1, 2, 3, 4, 6, 8):
        torch.set_num_threads(threads)
        results.append(run(case, *operands))
    assert all(all(all_same(results[0], r)) for r in results)


def test_those_cases_do_share():
    if conv1x1_ext.build_info()["isa"] == "avx512_amx":
        pytest.skip("these are plans of the other kernels")
    seen = set()
    for (layout, case), threads in itertools.product(SHARED, (2, 3, 4, 6, 8)):
        torch.set_num_threads(threads)
        x, w, *_ = tensors(case, torch.float32, layout)
        plans = {d: conv1x1_ext.explain(x, w, groups=case.groups, direction=d) for d in ("fprop", "dgrad", "wgrad")}
        seen |= {(side, case.groups) for side in "AB" for p in plans.values() if p[side].startswith("packed once")}
        if "B dz" in plans["wgrad"]["gemm"] and ", m 1," not in plans["wgrad"]["threads"]:
            seen.add("dw cut")
    assert {("A", 2), ("B", 1), "dw cut"} <= seen


@pytest.mark.parametrize("layout", FORMATS)
def test_k_slices_of_the_weight_gradient(layout):
    """Enough pixels for several slices of k, whose partial sums are joined in a fixed order."""
    case = Case(4, 24, 40, (64, 64))
    operands = tensors(case, torch.float32, layout)
    slices = conv1x1_ext.explain(operands[0], operands[1], direction="wgrad")["k_slices"].split()[0]
    assert int(slices) > 1
    results = []
    for threads in THREADS:
        torch.set_num_threads(threads)
        results.append(run(case, *operands))
    assert all(all(all_same(results[0], r)) for r in results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_sample_alone_or_in_a_batch(case, layout, dtype):
    x, w, b, r, dy = tensors(case, dtype, layout)
    y, dx, *_ = run(case, x, w, b, r, dy)
    for i in {0, case.n // 2, case.n - 1}:
        part = slice(i, i + 1)
        y1, dx1, *_ = run(case, x[part], w, b, r[part], dy[part])
        assert same_bits(y[part], y1) and same_bits(dx[part], dx1), i
        y0, dx0, *_ = run(case, x[i], w, b, r[i], dy[i])
        assert same_bits(y[i], y0) and same_bits(dx[i], dx0), i
    two = slice(case.n - 2, case.n)
    y2, dx2, *_ = run(case, x[two], w, b, r[two], dy[two])
    assert same_bits(y[two], y2) and same_bits(dx[two], dx2)


@pytest.mark.parametrize("batch", [1, 2, 3, 8, 33])
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_batch_sizes(activation, layout, batch):
    """7x7 images: tiles span images, and which images share a tile must not matter."""
    x, w = laid_out((33, 36, 7, 7), torch.float32, layout), weight_of((80, 36, 1, 1), torch.float32)
    whole = conv1x1_ext.conv1x1(x, w, activation=activation)
    assert same_bits(whole[:batch], conv1x1_ext.conv1x1(x[:batch], w, activation=activation))
    assert same_bits(whole[-batch:], conv1x1_ext.conv1x1(x[-batch:], w, activation=activation))


def moved(t, offset):
    """A copy of a dense tensor that starts `offset` elements into its storage."""
    storage = torch.empty(t.numel() + offset, dtype=t.dtype)
    return storage[offset:].as_strided(t.shape, t.stride(), storage_offset=offset).copy_(t)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("case", CASES[:4], ids=str)
def test_any_alignment(case, layout, dtype):
    operands = tensors(case, dtype, layout)
    expected = run(case, *operands)
    for offset in (1, 3, 5, 8, 15):
        assert all(all_same(expected, run(case, *(moved(t, offset) for t in operands)))), offset


@pytest.mark.parametrize("layout", FORMATS)
def test_again_and_again(layout):
    operands = tensors(CASES[0], torch.float32, layout)
    torch.set_num_threads(3)
    first = run(CASES[0], *operands)
    assert all(all(all_same(first, run(CASES[0], *operands))) for _ in range(5))


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_avg_pool_any_thread_count_and_batch(activation, layout):
    x, w = laid_out((5, 64, 21, 19), torch.float32, layout), weight_of((96, 64, 1, 1), torch.float32)
    b = randn((96,), torch.float32)
    results = []
    for threads in THREADS:
        torch.set_num_threads(threads)
        leaves = [t.detach().requires_grad_() for t in (x, w, b)]
        y = conv1x1_ext.conv1x1_avg_pool(*leaves, activation=activation)
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), leaves)])
    assert all(all(all_same(results[0], r)) for r in results[1:])
    for i in range(5):
        assert same_bits(conv1x1_ext.conv1x1_avg_pool(x[i], w, b, activation=activation), results[0][0][i])


def in_threads(count, function):
    results, errors = [None] * count, []

    def body(i):
        try:
            results[i] = function(i)
        except BaseException as error:
            errors.append(error)

    workers = [threading.Thread(target=body, args=(i,)) for i in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not errors, errors
    return results


@pytest.mark.parametrize("layout", FORMATS)
def test_from_a_fresh_python_thread(layout):
    operands = tensors(CASES[0], torch.float32, layout)
    torch.set_num_threads(3)
    expected = run(CASES[0], *operands)
    (result,) = in_threads(1, lambda _: run(CASES[0], *operands))
    assert all(all_same(expected, result))
    (text,) = in_threads(1, lambda _: conv1x1_ext.explain(*operands[:2])["threads"])
    assert text.split()[0] == conv1x1_ext.explain(*operands[:2])["threads"].split()[0]


def test_thread_count_is_heard_by_a_fresh_python_thread():
    code = """
import threading, torch, conv1x1_ext
x, w = torch.randn(8, 64, 32, 32), torch.randn(64, 64, 1, 1)
torch.set_num_threads(3)
seen = []
def body():
    conv1x1_ext.conv1x1(x, w)
    seen.append(conv1x1_ext.explain(x, w)["threads"].split()[0])
t = threading.Thread(target=body); t.start(); t.join()
assert seen == ["3"], seen
"""
    expect_ok(run_python(code))


@pytest.mark.parametrize("layout", FORMATS)
def test_concurrent_python_threads(layout):
    torch.set_num_threads(2)
    operands = [tensors(case, torch.float32, layout) for case in CASES[:4]]
    expected = [run(case, *o) for case, o in zip(CASES, operands, strict=False)]

    def body(i):
        return [all(all_same(expected[j], run(CASES[j], *operands[j]))) for j in ((i + k) % 4 for k in range(8))]

    assert all(all(r) for r in in_threads(4, body))


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512", "avx512_bf16", "avx512_amx"])
def test_every_instruction_set(isa):
    code = """
import torch, test_determinism as t
from covering import rows_of
factors = {"case": t.CASES[:5], "layout": t.FORMATS, "dtype": (torch.float32, torch.float64, torch.bfloat16)}
for case, layout, dtype in rows_of(factors):
    t.test_any_thread_count(case, layout, dtype)
    t.test_a_sample_alone_or_in_a_batch(case, layout, dtype)
"""
    if isa not in isas():
        pytest.skip(f"this CPU does not run {isa}")
    expect_ok(run_python(code, CONV1X1_ISA=isa))
