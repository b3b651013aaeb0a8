"""What is kept and what is taken: autograd's saved tensors, no cache per shape, bounded workspaces, the peak of a step.

Memory is asserted, never time. The processes that are measured are fresh ones, with malloc told to give back what is
freed, so that resident memory is what is in use.
"""

import sys

import pytest
import torch
from covering import cover
from helpers import ACTIVATIONS, DEVICE, DTYPES, FORMATS, ROOT, expect_ok, laid_out, randn, run_python
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(ROOT))
from bench.harness import NETS, load_shapes
from conv1x1_ext import Conv1x1, conv1x1, conv1x1_avg_pool, explain

MIB = 1 << 20
CPU_ONLY = pytest.mark.cpu_only(reason="measures the process, or the CPU's workspaces")
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self")


def saved_by(function):
    """The result, and where each tensor lies that autograd keeps for the backward, with its bytes."""
    saved = []

    def pack(t):
        saved.append((t.data_ptr(), t.numel() * t.element_size()))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        return function(), saved


def places(*tensors):
    return sorted((t.data_ptr(), t.numel() * t.element_size()) for t in tensors)


@cover(activation=ACTIVATIONS, residual=(False, True), dtype=DTYPES, layout=FORMATS)
def test_autograd_saves_x_w_and_y_or_the_preactivation(activation, residual, dtype, layout):
    x, w, b = laid_out((2, 8, 6, 5), dtype, layout), randn((12, 8, 1, 1), dtype), randn((12,), dtype)
    r = laid_out((2, 12, 6, 5), dtype, layout) if residual else None
    for t in (x, w, b, r):
        if t is not None:
            t.requires_grad_()
    y, saved = saved_by(lambda: conv1x1(x, w, b, activation=activation, residual=r))
    if activation is None:
        assert sorted(saved) == places(x, w)
    elif activation in ("relu", "relu6"):
        assert sorted(saved) == places(x, w, y)
    else:  # torch's function keeps its input, the convolution's result, and y is no one's but the caller's
        rest = [s for s in saved if s not in places(x, w)]
        assert len(saved) == 3 and [size for _, size in rest] == [y.numel() * y.element_size()]
        assert rest != places(y)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
def test_average_pooling_saves_its_arguments_and_a_bit_for_each_output(activation, layout):
    x, w, b = laid_out((2, 8, 6, 5), torch.float32, layout), torch.randn(12, 8, 1, 1), torch.randn(12)
    tensors = [t.requires_grad_() for t in (x, w, b)]
    _, saved = saved_by(lambda: conv1x1_avg_pool(*tensors, activation=activation))
    bits = [size for place, size in saved if (place, size) not in places(*tensors)]
    masks = activation in ("relu", "relu6") and x.device.type == "cpu"  # CUDA kernels recompute
    assert bits == ([2 * 12 * 30 // 8 + 1] if masks else []) and len(saved) == 3 + len(bits)


def test_nothing_is_saved_without_a_gradient():
    x, w = torch.randn(1, 4, 3, 3), torch.randn(5, 4, 1, 1)
    assert saved_by(lambda: conv1x1(x, w, activation="relu"))[1] == []
    with torch.no_grad():
        assert saved_by(lambda: conv1x1(x, w.requires_grad_(), activation="relu"))[1] == []


# ---- workspaces ---------------------------------------------------------------------------------------------------


def workspace_bound(layer, dtype, direction, threads):
    """docs/architecture.md, "Memory": the packed weight, partial sums of a wgrad, and each thread's blocks."""
    element = 8 if dtype == torch.float64 else 4
    along, across = layer.c_in // layer.groups, layer.c_out // layer.groups
    if direction == "dgrad":
        along, across = across, along
    weight = 0 if direction == "wgrad" else element * layer.groups * along * (across + 16)
    shared = (2 * MIB * element + 512 * layer.c_out if direction == "wgrad" else 0) + 8 * layer.c_out
    return weight + shared + threads * (3 * MIB + 2 * MIB * element + 64 * 1024)


@CPU_ONLY
@pytest.mark.parametrize("direction", ["fprop", "dgrad", "wgrad"])
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_workspaces_are_bounded(dtype, layout, direction):
    """Over every layer of bench/shapes."""
    threads = 2
    torch.set_num_threads(threads)
    for layer in load_shapes(NETS, [1, 16, 64]):
        c, h, w = layer.c_in, layer.h, layer.w
        strides = (c * h * w, h * w, w, 1) if layout == "contiguous" else (c * h * w, 1, w * c, c)
        x = torch.empty_strided((layer.n, c, h, w), strides, dtype=dtype)  # never touched: no memory
        weight = torch.empty(layer.c_out, c // layer.groups, 1, 1, dtype=dtype)
        bias = torch.empty(layer.c_out, dtype=dtype)
        options = {"groups": layer.groups, "activation": "relu", "direction": direction}
        taken = int(explain(x, weight, bias, layer.stride, **options)["workspace_bytes"])
        bound = workspace_bound(layer, dtype, direction, threads)
        assert taken <= bound, f"{layer}: {taken} bytes, expected at most {bound}"


# ---- plans --------------------------------------------------------------------------------------------------------

DIRECTIONS = ["fprop", "dgrad", "wgrad", "avg_pool"]
# Results that no machine has the memory for: 4 TiB; on a GPU, whose grids are limited, 256 GiB.
HUGE_BATCH = 1 << (20 if DEVICE.type == "cpu" else 16)


def huge(dtype):
    """An input of one image's memory, whose output for 4096 channels is huge."""
    return randn((1, 64, 16, 16), dtype).expand(HUGE_BATCH, -1, -1, -1)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_explain_takes_no_memory_for_results(dtype, direction):
    x, w, b = huge(dtype), randn((4096, 64, 1, 1), dtype), randn((4096,), dtype)
    assert "kernel" in explain(x, w, b, activation="relu", direction=direction)


def test_explain_takes_no_memory_for_a_weights_gradient():
    x, w = torch.randn(1, 1024, 1, 1), torch.randn(1, 1024, 1, 1).expand(1 << 30, -1, -1, -1)
    assert "kernel" in explain(x, w, direction="wgrad")


@CPU_ONLY
def test_packing_a_weight_takes_no_memory_for_an_output():
    m = Conv1x1(64, 4096, dtype=torch.float16).eval()
    m.prepack(huge(torch.float16))
    assert m.prepacked
    x = randn((2, 64, 16, 16), torch.float16)
    with torch.no_grad():
        assert torch.equal(m(x), conv1x1(x, m.weight, m.bias))


@CPU_ONLY
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("layout", FORMATS)
def test_explain_allocates_nothing(layout, direction):
    x, w, b = laid_out((2, 8, 6, 5), torch.float32, layout), torch.randn(12, 8, 1, 1), torch.randn(12)
    r = laid_out((2, 12, 6, 5), torch.float32, layout)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        explain(x, w, b, activation="relu", residual=r, direction=direction)
    names = [event.name() for event in prof.profiler.kineto_results.events()]
    assert "conv1x1_ext::_explain" in names and "[memory]" not in names


@CPU_ONLY
@pytest.mark.parametrize("layout", FORMATS)
def test_explain_casts_nothing_under_autocast(layout):
    x, w, b = laid_out((2, 64, 6, 5), torch.float32, layout), torch.randn(128, 64, 1, 1), torch.randn(128)
    cast = explain(x.bfloat16(), w.bfloat16(), b.bfloat16())
    with profile(activities=[ProfilerActivity.CPU]) as prof, torch.autocast("cpu", torch.bfloat16):
        plan = explain(x, w, b)
    assert plan == cast
    assert not {"aten::copy_", "aten::_to_copy"} & {event.key for event in prof.key_averages()}


# ---- processes ----------------------------------------------------------------------------------------------------

# Freed blocks go back to the system at once, whatever their size, and there is one arena.
ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_TOP_PAD_": "0", "CONV1X1_TEST_DEVICE": "cpu",
}  # fmt: skip

SHAPES = """
import ctypes, gc, random, torch, conv1x1_ext
random.seed(1)
trim = ctypes.CDLL(None).malloc_trim

def resident():
    gc.collect()
    trim(0)
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmRSS")).split()[1]) << 10

def step(c_in, c_out, h, w, stride, layout):
    x = torch.randn(2, c_in, h, w).contiguous(memory_format=layout).requires_grad_()
    weight, bias = torch.randn(c_out, c_in, 1, 1, requires_grad=True), torch.randn(c_out, requires_grad=True)
    y = conv1x1_ext.conv1x1(x, weight, bias, stride, activation="relu")
    conv1x1_ext.conv1x1_avg_pool(y, torch.randn(8, c_out, 1, 1)).sum().backward()

def steps(count):
    for _ in range(count):
        step(random.randrange(64, 320), random.randrange(64, 320), random.randrange(3, 30), random.randrange(3, 30),
             random.randrange(1, 4), random.choice([torch.contiguous_format, torch.channels_last]))

steps(60)
before = resident()
steps(200)
print(resident() - before)
"""


@CPU_ONLY
@LINUX
def test_many_shapes_do_not_grow_the_process():
    """200 shapes, never one twice: a packed weight kept for each would be some 30 MiB, an output some 75."""
    grown = int(expect_ok(run_python(SHAPES, **ENVIRONMENT)))
    assert grown < 8 * MIB, f"{grown / MIB:.1f} MiB"


STEP = """
import os, resource, torch, torch.nn.functional as F, conv1x1_ext
dtype, layout = torch.{dtype}, torch.{layout}
n, c_in, c_out, size = 16, 64, 256, 56

def kib(field):
    return int(next(l for l in open("/proc/self/status") if l.startswith(field)).split()[1])

def normal(*shape):
    return torch.randn(shape).to(dtype).contiguous(memory_format=layout)

def measure(forward):
    x = normal(n, c_in, size, size).requires_grad_()
    w = (normal(c_out, c_in, 1, 1) * 0.1).requires_grad_()
    b, dy = torch.randn(c_out).to(dtype).requires_grad_(), normal(n, c_out, size, size)

    def step(x):
        torch.autograd.grad(forward(x, w, b), (x, w, b), dy[: x.shape[0]])

    step(x.detach()[:1].requires_grad_())  # whatever is made once
    try:
        open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
        before = kib("VmRSS")
        step(x)
        return (kib("VmHWM") - before) << 10
    except OSError:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        step(x)
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10

for who, forward in (
    ("ours", lambda x, w, b: conv1x1_ext.conv1x1(x, w, b, activation="relu")),
    ("stock", lambda x, w, b: F.relu(F.conv2d(x, w, b))),
    ("stock_in_place", lambda x, w, b: F.relu(F.conv2d(x, w, b), inplace=True)),
):
    child = os.fork()  # nothing has been computed yet
    if child == 0:
        print(who, measure(forward), flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


@CPU_ONLY
@LINUX
@cover(1, dtype=("float32", "bfloat16"), layout=("contiguous_format", "channels_last"))
def test_a_training_step_peaks_below_stock(dtype, layout):
    """16 x 64 -> 256, 56x56, forward and backward: even below stock with its ReLU in place, as ours makes no dz."""
    lines = expect_ok(run_python(STEP.format(dtype=dtype, layout=layout), **ENVIRONMENT)).splitlines()
    peak = {who: int(size) for who, size in map(str.split, lines)}
    print({who: f"{p / MIB:.1f} MiB" for who, p in peak.items()})
    y = 16 * 256 * 56 * 56 * (4 if dtype == "float32" else 2)
    dx = y // 4
    assert y < peak["ours"] < min(peak["stock"], peak["stock_in_place"])
    assert peak["ours"] < y + dx + 16 * MIB  # and workspaces: about 2 MiB; pages may be rounded up to huge ones
