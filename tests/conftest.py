"""Seeds, threads, the device and the microkernel table for the whole suite.

Inputs are random and fresh in every session, and so are the combinations of parameters (tests/covering.py); the header
prints CONV1X1_TEST_SEED, which repeats a failure. CONV1X1_TEST_FULL=1 runs every combination. Tests and the processes
that they start have one thread unless they ask for more, as two workers of pytest-xdist share the cores.
CONV1X1_TEST_AMX is set by tests/test_amx.py: the folder of a library with emulated AMX, to be tested instead.
CONV1X1_TEST_DEVICE=cuda makes every tensor and module on that device; what only a CPU has is skipped there, with the
reason. CONV1X1_TEST_PART=2/4 runs the second of four parts of the tests collected: how tests/gpu_check.py shares a file
among processes without a plugin. hypothesis and expecttest may be missing: the tests that need them are skipped, and
say so.
"""

import os
import random
import sys
import zlib
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch, which reads it once
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))
EMULATED_AMX = os.environ.get("CONV1X1_TEST_AMX", "")
if EMULATED_AMX:
    sys.path.insert(0, EMULATED_AMX)

try:
    import hypothesis
except ImportError:
    pass
else:
    hypothesis.settings.register_profile("conv1x1", deadline=None, derandomize=False, print_blob=True)
    hypothesis.settings.load_profile("conv1x1")

DEVICE = os.environ.setdefault("CONV1X1_TEST_DEVICE", "cpu")


def pytest_configure(config):
    # Before xdist starts its workers, which inherit it.
    os.environ.setdefault("CONV1X1_TEST_SEED", str(random.SystemRandom().randrange(1 << 31)))
    config.addinivalue_line("markers", "cpu_only(reason): skipped where CONV1X1_TEST_DEVICE is not the CPU")
    if DEVICE == "cpu":
        return
    if torch.device(DEVICE).type == "cuda":
        if not torch.cuda.is_available():
            raise pytest.UsageError(f"CONV1X1_TEST_DEVICE={DEVICE}: this torch ({torch.__version__}) finds no GPU")
        torch.backends.cudnn.allow_tf32 = False  # IEEE float32 on both sides; tests/test_cuda.py turns it on
    torch.set_default_device(DEVICE)


def pytest_report_header(config):
    products = "whole products" if os.environ.get("CONV1X1_TEST_FULL") == "1" else "covering arrays"
    return f"CONV1X1_TEST_SEED={os.environ['CONV1X1_TEST_SEED']} CONV1X1_TEST_DEVICE={DEVICE}, {products}"


def pytest_collection_modifyitems(config, items):
    part, parts = map(int, os.environ.get("CONV1X1_TEST_PART", "1/1").split("/"))
    # By a hash: every n-th test would have one value of a parameter, and the costly ones often share one.
    ours = [zlib.crc32(item.nodeid.encode()) % parts == part - 1 for item in items]
    if not all(ours):
        config.hook.pytest_deselected(items=[item for item, keep in zip(items, ours, strict=True) if not keep])
        items[:] = [item for item, keep in zip(items, ours, strict=True) if keep]
    if torch.device(DEVICE).type == "cpu":
        return
    for item in items:
        mark = item.get_closest_marker("cpu_only")
        if mark is not None:
            item.add_marker(pytest.mark.skip(reason=f"CPU only: {mark.kwargs['reason']}"))


@pytest.fixture(autouse=True)
def seed_and_threads(request):
    torch.manual_seed(zlib.crc32(f"{os.environ['CONV1X1_TEST_SEED']} {request.node.nodeid}".encode()))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def table():
    """The pybind11 module of the microkernels; workers that want it share its compilation."""
    from amx import build

    from bench.microkernel_table import load, load_table

    return load(build.table()) if EMULATED_AMX else load_table()
