"""Compiles CUDA sources for the CPU against shim/, into shared libraries that ctypes loads.

Libraries and objects are kept under build/cuda_on_cpu, named by a hash of everything that goes into them, so that a
changed source is compiled again and processes that build the same thing at once wait for the first.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "cuda_on_cpu"
SHIM = sorted((HERE / "shim").glob("*.cpp"))

CXX = os.environ.get("CXX", "g++")
FLAGS = ["-std=c++17", "-O2", "-g1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-pthread"]
FLAGS += ["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-DCONV1X1_CUDA_ON_CPU", "-I", str(HERE / "shim")]
# What takes the compiler longest is left out: a null pointer and memory overrun show in AddressSanitizer as well.
SANITIZE = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize=null,object-size,pointer-overflow,vptr"]
SANITIZE += ["-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
if "clang" not in CXX:
    SANITIZE += ["--param", "asan-instrumentation-with-call-threshold=0"]
# The architectures that plans may assume code for, as the real build's TORCH_CUDA_ARCH_LIST.
ARCHITECTURES = "7.5;8.0;8.6;9.0;12.0"


def _hash(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


def _headers() -> str:
    folders = [HERE / "shim", HERE, CSRC, CSRC / "cuda"]
    names = sorted(f for folder in folders for f in folder.iterdir() if f.suffix in (".h", ".cuh", ".inc"))
    return _hash([(f.name, f.read_bytes()) for f in names])


def _run(command: Sequence[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr}")


def _compile(source: Path, flags: Sequence[str], headers: str) -> Path:
    target = CACHE / f"{source.stem}-{_hash(CXX, flags, headers, str(source), source.read_bytes())}.o"
    if not target.exists():
        partial = target.with_suffix(".partial")
        _run([CXX, *flags, "-x", "c++", "-c", str(source), "-o", str(partial)])
        partial.rename(target)
    return target


def build(name: str, sources: Sequence[Path], flags: Sequence[str] = (), sanitize: bool = False) -> Path:
    """The shared library `name` of `sources` and the shim. Raises RuntimeError with the compiler's messages.

    With `sanitize` it has AddressSanitizer and UndefinedBehaviorSanitizer: load it in a process with
    `sanitizer_environment()`.
    """
    flags = [*FLAGS, *(SANITIZE if sanitize else []), *flags]
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        headers = _headers()
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            objects = list(pool.map(lambda source: _compile(source, flags, headers), [*sources, *SHIM]))
        library = CACHE / f"{name}-{_hash([o.name for o in objects], flags)}.so"
        if not library.exists():
            partial = library.with_suffix(".partial")
            _run([CXX, *flags, "-shared", "-Wl,-z,defs", *map(str, objects), "-o", str(partial)])
            partial.rename(library)
    return library


def sanitizer_environment() -> dict[str, str]:
    """What a process needs in its environment to load a library with sanitizers. Python's own leaks are not ours."""
    preload = subprocess.run([CXX, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True).stdout
    return {
        "LD_PRELOAD": str(Path(preload.strip()).resolve()),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


def build_kernels(sanitize: bool = False) -> Path:
    """The library's CUDA kernels, their plans and launchers, and entry.cpp, for the CPU."""
    cuda = CSRC / "cuda"
    torch_free = [f for f in cuda.glob("*.cpp") if f.name not in ("conv1x1_cuda.cpp", "no_cuda.cpp")]
    sources = [HERE / "entry.cpp", CSRC / "lower.cpp", *sorted([*cuda.glob("*.cu"), *torch_free])]
    return build("conv1x1_cuda", sources, [f'-DCONV1X1_CUDA_ARCHS="{ARCHITECTURES}"'], sanitize)
