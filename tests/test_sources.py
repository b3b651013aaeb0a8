"""The rules of docs/architecture.md, and that the files and members which comments and docs name exist."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from cuda_on_cpu import build

from conv1x1_ext import _library

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
DOCS = {f.name: f.read_text() for f in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"))}
del DOCS["history.md"]  # which names what there was
SOURCES = sorted(f for f in CSRC.rglob("*") if f.suffix in (".cpp", ".h", ".inc", ".cu", ".cuh"))
KERNELS = CSRC / "cpu" / "kernels"


def files_with(pattern, files=SOURCES):
    return {str(f.relative_to(CSRC)) for f in files if re.search(pattern, f.read_text(), re.MULTILINE)}


def test_torch_headers_are_the_bindings_alone():
    """Rule 1."""
    allowed = {*(f"api/{name}" for name in ("ops.cpp", "tensor_checks.h", "binding.h", "binding.cpp"))}
    allowed |= {"cpu/conv1x1_cpu.cpp"}
    allowed |= {"cuda/conv1x1_cuda.cpp", "cuda/no_cuda.cpp"}
    found = files_with(r"^\s*#\s*include\s*[<\"]torch/")
    assert found and found <= allowed


def test_intrinsics_are_the_microkernels_alone():
    """Rule 2. What else depends on the architecture has one file of its own."""
    outside = [f for f in SOURCES if KERNELS not in f.parents]
    found = files_with(r"\b_mm\d*_\w|\b__builtin_ia32_|\w+intrin\.h\b|\barm_neon\.h\b", outside)
    assert found == {"cpu/run/architecture.h"}


def test_openmp_regions_have_one_place():
    """parallel.h, which hands on the caller's floating-point environment."""
    assert files_with(r"^\s*#\s*pragma\s+omp\b|\bomp\.h\b") == {"cpu/run/parallel.h"}


# Found out once per process, and never changed.
MADE_ONCE = {
    "amx_missing::missing", "table::t", "l1_bytes::bytes", "l2_bytes::bytes", "selected_kernels::choice",
    "device_at::devices", "verbose::value",
}  # fmt: skip


def variables(library):
    """Those of ours that lie in writable memory, without namespaces and parameters."""
    command = ["nm", "-C", "--format=sysv", "--defined-only", library]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    # name, value, kind, ..., section. What is constant but for the addresses in it lies in .data.rel.ro.
    symbols = ([field.strip() for field in line.rsplit("|", 6)] for line in listed.splitlines() if line.count("|") >= 6)
    written = ((symbol[0], symbol[2]) for symbol in symbols if not symbol[-1].startswith(".data.rel.ro"))
    found = {name for name, kind in written if kind in tuple("bBdDuVv") and name.startswith("conv1x1")}
    found = {name for name in found if not name.startswith("conv1x1::cuda::emulator::")}
    return {re.sub(r"\(anonymous namespace\)::|\(.*?\)(?=::|$)|conv1x1::|cuda::", "", name) for name in found}


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm, of binutils")
@pytest.mark.parametrize("library", ["ours", "emulated CUDA"])
def test_no_global_is_mutable(library):
    """Rule 7."""
    assert variables(_library.path if library == "ours" else build.build_kernels()) <= MADE_ONCE


def test_files_that_comments_and_docs_name_are_there():
    folders = [CSRC, *(ROOT / name for name in ("bench", "conv1x1_ext", "docs", "examples", "tests"))]
    there = {f.name for folder in folders for f in folder.rglob("*")} | {f.name for f in ROOT.iterdir()}
    texts = {f.name: "\n".join(re.findall(r"//.*", f.read_text())) for f in SOURCES}
    texts |= DOCS
    pattern = r"(?<![\w*}])\w+\.(?:cpp|h|inc|cuh|cu|py|md)\b"
    gone = {f"{name}: {named}" for name, text in texts.items() for named in re.findall(pattern, text)}
    gone = {entry for entry in gone if entry.split(": ")[1] not in there}
    assert not gone


def test_members_that_docs_name_are_there():
    code = "\n".join(re.sub(r"//.*", "", f.read_text()) for f in SOURCES)
    named = re.findall(r"`(\w+)::(\w+)", "\n".join(DOCS.values()))
    ours = [(t, member) for t, member in named if re.search(rf"\b(?:struct|class) {t}\b", code)]
    assert ours and [(t, member) for t, member in ours if not re.search(rf"\b{member}\b", code)] == []
