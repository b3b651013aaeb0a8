"""Compiles CUDA sources for the CPU against shim/, into shared libraries that ctypes loads (bench/object_cache.py)."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from bench import object_cache
from bench.object_cache import CXX, ROOT, Unit

HERE = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
SHIM = sorted((HERE / "shim").glob("*.cpp"))

FLAGS = ["-std=c++17", "-O2", "-g1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-pthread"]
FLAGS += ["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-DCONV1X1_CUDA_ON_CPU", "-I", str(HERE / "shim")]
# What takes the compiler longest is left out: a null pointer and memory overrun show in AddressSanitizer as well.
SANITIZE = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize=null,object-size,pointer-overflow,vptr"]
SANITIZE += ["-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
if "clang" not in CXX:
    SANITIZE += ["--param", "asan-instrumentation-with-call-threshold=0"]
# The architectures that plans may assume code for, as the real build's TORCH_CUDA_ARCH_LIST.
ARCHITECTURES = "7.5;8.0;8.6;9.0;12.0"


def build(name: str, sources: Sequence[Path], flags: Sequence[str] = (), sanitize: bool = False) -> Path:
    """The shared library `name` of `sources` and the shim. Raises RuntimeError with the compiler's messages.

    With `sanitize` it has AddressSanitizer and UndefinedBehaviorSanitizer: load it in a process with
    `sanitizer_environment()`.
    """
    flags = (*FLAGS, *(SANITIZE if sanitize else ()), *flags)
    units = [Unit(source, flags) for source in (*sources, *SHIM)]
    return object_cache.build(name, units, (*flags, "-Wl,-z,defs"))


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
    return [HERE / "entry.cpp", CSRC / "lower.cpp", *sorted([*cuda.glob("*.cu"), *torch_free])]


def build_kernels(sanitize: bool = False) -> Path:
    """Their library for the CPU."""
    return build("conv1x1_cuda", kernel_sources(), [f'-DCONV1X1_CUDA_ARCHS="{ARCHITECTURES}"'], sanitize)
