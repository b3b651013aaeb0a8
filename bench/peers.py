"""The candidates of bench/op.py: ours and what it is compared with, each computing relu(conv1x1(x, w) + b).

A peer gets a ``Case`` (one layer's tensors, shared by all) and prepares a callable that takes no arguments, so that
what is timed is the call alone: weights are converted, prepacked or compiled before. ``outputs`` turns what the
callable returned into tensors of nn.Conv2d's shape; only the check before timing uses it. Forward peers run in
inference mode; training peers run the forward and all three gradients from a given dy.

"Native" layout means that x arrives and y leaves in it, without copies that the peer does not make itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import conv1x1_ext
from bench.harness import DTYPES, Layer


@dataclass
class Case:
    """One layer's tensors, made from a fixed seed. NHWC means torch.channels_last."""

    layer: Layer
    dtype: str
    threads: int
    x: Tensor = field(init=False)
    w: Tensor = field(init=False)
    b: Tensor = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        layer, dtype = self.layer, DTYPES[self.dtype]

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, dtype=dtype)

        self.x = normal(layer.n, layer.c_in, layer.h, layer.w)
        fan_in = layer.c_in // layer.groups
        self.w = normal(layer.c_out, fan_in, 1, 1) * fan_in**-0.5
        self.b = normal(layer.c_out)

    @functools.cached_property
    def x_nhwc(self) -> Tensor:
        return self.x.contiguous(memory_format=torch.channels_last)

    @functools.cached_property
    def w_nhwc(self) -> Tensor:
        return self.w.contiguous(memory_format=torch.channels_last)

    @functools.cached_property
    def dy(self) -> Tensor:
        """The gradient handed in; zero where rounding decides whether ReLU lets it through, so that all masks agree."""
        z = F.conv2d(self.x, self.w, self.b, self.layer.stride, groups=self.layer.groups)
        dy = torch.randn(z.shape, generator=torch.Generator().manual_seed(2), dtype=z.dtype)
        return dy.masked_fill_(z.abs() < 1e-4, 0)

    @functools.cached_property
    def dy_nhwc(self) -> Tensor:
        return self.dy.contiguous(memory_format=torch.channels_last)

    def tensors(self, layout: str) -> tuple[Tensor, Tensor, Tensor]:
        """x and w in that layout, and b."""
        return (self.x, self.w, self.b) if layout == "NCHW" else (self.x_nhwc, self.w_nhwc, self.b)


Call = Callable[[], Any]
Outputs = Callable[[Any], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Peer:
    """One candidate. ``prepare`` gives the callable to time and the reader of its result."""

    name: str
    layout: str
    prepare: Callable[[Case], tuple[Call, Outputs]]
    unavailable: Callable[[Case], str | None] = lambda case: None
    """Why this case cannot be run, or None."""

    @property
    def key(self) -> str:
        return f"{self.name} {self.layout}"


def _single(y: Tensor) -> tuple[Tensor, ...]:
    return (y,)


def _only_matrices(case: Case) -> str | None:
    if case.layer.groups != 1:
        return "one group only"
    return "stride 1 only" if case.layer.stride != 1 else None


def _ours(layout: str) -> Callable[[Case], tuple[Call, Outputs]]:
    def prepare(case: Case) -> tuple[Call, Outputs]:
        (x, w, b), layer = case.tensors(layout), case.layer
        stride, groups = layer.stride, layer.groups
        return lambda: conv1x1_ext.conv1x1(x, w, b, stride, groups=groups, activation="relu"), _single

    return prepare


def _prepacked_layer(case: Case, layout: str) -> conv1x1_ext.Conv1x1Act:
    layer = case.layer
    x, w, b = case.tensors(layout)
    with torch.inference_mode(False), torch.no_grad():  # an inference tensor's weight cannot be prepacked
        module = conv1x1_ext.Conv1x1Act(
            layer.c_in, layer.c_out, 1, layer.stride, groups=layer.groups, dtype=DTYPES[case.dtype], activation="relu"
        )
        module.load_state_dict({"weight": w, "bias": b})
        module.eval().prepack(x)
    return module


def _ours_prepacked(layout: str) -> Callable[[Case], tuple[Call, Outputs]]:
    """As a model in evaluation calls it: a module with its weight packed beforehand."""

    def prepare(case: Case) -> tuple[Call, Outputs]:
        module, x = _prepacked_layer(case, layout), case.tensors(layout)[0]
        return lambda: module(x), _single

    return prepare


def _prepacked_unavailable(layout: str) -> Callable[[Case], str | None]:
    def reason(case: Case) -> str | None:
        packs = _prepacked_layer(case, layout).prepacked
        return None if packs else "prepack packs nothing: the kernels read this weight as it lies, or it is too small"

    return reason


def _stock(layout: str) -> Callable[[Case], tuple[Call, Outputs]]:
    def prepare(case: Case) -> tuple[Call, Outputs]:
        (x, w, b), layer = case.tensors(layout), case.layer
        stride, groups = layer.stride, layer.groups
        return lambda: F.relu(F.conv2d(x, w, b, stride, groups=groups)), _single

    return prepare


def _linear(case: Case) -> tuple[Call, Outputs]:
    x, w, b = case.x_nhwc.permute(0, 2, 3, 1), case.w.flatten(1), case.b
    return lambda: F.linear(x, w, b).relu_(), lambda y: (y.permute(0, 3, 1, 2),)


def _baddbmm(case: Case) -> tuple[Call, Outputs]:
    layer, x = case.layer, case.x.flatten(2)
    w = case.w.flatten(1).expand(layer.n, -1, -1)
    b = case.b[:, None]
    return lambda: torch.baddbmm(b, w, x).relu_(), lambda y: (y.unflatten(2, (layer.h, layer.w)),)


def _onednn(layout: str) -> Callable[[Case], tuple[Call, Outputs]]:
    """What torch.compile's frozen graphs call: private, the weight in oneDNN's own order beforehand.

    Given NCHW it returns y in NHWC, which spares it half of the reordering: counted in its favour.
    """

    def prepare(case: Case) -> tuple[Call, Outputs]:
        (x, w, b), stride, groups = case.tensors(layout), [case.layer.stride] * 2, case.layer.groups
        reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
        packed = reorder(w.to_mkldnn(), [0, 0], stride, [1, 1], groups, list(x.shape))
        op = torch.ops.mkldnn._convolution_pointwise.default
        return lambda: op(x, packed, b, [0, 0], stride, [1, 1], groups, "relu", [], ""), _single

    return prepare


def _onednn_unavailable(case: Case) -> str | None:
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_convolution_pointwise"):
        return "this torch has no oneDNN, or not its private fused operator"
    supported = {
        "float32": lambda: True,
        "bfloat16": torch.ops.mkldnn._is_mkldnn_bf16_supported,
        "float16": torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    known = case.dtype in supported and supported[case.dtype]()
    return None if known else f"oneDNN has no {case.dtype} on this CPU"


def _onnxruntime(case: Case) -> tuple[Call, Outputs]:
    """A Conv and a Relu, fused by its optimiser; input bound once, output from its arena, as a served model runs."""
    import onnxruntime  # type: ignore[import-untyped]
    from onnx import TensorProto, helper, numpy_helper

    stride, groups = [case.layer.stride] * 2, case.layer.groups
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "w", "b"], ["z"], kernel_shape=[1, 1], strides=stride, group=groups),
            helper.make_node("Relu", ["z"], ["y"]),
        ],
        "conv_relu",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, case.x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(case.w.numpy(), "w"), numpy_helper.from_array(case.b.numpy(), "b")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = case.threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Spin between calls, as by default, but no longer than OpenMP's threads do: 30 ms would disturb the next sample.
    options.add_session_config_entry("session.intra_op.spin_duration_us", "2000")
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    binding.bind_cpu_input("x", case.x.numpy())
    binding.bind_output("y", "cpu")
    run = session.run_with_iobinding
    return lambda: run(binding), lambda _: (torch.from_numpy(binding.copy_outputs_to_cpu()[0]),)


def _onnxruntime_unavailable(case: Case) -> str | None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as error:
        return str(error)
    return None if case.dtype == "float32" else f"its CPU convolution has no {case.dtype}"


def _compiled(layout: str) -> Callable[[Case], tuple[Call, Outputs]]:
    """torch.compile (Inductor) of conv + ReLU modules, frozen: the weight is a constant that it may prepack."""

    def prepare(case: Case) -> tuple[Call, Outputs]:
        import torch._dynamo
        import torch._inductor.config as config

        torch._dynamo.reset()  # so that this layer's guards are not checked after those of all layers before
        layer, (x, w, b) = case.layer, case.tensors(layout)
        conv = torch.nn.Conv2d(layer.c_in, layer.c_out, 1, layer.stride, groups=layer.groups, dtype=x.dtype)
        conv.weight, conv.bias = torch.nn.Parameter(w), torch.nn.Parameter(b)
        model = torch.compile(torch.nn.Sequential(conv, torch.nn.ReLU()).eval(), dynamic=False)
        with config.patch(freezing=True):
            model(x)
        return lambda: model(x), _single

    return prepare


def _train(
    layout: str, function: Callable[[Tensor, Tensor, Tensor, Layer], Tensor]
) -> Callable[[Case], tuple[Call, Outputs]]:
    def prepare(case: Case) -> tuple[Call, Outputs]:
        x, w, b = (t.clone(memory_format=torch.preserve_format).requires_grad_() for t in case.tensors(layout))
        dy, layer = case.dy if layout == "NCHW" else case.dy_nhwc, case.layer

        def step() -> tuple[Tensor, ...]:
            y = function(x, w, b, layer)
            return y, *torch.autograd.grad(y, (x, w, b), dy)

        return step, tuple

    return prepare


def _train_linear(case: Case) -> tuple[Call, Outputs]:
    x = case.x_nhwc.permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format).requires_grad_()
    w, b = case.w.flatten(1).clone().requires_grad_(), case.b.clone().requires_grad_()
    dy = case.dy_nhwc.permute(0, 2, 3, 1)

    def step() -> tuple[Tensor, ...]:
        y = F.linear(x, w, b).relu_()
        return y, *torch.autograd.grad(y, (x, w, b), dy)

    def outputs(r: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        y, dx, dw, db = r
        return y.permute(0, 3, 1, 2), dx.permute(0, 3, 1, 2), dw[:, :, None, None], db

    return step, outputs


def _ours_function(x: Tensor, w: Tensor, b: Tensor, layer: Layer) -> Tensor:
    return conv1x1_ext.conv1x1(x, w, b, layer.stride, groups=layer.groups, activation="relu")


def _stock_function(x: Tensor, w: Tensor, b: Tensor, layer: Layer) -> Tensor:
    return F.relu(F.conv2d(x, w, b, layer.stride, groups=layer.groups))


LAYOUTS = ("NCHW", "NHWC")
FORWARD = [
    *(Peer("ours", layout, _ours(layout)) for layout in LAYOUTS),
    *(Peer("ours_prepacked", layout, _ours_prepacked(layout), _prepacked_unavailable(layout)) for layout in LAYOUTS),
    *(Peer("stock", layout, _stock(layout)) for layout in LAYOUTS),
    Peer("linear", "NHWC", _linear, _only_matrices),
    Peer("baddbmm", "NCHW", _baddbmm, _only_matrices),
    *(Peer("onednn", layout, _onednn(layout), _onednn_unavailable) for layout in LAYOUTS),
    Peer("onnxruntime", "NCHW", _onnxruntime, _onnxruntime_unavailable),
    *(Peer("compile", layout, _compiled(layout)) for layout in LAYOUTS),
]
TRAIN = [
    *(Peer("ours", layout, _train(layout, _ours_function)) for layout in LAYOUTS),
    *(Peer("stock", layout, _train(layout, _stock_function)) for layout in LAYOUTS),
    Peer("linear", "NHWC", _train_linear, _only_matrices),
]
NAMES = tuple(dict.fromkeys(p.name for p in FORWARD))


def reference(case: Case, train: bool) -> tuple[Tensor, ...]:
    """The same in float64 by matrix products: y, and for training dx, dw and db, with the mask of the reference's y."""
    layer = case.layer
    return products(case.x, case.w, case.b, case.dy if train else None, layer.stride, layer.groups)


def products(x: Tensor, w: Tensor, b: Tensor, dy: Tensor | None, stride: int, groups: int) -> tuple[Tensor, ...]:
    """y in float64, and, where there is a dy, dx, dw and db."""

    def grouped(t: Tensor) -> Tensor:
        return t.unflatten(1, (groups, -1))

    x, w, b = x.double(), w.double().flatten(1).unflatten(0, (groups, -1)), b.double()
    picked = grouped(x[:, :, ::stride, ::stride])
    y = torch.einsum("goc,ngchw->ngohw", w, picked).flatten(1, 2).add_(b[:, None, None]).relu_()
    if dy is None:
        return (y,)
    dz = grouped(dy.double() * (y > 0))
    dx = torch.zeros_like(x)
    dx[:, :, ::stride, ::stride] = torch.einsum("goc,ngohw->ngchw", w, dz).flatten(1, 2)
    dw = torch.einsum("ngohw,ngchw->goc", dz, picked).flatten(0, 1)[:, :, None, None]
    return y, dx, dw, dz.flatten(1, 2).sum((0, 2, 3))


def errors(found: Sequence[Tensor], expected: Sequence[Tensor]) -> list[float]:
    """Relative Frobenius error of each output against the reference."""
    if [f.shape for f in found] != [e.shape for e in expected]:
        raise AssertionError(f"shapes {[tuple(f.shape) for f in found]}, not {[tuple(e.shape) for e in expected]}")
    pairs = zip(found, expected, strict=True)
    return [float((f.detach().double() - e).norm() / e.norm().clamp_min(1e-300)) for f, e in pairs]
