"""Bad input raises before any kernel runs, with the argument, what was expected and what came; the same when traced."""

import pytest
import torch
from helpers import DEVICE
from torch._subclasses import FakeTensorMode

import conv1x1_ext
from conv1x1_ext import conv1x1, conv1x1_avg_pool

# As messages name it: with the index, but for the CPU.
HERE = "cpu" if DEVICE.type == "cpu" else f"{DEVICE.type}:{DEVICE.index or 0}"


def t(*shape, dtype=torch.float32, device=None):
    return torch.zeros(shape, dtype=dtype, device=device)


# name: (arguments, exception, message). Messages are whole, but for the "conv1x1: " in front.
CASES = {
    "integer input": (
        lambda: {"input": t(1, 3, 4, 4, dtype=torch.int64), "weight": t(2, 3, 1, 1)},
        RuntimeError, "input: expected dtype float32, float64, bfloat16 or float16, got int64",
    ),
    "float8 input": (
        lambda: {"input": t(1, 3, 4, 4, dtype=torch.float8_e4m3fn), "weight": t(2, 3, 1, 1)},
        RuntimeError, "input: expected dtype float32, float64, bfloat16 or float16, got float8_e4m3fn",
    ),
    "complex input": (
        lambda: {"input": t(1, 3, 4, 4, dtype=torch.complex64), "weight": t(2, 3, 1, 1)},
        RuntimeError, "input: expected dtype float32, float64, bfloat16 or float16, got complex64",
    ),
    "weight of 2 dimensions": (
        lambda: {"input": t(1, 3, 4, 4), "weight": t(2, 3)},
        RuntimeError, "weight: expected shape (C_out, C_in / groups, 1[, 1[, 1]]), got [2, 3]",
    ),
    "weight of 6 dimensions": (
        lambda: {"input": t(1, 3, 4, 4), "weight": t(2, 3, 1, 1, 1, 1)},
        RuntimeError, "weight: expected shape (C_out, C_in / groups, 1[, 1[, 1]]), got [2, 3, 1, 1, 1, 1]",
    ),
    "3x3 kernel": (
        lambda: {"input": t(1, 3, 4, 4), "weight": t(2, 3, 3, 3)},
        RuntimeError, "weight: expected a kernel of size 1 in every spatial dimension, got [2, 3, 3, 3]",
    ),
    "1x3 kernel": (
        lambda: {"input": t(1, 3, 4, 4), "weight": t(2, 3, 1, 3)},
        RuntimeError, "weight: expected a kernel of size 1 in every spatial dimension, got [2, 3, 1, 3]",
    ),
    "3x1 kernel": (
        lambda: {"input": t(1, 3, 4, 4), "weight": t(2, 3, 3, 1)},
        RuntimeError, "weight: expected a kernel of size 1 in every spatial dimension, got [2, 3, 3, 1]",
    ),
    "input of 2 dimensions": (
        lambda: {"input": t(3, 4), "weight": t(2, 3, 1, 1)},
        RuntimeError, "input: expected 3 (unbatched) or 4 dimensions for a weight of shape [2, 3, 1, 1], got [3, 4]",
    ),
    "input of 5 dimensions": (
        lambda: {"input": t(1, 3, 4, 4, 4), "weight": t(2, 3, 1, 1)},
        RuntimeError,
        "input: expected 3 (unbatched) or 4 dimensions for a weight of shape [2, 3, 1, 1], got [1, 3, 4, 4, 4]",
    ),
    "no output channels": (
        lambda: {"input": t(1, 3, 4, 4), "weight": t(0, 3, 1, 1)},
        RuntimeError, "weight: expected at least 1 output channel, got [0, 3, 1, 1]",
    ),
    "channel mismatch": (
        lambda: {"input": t(1, 5, 4, 4), "weight": t(2, 3, 1, 1)},
        RuntimeError,
        "input: expected 3 channels for a weight of shape [2, 3, 1, 1] and groups=1, "
        "got 5 channels in shape [1, 5, 4, 4]",
    ),
    "unbatched channel mismatch": (
        lambda: {"input": t(5, 4, 4), "weight": t(2, 3, 1, 1)},
        RuntimeError,
        "input: expected 3 channels for a weight of shape [2, 3, 1, 1] and groups=1, got 5 channels in shape [5, 4, 4]",
    ),
    "channel mismatch with groups": (
        lambda: {"input": t(1, 3, 4, 4), "weight": t(2, 3, 1, 1), "groups": 2},
        RuntimeError,
        "input: expected 6 channels for a weight of shape [2, 3, 1, 1] and groups=2, "
        "got 3 channels in shape [1, 3, 4, 4]",
    ),
    "groups do not divide": (
        lambda: {"input": t(1, 6, 4, 4), "weight": t(5, 3, 1, 1), "groups": 2},
        RuntimeError, "weight: expected output channels divisible by groups=2, got [5, 3, 1, 1]",
    ),
    "zero groups": (
        lambda: {"input": t(1, 3, 4, 4), "weight": t(2, 3, 1, 1), "groups": 0},
        RuntimeError, "groups: expected a positive integer, got 0",
    ),
    "negative groups": (
        lambda: {"input": t(1, 3, 4, 4), "weight": t(2, 3, 1, 1), "groups": -3},
        RuntimeError, "groups: expected a positive integer, got -3",
    ),
    "dtype mismatch": (
        lambda: {"input": t(1, 3, 4, 4), "weight": t(2, 3, 1, 1, dtype=torch.float64)},
        RuntimeError, "weight: expected the input's dtype float32, got float64",
    ),
    "device mismatch": (
        lambda: {"input": t(1, 3, 4, 4), "weight": t(2, 3, 1, 1, device="meta")},
        RuntimeError, f"weight: expected the input's device {HERE}, got meta",
    ),
    "bias shape": (
        lambda: {"input": t(1, 3, 4, 4), "weight": t(2, 3, 1, 1), "bias": t(3)},
        RuntimeError, "bias: expected shape [2], got [3]",
    ),
    "bias of 2 dimensions": (
        lambda: {"input": t(1, 3, 4, 4), "weight": t(2, 3, 1, 1), "bias": t(1, 2)},
        RuntimeError, "bias: expected shape [2], got [1, 2]",
    ),
    "bias as a column": (
        lambda: {"input": t(1, 3, 4, 4), "weight": t(2, 3, 1, 1), "bias": t(2, 1)},
        RuntimeError, "bias: expected shape [2], got [2, 1]",
    ),
    "bias dtype": (
        lambda: {"input": t(1, 3, 4, 4), "weight": t(2, 3, 1, 1), "bias": t(2, dtype=torch.bfloat16)},
        RuntimeError, "bias: expected the input's dtype float32, got bfloat16",
    ),
    "zero stride": (
        lambda: {"input": t(1, 3, 4, 4), "weight": t(2, 3, 1, 1), "stride": 0},
        RuntimeError, "stride: expected positive integers, got [0]",
    ),
    "negative stride": (
        lambda: {"input": t(1, 3, 4, 4), "weight": t(2, 3, 1, 1), "stride": (1, -2)},
        RuntimeError, "stride: expected positive integers, got [1, -2]",
    ),
    "too many strides": (
        lambda: {"input": t(1, 3, 4, 4), "weight": t(2, 3, 1, 1), "stride": (1, 1, 1)},
        RuntimeError, "stride: expected 1 or 2 integers, got [1, 1, 1]",
    ),
    "two strides for 1d": (
        lambda: {"input": t(1, 3, 4), "weight": t(2, 3, 1), "stride": (1, 1)},
        RuntimeError, "stride: expected 1 integer, got [1, 1]",
    ),
    "two strides for 3d": (
        lambda: {"input": t(1, 3, 4, 4, 4), "weight": t(2, 3, 1, 1, 1), "stride": (1, 1)},
        RuntimeError, "stride: expected 1 or 3 integers, got [1, 1]",
    ),
    "four strides": (
        lambda: {"input": t(1, 3, 4, 4), "weight": t(2, 3, 1, 1), "stride": (1, 1, 1, 1)},
        RuntimeError, "stride: expected 1 to 3 integers, got 4 of them",
    ),
    "no strides": (
        lambda: {"input": t(1, 3, 4, 4), "weight": t(2, 3, 1, 1), "stride": ()},
        RuntimeError, "stride: expected 1 to 3 integers, got 0 of them",
    ),
    "residual shape": (
        lambda: {"input": t(1, 3, 4, 4), "weight": t(2, 3, 1, 1), "residual": t(1, 3, 4, 4)},
        RuntimeError, "residual: expected the output's shape [1, 2, 4, 4], got [1, 3, 4, 4]",
    ),
    "residual that would broadcast": (
        lambda: {"input": t(2, 3, 4, 4), "weight": t(2, 3, 1, 1), "residual": t(2, 4, 4)},
        RuntimeError, "residual: expected the output's shape [2, 2, 4, 4], got [2, 4, 4]",
    ),
    "residual of the input's size under a stride": (
        lambda: {"input": t(1, 3, 5, 5), "weight": t(3, 3, 1, 1), "residual": t(1, 3, 5, 5), "stride": 2},
        RuntimeError, "residual: expected the output's shape [1, 3, 3, 3], got [1, 3, 5, 5]",
    ),
    "residual dtype": (
        lambda: {"input": t(1, 3, 4, 4), "weight": t(2, 3, 1, 1), "residual": t(1, 2, 4, 4, dtype=torch.float16)},
        RuntimeError, "residual: expected the input's dtype float32, got float16",
    ),
    "unknown activation": (
        lambda: {"input": t(1, 3, 4, 4), "weight": t(2, 3, 1, 1), "activation": "tanh"},
        ValueError,
        "activation: expected one of None, 'relu', 'relu6', 'silu', 'hardswish', 'gelu', got 'tanh'",
    ),
}  # fmt: skip
NAMES = list(CASES)
NOT_TENSORS = {
    "input": ({"input": [1.0], "weight": t(2, 3, 1, 1)}, "input: expected a Tensor, got list"),
    "weight": ({"input": t(1, 3, 4, 4), "weight": None}, "weight: expected a Tensor, got NoneType"),
    "bias": (
        {"input": t(1, 3, 4, 4), "weight": t(2, 3, 1, 1), "bias": 1.0},
        "bias: expected a Tensor or None, got float",
    ),
    "residual": (
        {"input": t(1, 3, 4, 4), "weight": t(2, 3, 1, 1), "residual": 2},
        "residual: expected a Tensor or None, got int",
    ),
}


def caught(exception, function):
    with pytest.raises(exception) as info:
        function()
    assert type(info.value) is exception, type(info.value)
    return str(info.value)


def says(text, message):
    return text.splitlines()[0] == f"conv1x1: {message}"


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_eager(name, grad):
    make, exception, message = CASES[name]
    args = make()
    if grad and args["weight"].is_floating_point():
        args["weight"].requires_grad_()
    text = caught(exception, lambda: conv1x1(**args))
    assert says(text, message), text


@pytest.mark.parametrize("name", NAMES)
def test_fake_tensors(name):
    make, exception, message = CASES[name]
    mode = FakeTensorMode()
    with mode:
        args = make()
        text = caught(exception, lambda: conv1x1(**args))
    assert says(text, message), text


@pytest.mark.parametrize("name", [n for n in NAMES if n != "device mismatch"])
def test_meta_tensors(name):
    make, exception, message = CASES[name]
    args = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in make().items()}
    text = caught(exception, lambda: conv1x1(**args))
    assert says(text, message), text


@pytest.mark.parametrize("name", NAMES)
def test_compiled(name):
    """The compiler wraps what the operator says while it traces; the words are the same."""
    make, _, message = CASES[name]
    args = make()
    torch._dynamo.reset()
    compiled = torch.compile(lambda kwargs: conv1x1(**kwargs), fullgraph=True, backend="eager")
    with pytest.raises(Exception) as info:
        compiled(args)
    assert f"conv1x1: {message}" in str(info.value)


@pytest.mark.parametrize("name", NAMES)
def test_operator_called_directly(name):
    make, exception, message = CASES[name]
    args = {"bias": None, "residual": None, "groups": 1, **make()}
    stride = args.pop("stride", 1)
    args["stride"] = [stride] if isinstance(stride, int) else list(stride)
    args["activation"] = args.get("activation", "none")
    text = caught(RuntimeError, lambda: torch.ops.conv1x1_ext.conv1x1(**args, allow_tf32=False))
    if exception is ValueError:  # the operator takes names, 'none' among them
        message = "activation: expected one of 'none', 'relu', 'relu6', 'silu', 'hardswish', 'gelu', got 'tanh'"
    assert says(text, message), text


@pytest.mark.parametrize("name", [n for n in NAMES if "stride" not in n and "residual" not in n])
def test_avg_pool(name):
    make, exception, message = CASES[name]
    for activation in (None, "relu"):
        args = {"activation": activation, **make()}
        text = caught(exception, lambda args=args: conv1x1_avg_pool(**args))
        if "input" not in message.split(":")[0] and "channels in" not in message:
            assert says(text, message), text
        assert text.startswith(f"conv1x1: {message.split(':')[0]}: expected"), text


@pytest.mark.parametrize("name", [n for n in NAMES if n != "device mismatch"])
def test_explain_raises_the_same(name):
    make, exception, message = CASES[name]
    text = caught(exception, lambda: conv1x1_ext.explain(**make()))
    assert says(text, message), text


@pytest.mark.parametrize("name", list(NOT_TENSORS))
def test_not_a_tensor(name):
    args, message = NOT_TENSORS[name]
    assert says(caught(TypeError, lambda: conv1x1(**args)), message)
    if name != "residual":
        assert says(caught(TypeError, lambda: conv1x1_avg_pool(**args)), message)


@pytest.mark.parametrize("stride", [1.5, "2", None, (1, 1.5), [2, "a"]], ids=str)
def test_stride_of_the_wrong_type(stride):
    with pytest.raises(TypeError, match="stride: expected an integer or a sequence of integers"):
        conv1x1(t(1, 3, 4, 4), t(2, 3, 1, 1), stride=stride)


STRANGE = {
    "mkldnn": (lambda x: x.to_mkldnn(), "a dense tensor, got layout torch._mkldnn: call to_dense() on it"),
    "sparse": (lambda x: x.to_sparse(), "a dense tensor, got layout torch.sparse_coo: call to_dense() on it"),
    "quantized": (
        lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.quint8),
        "dtype float32, float64, bfloat16 or float16, got quint8: call dequantize() on it",
    ),
    "nested": (lambda x: torch.nested.nested_tensor([x[0], x[0]]), "a dense tensor, got a nested tensor: pad it"),
    "jagged": (
        lambda x: torch.nested.nested_tensor([x[0, 0], x[0, 0]], layout=torch.jagged),
        "a dense tensor, got a nested tensor: pad it",
    ),
}


@pytest.mark.cpu_only(reason="MKLDNN tensors are the CPU's")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", list(STRANGE))
def test_tensors_that_no_kernel_reads(name, grad):
    make, message = STRANGE[name]
    x, w = t(2, 3, 4, 4), t(2, 3, 1, 1).requires_grad_(grad)
    for call in (
        lambda x: conv1x1(x, w, activation="relu"),
        lambda x: conv1x1_avg_pool(x, w),
        lambda x: conv1x1_ext.explain(x, w),
        conv1x1_ext.Conv1x1(3, 2).requires_grad_(grad),
    ):
        assert says(caught(RuntimeError, lambda call=call: call(make(x))), f"input: expected {message}")
    if name in ("mkldnn", "sparse"):
        text = caught(RuntimeError, lambda: conv1x1(x, w, residual=make(t(2, 2, 4, 4))))
        assert says(text, f"residual: expected {message}")


@pytest.mark.parametrize("activation", [1, True, ["relu"], "ReLU", "none", ""], ids=repr)
def test_activation_that_is_no_name(activation):
    for function in (conv1x1, conv1x1_avg_pool, conv1x1_ext.explain):
        with pytest.raises((ValueError, TypeError), match="activation"):
            function(t(1, 3, 4, 4), t(2, 3, 1, 1), activation=activation)


def test_unknown_direction():
    text = caught(RuntimeError, lambda: conv1x1_ext.explain(t(1, 3, 4, 4), t(2, 3, 1, 1), direction="up"))
    assert says(text, "direction: expected 'fprop', 'dgrad', 'wgrad' or 'avg_pool', got 'up'")


BACKWARD = {
    "grad_output shape": (
        {"grad_output": t(1, 2, 4, 5)}, "grad_output: expected the output's shape [1, 2, 4, 4], got [1, 2, 4, 5]"
    ),
    "grad_output dtype": (
        {"grad_output": t(1, 2, 4, 4, dtype=torch.float64)},
        "grad_output: expected the input's dtype float32, got float64"
    ),
    "output missing": (
        {"activation": "relu", "output": None}, "output: expected the forward's result, for the mask, got None"
    ),
    "output shape": ({"output": t(1, 2, 5, 4)}, "output: expected the output's shape [1, 2, 4, 4], got [1, 2, 5, 4]"),
    "smooth activation": (
        {"activation": "silu"},
        "activation: expected 'none', 'relu' or 'relu6' in a backward from the output, got 'silu'"
    ),
    "channel mismatch": (
        {"input": t(1, 5, 4, 4)},
        "input: expected 3 channels for a weight of shape [2, 3, 1, 1] and groups=1, "
        "got 5 channels in shape [1, 5, 4, 4]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(BACKWARD))
@pytest.mark.parametrize("fake", [False, True])
def test_backward_operator(name, fake):
    changed, message = BACKWARD[name]
    args = {
        "grad_output": t(1, 2, 4, 4), "input": t(1, 3, 4, 4), "weight": t(2, 3, 1, 1), "output": t(1, 2, 4, 4),
        "stride": [1], "groups": 1, "activation": "relu", "allow_tf32": False, "need_input": True, "need_weight": True,
        "need_bias": True, "need_residual": True, **changed,
    }  # fmt: skip
    if fake:
        mode = FakeTensorMode()
        args = {k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in args.items()}
    text = caught(RuntimeError, lambda: torch.ops.conv1x1_ext.conv1x1_backward(**args))
    assert says(text, message), text


def test_avg_pool_backward_operator():
    def run(grad):
        rest = (t(1, 3, 4, 4), t(2, 3, 1, 1), None, 1, "relu", False, True, True, False)
        return torch.ops.conv1x1_ext.conv1x1_avg_pool_backward(grad, *rest)

    run(t(1, 2))
    assert says(
        caught(RuntimeError, lambda: run(t(1, 3))), "grad_output: expected the output's shape [1, 2], got [1, 3]"
    )


def test_private_operators_refuse_a_foreign_config():
    for config in (0, -1, 15):
        with pytest.raises(RuntimeError, match="config"):
            torch.ops.conv1x1_ext._fprop(t(1, 3, 4, 4), t(2, 3, 1, 1), None, None, config)
