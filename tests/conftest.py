"""Seeds, threads and the microkernel table for the whole suite.

Inputs are random and fresh in every session; the header prints CONV1X1_TEST_SEED, which repeats a failure.
"""

import os
import random
import sys
import zlib
from pathlib import Path

import hypothesis
import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: the workers of pytest-xdist share the cores
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))

hypothesis.settings.register_profile("conv1x1", deadline=None, derandomize=False, print_blob=True)
hypothesis.settings.load_profile("conv1x1")


def pytest_configure(config):
    # Before xdist starts its workers, which inherit it.
    os.environ.setdefault("CONV1X1_TEST_SEED", str(random.SystemRandom().randrange(1 << 31)))


def pytest_report_header(config):
    return f"CONV1X1_TEST_SEED={os.environ['CONV1X1_TEST_SEED']}"


@pytest.fixture(autouse=True)
def seed_and_threads(request):
    torch.manual_seed(zlib.crc32(f"{os.environ['CONV1X1_TEST_SEED']} {request.node.nodeid}".encode()))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def table(tmp_path_factory):
    """The pybind11 module of the microkernels; one worker builds it, the others wait on its build lock."""
    from bench.microkernel_table import load_table

    return load_table()
