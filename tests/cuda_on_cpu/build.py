"""Compiles CUDA sources for the CPU against shim/, into shared libraries that ctypes loads (bench/object_cache.py)."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Sequence
from pathlib import Path

from bench import object_cache
from bench.object_cache import CXX, ROOT, Unit

HERE = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
SHIM = sorted((HERE / "shim").glob("*.cpp"))

FLAGS = ["-std=c++17", "-O2", "-g1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-pthread"]
# Where a GPU refuses an address that its vector type does not divide, the CPU would load it without a word.
FLAGS += ["-fsanitize=alignment", "-fno-sanitize-recover=alignment"]
FLAGS += ["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-DCONV1X1_CUDA_ON_CPU", "-I", str(HERE / "shim")]
# What takes the compiler longest is left out: a null pointer and memory overrun show in AddressSanitizer as well.
SANITIZE = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize=null,object-size,pointer-overflow,vptr"]
SANITIZE += ["-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
if "clang" not in CXX:
    SANITIZE += ["--param", "asan-instrumentation-with-call-threshold=0"]
# The architectures that plans may assume code for, as the real build's TORCH_CUDA_ARCH_LIST.
ARCHITECTURES = "7.5;8.0;8.6;9.0;12.0"


def build(
    name: str,
    sources: Sequence[Path],
    defines: Sequence[str] = (),
    sanitize: bool = False,
    plain: Sequence[Path] = (),
) -> Path:
    """The shared library `name` of `sources` and the shim. Raises RuntimeError with the compiler's messages.

    A define is for the sources that name it.

    With `sanitize` it has AddressSanitizer and UndefinedBehaviorSanitizer, but for the sources in `plain`: load it in a
    process with `sanitizer_environment()`.
    """
    checked = (*FLAGS, *(SANITIZE if sanitize else ()))
    # Of a function that several objects have the first one is linked: those with sanitizers come first.
    units = [Unit(source, checked) for source in (*sources, *SHIM)] + [Unit(source, tuple(FLAGS)) for source in plain]
    for define in defines:
        units = object_cache.defining(units, define)
    return object_cache.build(name, units, (*checked, "-Wl,-z,defs"))


def sanitizer_environment() -> dict[str, str]:
    """What a process needs in its environment to load a library with sanitizers. Python's own leaks are not ours."""
    preload = subprocess.run([CXX, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True).stdout
    return {
        "LD_PRELOAD": str(Path(preload.strip()).resolve()),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


def kernel_sources() -> list[Path]:
    """The library's CUDA kernels, their plans and launchers, and entry.cpp."""
    cuda = CSRC / "cuda"
    torch_free = [f for f in cuda.glob("*.cpp") if f.name not in ("conv1x1_cuda.cpp", "no_cuda.cpp")]
    return [HERE / "entry.cpp", CSRC / "problem" / "lower.cpp", *sorted([*cuda.glob("*.cu"), *torch_free])]


def sanitized_type() -> str:
    """The tensor cores' type whose kernels get the sanitizers, whose compilation takes longer than all the rest: the
    templates are the same for the others. CONV1X1_TEST_SEED chooses."""
    types = sorted(f.stem for f in (CSRC / "cuda").glob("gemm_mma_*.cu"))
    return random.Random(os.environ.get("CONV1X1_TEST_SEED", "0")).choice(types)


def build_kernels(sanitize: bool = False) -> Path:
    """Their library for the CPU. CONV1X1_TEST_FULL=1 leaves no kernel without the sanitizers."""
    sources, kept = kernel_sources(), sanitized_type()
    spared = sanitize and os.environ.get("CONV1X1_TEST_FULL", "") != "1"
    plain = [f for f in sources if spared and f.stem.startswith("gemm_mma_") and f.stem != kept]
    sources = [f for f in sources if f not in plain]
    return build("conv1x1_cuda", sources, [f'CONV1X1_CUDA_ARCHS="{ARCHITECTURES}"'], sanitize, plain)
