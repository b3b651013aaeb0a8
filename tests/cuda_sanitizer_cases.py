"""Calls that reach every kind of CUDA kernel, to be run under compute-sanitizer; not collected by pytest.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python tests/cuda_sanitizer_cases.py

Without the caching allocator every tensor is an allocation of its own, so that a byte beyond it is seen. Results are
only looked at for being finite: other tests compare them.
"""

import itertools
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import conv1x1_ext

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# (N, C_in, H, W), C_out, stride, groups: aligned, odd, strided and grouped, tiles over images, a long sum in wgrad.
CASES = (
    ((2, 64, 12, 16), 96, 1, 1),
    ((2, 37, 7, 9), 51, 1, 1),
    ((3, 34, 9, 7), 18, 2, 2),
    ((5, 16, 7, 7), 24, 1, 1),
    ((2, 16, 64, 64), 8, 1, 1),
)


def run(shape: tuple[int, ...], c_out: int, stride: int, groups: int, dtype: torch.dtype, channels_last: bool) -> None:
    """Forward with every activation of a kernel's epilogue, residual and bias; all gradients; average pooling."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def normal(*size: int) -> torch.Tensor:
        t = torch.randn(size, device="cuda").to(dtype)
        return t.contiguous(memory_format=memory_format) if len(size) == 4 else t

    x, w, b = normal(*shape), normal(c_out, shape[1] // groups, 1, 1), normal(c_out)
    out = [(s - 1) // stride + 1 for s in shape[2:]]
    r, dy = normal(shape[0], c_out, *out), normal(shape[0], c_out, *out)
    found = [
        conv1x1_ext.conv1x1(x, w, b, stride, groups=groups, activation=a, residual=r)
        for a in (None, "relu6", "silu", "hardswish", "gelu")
    ]
    leaves = [t.requires_grad_() for t in (x, w, b, r)]
    y = conv1x1_ext.conv1x1(*leaves[:3], stride, groups=groups, activation="relu", residual=leaves[3])
    found += torch.autograd.grad(y, leaves, dy)
    y = conv1x1_ext.conv1x1(*leaves[:3], stride, groups=groups)
    found += torch.autograd.grad(y, leaves[:3], torch.ones((), device="cuda", dtype=dtype).expand_as(y))
    if stride == 1:
        pooled = conv1x1_ext.conv1x1_avg_pool(*leaves[:3], groups=groups, activation="silu")
        found += [pooled, *torch.autograd.grad(pooled, leaves[:3], torch.ones_like(pooled))]
    assert all(torch.isfinite(t).all() for t in found), (shape, dtype, channels_last)


def main() -> None:
    count = 0
    for dtype, tf32 in [*((d, False) for d in DTYPES), (torch.float32, True)]:
        torch.backends.cudnn.allow_tf32 = tf32
        for case, channels_last in itertools.product(CASES, (False, True)):
            run(*case, dtype, channels_last)
            count += 1
    torch.cuda.synchronize()
    print(f"{count} cases")


if __name__ == "__main__":
    main()
