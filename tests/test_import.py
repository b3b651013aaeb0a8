"""What an import costs, and that a process can import twice."""

import subprocess
import sys

from conftest import ROOT


def run(code):
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_nothing_of_the_compiler_is_imported():
    """Dynamo, Inductor and SymPy take seconds; they come when something is compiled."""
    out = run(
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import conv1x1_ext\n"
        "new = {m for m in set(sys.modules) - before if not m.startswith('conv1x1_ext')}\n"
        "print(sorted(m for m in new if m.startswith(('torch._dynamo', 'torch._inductor', 'torch.fx', 'sympy'))))\n"
        "print(len(new))\n"
    ).split("\n")
    assert out[0] == "[]"
    assert int(out[1]) < 20


def test_a_second_import_works_and_replaces_the_first():
    run(
        "import sys, importlib, torch, conv1x1_ext\n"
        "first = conv1x1_ext.conv1x1\n"
        "for name in [n for n in sys.modules if n.startswith('conv1x1_ext')]: del sys.modules[name]\n"
        "import conv1x1_ext\n"
        "importlib.reload(sys.modules['conv1x1_ext._registrations'])\n"
        "x, w = torch.randn(2, 4, 3, 3, requires_grad=True), torch.randn(3, 4, 1, 1)\n"
        "for f in (first, conv1x1_ext.conv1x1):\n"
        "    y = f(x, w, activation='relu')\n"
        "    expected = torch.autograd.grad(torch.conv2d(x, w).relu().sum(), x)[0]\n"
        "    assert torch.allclose(torch.autograd.grad(y.sum(), x)[0], expected, atol=1e-5)\n"
        "    assert torch.allclose(torch.func.grad(lambda x: f(x, w, activation='relu').sum())(x), expected, 1e-4)\n"
        "    assert f(x.to('meta'), w.to('meta')).shape == y.shape\n"
        "    assert torch.func.vmap(lambda x: f(x, w))(x).shape == y.shape\n"
        "    compiled = torch.compile(lambda x: f(x, w, activation='relu'), backend='aot_eager', fullgraph=True)\n"
        "    torch._dynamo.reset()\n"
        "    assert torch.allclose(torch.autograd.grad(compiled(x).sum(), x)[0], expected, atol=1e-5)\n"
        "from torch.utils.flop_counter import FlopCounterMode\n"
        "with FlopCounterMode(display=False) as counter: conv1x1_ext.conv1x1(x, w)\n"
        "assert counter.get_total_flops() == 2 * 3 * 4 * 18\n"
    )
