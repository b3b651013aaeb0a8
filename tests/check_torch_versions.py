"""Does this one built library load and run on other torch and Python versions?

    python tests/check_torch_versions.py [--package FOLDER] PYTHON [PYTHON ...]

runs a smoke test in each interpreter, prints a line for each, and fails if any does. The package is that of this
repository, or that of a folder with an unpacked wheel (`make check-wheel`). Each interpreter needs torch >= 2.10. Not
collected by pytest.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

SMOKE = """
import platform, torch
import torch.nn.functional as F
import conv1x1_ext

torch.manual_seed(0)
activations = {None: lambda z: z, **{name: getattr(F, name) for name in ("relu", "relu6", "silu", "hardswish", "gelu")}}
for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 1e-11), (torch.bfloat16, 0.1)):
    for format in (torch.contiguous_format, torch.channels_last):
        for name, function in activations.items():
            x = torch.randn(2, 12, 9, 7, dtype=dtype).contiguous(memory_format=format).requires_grad_()
            w, b = (torch.randn(s, dtype=dtype, requires_grad=True) for s in ((8, 6, 1, 1), (8,)))
            r = torch.randn(2, 8, 5, 4, dtype=dtype, requires_grad=True)
            y = conv1x1_ext.conv1x1(x, w, b, 2, groups=2, activation=name, residual=r)
            z = function(F.conv2d(x, w, b, 2, groups=2) + r)
            torch.testing.assert_close(y, z, atol=tolerance, rtol=tolerance)
            if dtype != torch.bfloat16 and name != "hardswish":
                dy = torch.randn_like(y)
                ours, stock = (torch.autograd.grad(t, (x, w, b, r), dy) for t in (y, z))
                torch.testing.assert_close(ours, stock, atol=10 * tolerance, rtol=10 * tolerance)
            pooled = conv1x1_ext.conv1x1_avg_pool(x, w, b, groups=2, activation=name)
            expected = function(F.conv2d(x, w, b, groups=2)).mean((2, 3))
            torch.testing.assert_close(pooled, expected, atol=tolerance, rtol=tolerance)
try:
    conv1x1_ext.conv1x1(x, w, stride=0, groups=2)
except RuntimeError as error:
    assert "stride: expected positive integers, got [0]" in str(error), error
else:
    raise AssertionError("no error")
x, w, b = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 4, 3, 3), (6, 4, 1, 1), (6,)))
for name in ("none", "relu", "gelu"):
    torch.library.opcheck(torch.ops.conv1x1_ext.conv1x1.default, (x, w, b, None, [1], 1, name, False))
torch.library.opcheck(torch.ops.conv1x1_ext.conv1x1_avg_pool.default, (x, w, b, 1, "relu", False))
info = conv1x1_ext.build_info()
print(f"Python {platform.python_version()}, torch {torch.__version__}: forward ok, backward ok, opcheck ok "
      f"({info['library']} for torch >= {info['torch_target']}, {info['isa']})")
"""


def main() -> int:
    parser = argparse.ArgumentParser(description="One library, several versions of torch and Python.")
    parser.add_argument("--package", type=Path, default=ROOT, help="where the package is (this repository)")
    parser.add_argument("interpreters", nargs="+", metavar="PYTHON")
    args = parser.parse_args()
    package = str(args.package.resolve())
    code = f"{SMOKE}\nimport conv1x1_ext\nassert conv1x1_ext.__file__.startswith({package!r}), conv1x1_ext.__file__"
    failures = 0
    for python in args.interpreters:
        # Not from the repository's root, which Python would look in first.
        run = {"env": {**os.environ, "PYTHONPATH": package}, "cwd": package, "capture_output": True, "text": True}
        try:
            result = subprocess.run([python, "-c", code], check=False, **run)
            ok = result.returncode == 0
            output = result.stdout if ok else result.stdout + result.stderr
        except OSError as error:
            ok, output = False, str(error)
        print(f"{'ok  ' if ok else 'FAIL'}  {python}\n      {output.strip()}", flush=True)
        failures += not ok
    print(f"{len(args.interpreters) - failures} of {len(args.interpreters)} interpreters pass")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
