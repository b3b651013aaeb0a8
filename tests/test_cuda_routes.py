"""CUDA tensors on their way to the kernels, as far as it goes without a GPU: fake tensors, flags, errors."""

import itertools
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import conv1x1_ext
from conv1x1_ext import _eager, conv1x1, conv1x1_avg_pool

CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
BUILT = not conv1x1_ext.build_info()["cuda_archs"].startswith("none")
GPU = torch.cuda.is_available()


# ---- TF32 ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def precision():
    """torch's settings of float32 precision, put back afterwards; the old property last, as it sets several."""
    getter, setter = torch._C._get_fp32_precision_getter, torch._C._set_fp32_precision_setter
    places = [("generic", "all"), ("cuda", "all"), ("cuda", "conv"), ("cuda", "rnn")]
    before = [getter(*place) for place in places]
    yield setter
    for place, value in zip(places, before, strict=True):
        setter(*place, value)
    torch.backends.cudnn.allow_tf32 = before[2] == "tf32"
    assert _eager.conv_uses_tf32() is (before[2] == "tf32")


@pytest.mark.parametrize("value", [True, False])
def test_tf32_by_the_old_property(precision, value):
    torch.backends.cudnn.allow_tf32 = value
    assert _eager.conv_uses_tf32() is value


@pytest.mark.parametrize("conv,cudnn,generic", list(itertools.product(("ieee", "tf32", "none"), repeat=3)))
def test_tf32_by_the_new_settings(precision, conv, cudnn, generic):
    for place, value in ((("generic", "all"), generic), (("cuda", "all"), cudnn), (("cuda", "conv"), conv)):
        precision(*place, value)
    decides = next((value for value in (conv, cudnn, generic) if value != "none"), "none")
    assert _eager.conv_uses_tf32() is (decides == "tf32")


def test_tf32_where_the_old_property_raises(precision):
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    with pytest.raises(RuntimeError):
        _ = torch.backends.cudnn.allow_tf32
    assert _eager.conv_uses_tf32() is False


def test_only_float32_cuda_tensors_ask(monkeypatch):
    asked = []
    monkeypatch.setattr(_eager, "conv_uses_tf32", lambda: asked.append(1) or True)
    assert not _eager.allow_tf32(torch.empty(1, device="cpu"))
    with FakeTensorMode():
        for dtype in (torch.float64, torch.bfloat16, torch.float16):
            assert not _eager.allow_tf32(torch.empty(1, dtype=dtype, device="cuda"))
        assert not asked
        assert _eager.allow_tf32(torch.empty(1, device="cuda"))


def test_compiling_does_not_break_on_tf32(precision):
    """The answer is that of the trace: Dynamo has no guard for it."""

    def f(x):
        return x + _eager.conv_uses_tf32()

    torch._dynamo.reset()
    torch.backends.cudnn.allow_tf32 = True
    assert torch.compile(f, backend="eager", fullgraph=True)(torch.zeros(1)).item() == 1


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "conv1x1_ext":
            self.seen.append((func._opname, args))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("allowed", [True, False])
def test_operators_are_told(precision, allowed):
    torch.backends.cudnn.allow_tf32 = allowed
    with FakeTensorMode(), Calls() as calls:
        x, w = torch.empty(2, 4, 5, 5, device="cuda"), torch.empty(6, 4, 1, 1, device="cuda")
        conv1x1(x, w, activation="relu")
        conv1x1_avg_pool(x, w)
        conv1x1(x.double(), w.double())
    told = [[a for a in args if isinstance(a, bool)] for _, args in calls.seen]
    assert [name for name, _ in calls.seen] == ["conv1x1", "conv1x1_avg_pool", "conv1x1"]
    assert told == [[allowed], [allowed], [False]]


@pytest.mark.parametrize("tf32", [0, _eager.TF32])
@pytest.mark.parametrize("activation", _eager.ACTIVATIONS)
def test_config_carries_it(activation, tf32):
    config = _eager.make_config(activation, (2, 3), 2, 2) | tf32
    # Quarters, whose products and sums TF32 holds exactly: where it is used, it makes no difference.
    x, w = (torch.randint(-8, 9, shape) / 4 for shape in ((2, 4, 7, 7), (6, 2, 1, 1)))
    expected = ([2, 3], 2, _eager.activation_name(activation), bool(tf32))
    assert _eager.decode_config(config, w) == expected
    stock = _eager.apply_activation(F.conv2d(x, w, None, (2, 3), groups=2), activation)
    torch.testing.assert_close(_eager._fprop(x, w, None, None, config), stock, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(
    not GPU or not BUILT or torch.cuda.get_device_capability() < (8, 0),
    reason="needs a GPU with TF32 and a library with CUDA kernels",
)
@pytest.mark.parametrize("allowed", [True, False])
def test_config_alone_decides(precision, allowed):
    """Not torch's setting, which the caller has looked at. TF32 rounds 1 + 2^-12 to 1."""
    torch.backends.cudnn.allow_tf32 = not allowed
    x, w = torch.full((2, 4, 8, 8), 1 + 2**-12, device="cuda"), torch.ones(6, 4, 1, 1, device="cuda")
    y = _eager._fprop(x, w, None, None, _eager.make_config(None, 1, 1, 2) | allowed * _eager.TF32)
    assert (y == (4.0 if allowed else 4 + 2**-10)).all()


@pytest.mark.parametrize("config", [0, -1, 1 << 34 | 6, 1 << 34 | 7, 1 << 34 | 15])
def test_config_from_elsewhere(config):
    with pytest.raises(RuntimeError, match="config: expected one made by conv1x1_ext"):
        _eager._fprop(torch.randn(1, 2, 3, 3), torch.randn(2, 2, 1, 1), None, None, config)


# ---- fake CUDA tensors --------------------------------------------------------------------------------------------


LAYOUTS = ("dense", "channels_last", "transposed")


def strides(shape, layout):
    if layout == "dense":
        return torch.empty(shape, device="meta").stride()
    if layout == "channels_last" and len(shape) > 3:
        format = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
        return torch.empty(shape, device="meta", memory_format=format).stride()
    order = [1, 0, *range(2, len(shape))]  # "transposed": batch and channels
    base = torch.empty([shape[i] for i in order], device="meta")
    return base.transpose(0, 1).stride()


def fake(shape, layout, dtype=torch.float32):
    return torch.empty_strided(shape, strides(shape, layout), dtype=dtype, device="cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("spatial", [1, 2, 3])
@pytest.mark.parametrize("weight_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_output_strides_are_cudnns(layout, weight_layout, spatial, dtype):
    with FakeTensorMode():
        x = fake([2, 4] + [5] * spatial, layout, dtype)
        w = fake([6, 4] + [1] * spatial, weight_layout, dtype)
        y = conv1x1(x, w, stride=2)
        last = spatial > 1 and "channels_last" in (layout, weight_layout) and dtype != torch.float64
        expected = strides([2, 6] + [3] * spatial, "channels_last" if last else "dense")
        assert y.device.type == "cuda" and y.dtype == dtype
        assert y.stride() == expected
        if torch.version.cuda and dtype in (torch.float32, torch.float64):  # for half types torch asks the GPU
            assert y.stride() == getattr(F, f"conv{spatial}d")(x, w, None, 2).stride()
        empty = conv1x1(fake([0, 4] + [5] * spatial, layout, dtype), w, stride=2)
        assert empty.stride() == strides([0, 6] + [3] * spatial, "dense")


@pytest.mark.parametrize("layout", ["dense", "channels_last"])
def test_fake_gradients(layout):
    """By the operators: autograd's engine does not know fake devices."""
    with FakeTensorMode():
        x, w, y = fake([2, 4, 5, 5], layout), fake([6, 4, 1, 1], "dense"), fake([2, 6, 5, 5], layout)
        dx, dw, dbias, dz = torch.ops.conv1x1_ext.conv1x1_backward(y, x, w, y, [1], 1, "relu", True, *[True] * 4)
        for gradient, of in ((dx, x), (dw, w), (dz, y)):
            assert gradient.device == of.device and gradient.shape == of.shape and gradient.stride() == of.stride()
        assert dbias.device == x.device and dbias.shape == (6,)
        dx, dw, dbias = torch.ops.conv1x1_ext.conv1x1_avg_pool_backward(
            torch.empty(2, 6, device="cuda"), x, w, None, 1, "relu", True, True, True, False
        )
        assert dx.stride() == x.stride() and dw.stride() == w.stride() and dbias is None


def test_fake_errors_name_the_device():
    with FakeTensorMode():
        x, w = torch.empty(2, 4, 5, 5, device="cuda"), torch.empty(6, 4, 1, 1, device="cpu")
        with pytest.raises(RuntimeError, match="weight: expected the input's device cuda:0, got cpu"):
            torch.ops.conv1x1_ext.conv1x1(x, w, None, None, [1], 1, "none", True)
        w = torch.empty(6, 4, 1, 1, device="cuda:1")
        with pytest.raises(RuntimeError, match="weight: expected the input's device cuda:0, got cuda:1"):
            torch.ops.conv1x1_ext.conv1x1(x, w, None, None, [1], 1, "none", True)


# ---- the kernels' door --------------------------------------------------------------------------------------------

# On the CPU whatever the default device is.
X, W = torch.randn(1, 2, 3, 3, device="cpu"), torch.randn(2, 2, 1, 1, device="cpu")
NO_PANELS = torch.empty(0, dtype=torch.uint8, device="cpu")
DOORS = {
    "conv1x1": (X, W, None, None, [1], 1, "none", True),
    "conv1x1_backward": (X, X, W, None, [1], 1, "none", True, True, True, True, True),
    "conv1x1_avg_pool": (X, W, None, 1, "relu", True),
    "conv1x1_avg_pool_backward": (X[..., 0, 0], X, W, None, 1, "relu", True, True, True, True),
    "_fprop": (X, W, None, None, _eager.make_config(None, 1, 1, 2)),
    "_pack_weight": (X, W, _eager.make_config(None, 1, 1, 2)),
    "_fprop_packed": (X, W, NO_PANELS, None, None, _eager.make_config(None, 1, 1, 2)),
    "_backward": (X, X, W, None, _eager.make_config(None, 1, 1, 2), 7),
    "_avg_pool": (X, W, None, _eager.make_config("relu", 1, 1, 2)),
    "_avg_pool_masked": (X, W, None, _eager.make_config("relu", 1, 1, 2)),
    "_avg_pool_backward": (X[..., 0, 0], X, W, None, None, _eager.make_config("relu", 1, 1, 2), 7),
    "_explain": (X, W, None, None, [1], 1, "none", True, "fprop"),
}


@pytest.mark.parametrize("name", DOORS)
def test_every_cpu_operator_has_a_cuda_kernel_or_says_why_not(name):
    """The dispatcher's CUDA entry, called with CPU tensors: what it says does not depend on a GPU."""
    op = getattr(torch.ops.conv1x1_ext, name).default
    assert torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CPU")
    assert torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CUDA")
    message = "a CUDA tensor in a CUDA kernel" if BUILT else r"built without CUDA kernels\. .*FORCE_CUDA=1"
    with pytest.raises(RuntimeError, match=f"^conv1x1: input: expected .*{message}"):
        op.redispatch(CUDA, *DOORS[name])


def test_build_info_says_what_is_there():
    info = conv1x1_ext.build_info()
    assert set(info) >= {"cuda_archs", "nvcc", "torch_cuda", "cuda_devices"}
    assert (info["nvcc"] != "none") is BUILT
    assert info["torch_cuda"] == (torch.version.cuda or "none: this torch has no CUDA")
    assert (info["cuda_devices"] != "none") is GPU


def test_importing_starts_no_cuda():
    code = (
        "import torch, conv1x1_ext; conv1x1_ext.Conv1x1(2, 3)(torch.randn(1, 2, 3, 3));"
        "print(torch.cuda.is_initialized())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
