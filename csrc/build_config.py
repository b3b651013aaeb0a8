"""Sources, compiler flags and the choice of CUDA, once.

setup.py builds the library from them, bench/microkernel_table.py the table. Imports no torch: what it must know of
torch comes as arguments.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

CSRC = Path(__file__).resolve().parent

# -ffp-contract=off: products and sums fuse only where a kernel says so, so that every tail of a kernel gives the same
# bits. No -march: instruction sets are chosen at run time (cpu/kernels/common/isa.h).
CXX_FLAGS = ["-std=c++17", "-O3", "-g0", "-ffp-contract=off", "-fno-math-errno", "-fopenmp", "-fvisibility=hidden"]
CXX_FLAGS += ["-Wall", "-Wextra"]
LINK_FLAGS = ["-fopenmp"]

# Torch-free: what the microkernel table is built from. The files that take longest to compile come first.
KERNELS = ("fma/avx512", "amx/avx512_amx", "fma/avx512_bf16", "fma/avx2", "fma/portable", "fma/avx512_float64")
KERNEL_SOURCES = [*(f"cpu/kernels/{name}.cpp" for name in KERNELS), "cpu/kernels/dispatch.cpp"]
LIBRARY_SOURCES = [
    *KERNEL_SOURCES,
    "api/ops.cpp",
    "api/checks.cpp",
    "api/strides.cpp",
    "problem/lower.cpp",
    "api/binding.cpp",
    "cpu/conv1x1_cpu.cpp",
    "cpu/run/avg_pool.cpp",
    "cpu/plan/operands.cpp",
    "cpu/plan/plan.cpp",
    "cpu/plan/partition.cpp",
    "cpu/plan/roles.cpp",
    "cpu/plan/explain.cpp",
    "cpu/run/driver.cpp",
]
NO_CUDA_SOURCES = ["cuda/no_cuda.cpp"]
CUDA_SOURCES = [
    "cuda/conv1x1_cuda.cpp",
    "cuda/plan.cpp",
    "cuda/launch.cu",
    "cuda/passes.cu",
    "cuda/gemm_simt.cu",
    *(f"cuda/gemm_mma_{dtype}.cu" for dtype in ("tf32", "float16", "bfloat16")),
]
TABLE_SOURCES = [
    *KERNEL_SOURCES,
    "cpu/kernels/table_pybind.cpp",
    "problem/lower.cpp",
    "cpu/plan/operands.cpp",
    "cpu/plan/plan.cpp",
    "cpu/plan/partition.cpp",
    "cpu/plan/roles.cpp",
    "cpu/run/driver.cpp",
]

# The stable ABI of torch 2.10: one library for 2.10 and later, and no Python symbol, so for any Python.
TORCH_TARGET = "0x020a000000000000"

# Compressed, the device code is a tenth of its size. nvcc itself reads NVCC_APPEND_FLAGS: "-Xptxas -v" shows registers
# and spills, -lineinfo gives profilers the source.
NVCC_FLAGS = ["-std=c++17", "-O3", "-Xfatbin=-compress-all", "-Xcompiler=-fvisibility=hidden,-Wall"]
# torch's build defines these away; the kernels, which never see a torch header, are written against CUDA as it comes.
NVCC_FLAGS += [
    f"-U__CUDA_NO_{what}__"
    for what in ("HALF_OPERATORS", "HALF_CONVERSIONS", "BFLOAT16_CONVERSIONS", "HALF2_OPERATORS")
]
# A CUDA torch's libtorch brings libtorch_cuda, which has the current stream. As nothing but a weak reference needs it,
# the linker would drop it.
CUDA_LINK_FLAGS = ["-Wl,--push-state,--no-as-needed", "-ltorch", "-Wl,--pop-state"]
CUDA_LIBRARIES = ["cudart_static", "rt", "dl", "pthread"]

# Where neither TORCH_CUDA_ARCH_LIST nor a GPU chooses: A100, H100, B200, consumer Blackwell, and PTX for what comes.
DEFAULT_ARCHS = ("8.0", "9.0", "10.0", "12.0")
MIN_ARCH = (7, 5)  # what the kernels for CUDA cores are written for; tensor cores from 8.0 on


@dataclass(frozen=True)
class Toolkit:
    home: Path
    version: str  # of nvcc: "13.0"
    archs: tuple[str, ...]  # that nvcc compiles for, ascending: "8.0", ...

    @property
    def include(self) -> Path:
        return self.home / "include"

    @property
    def lib(self) -> Path:
        """The folder of libcudart_static.a.

        Raises:
            SystemExit: there is none.
        """
        for folder in (self.home / "lib64", self.home / "lib", *sorted(self.home.glob("targets/*/lib"))):
            if (folder / "libcudart_static.a").is_file():
                return folder
        raise SystemExit(f"conv1x1_ext: {self.home} has nvcc but no libcudart_static.a in lib64, lib or targets/*/lib.")


def _is_home(folder: Path) -> bool:
    return (folder / "bin" / "nvcc").is_file() and (folder / "include" / "cuda_runtime.h").is_file()


def _output(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout + result.stderr


def find_cuda_home(environ: Mapping[str, str]) -> tuple[Path | None, str]:
    """The CUDA toolkit's folder, with bin/nvcc and include/cuda_runtime.h, and where it was found or looked for.

    CUDA_HOME or CUDA_PATH, where set, alone decide. Otherwise /usr/local/cuda, then the nvcc of the PATH, which may be
    a wrapper: nvcc itself says where it lives.
    """
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if environ.get(name):
            home = Path(environ[name])
            return (home if _is_home(home) else None), f"{name}={home}"
    if _is_home(Path("/usr/local/cuda")):
        return Path("/usr/local/cuda"), "/usr/local/cuda"
    nvcc = shutil.which("nvcc", path=environ.get("PATH"))
    if nvcc is None:
        return None, "CUDA_HOME, CUDA_PATH, /usr/local/cuda and PATH"
    top = re.search(r"^#\$ TOP=(.+)$", _output(nvcc, "--dryrun", "-x", "cu", "-c", os.devnull), re.MULTILINE)
    home = Path(top.group(1).strip() if top else Path(nvcc).resolve().parent.parent).resolve()
    return (home if _is_home(home) else None), f"{nvcc} of PATH, in {home}"


def toolkit_at(home: Path) -> Toolkit:
    """Asks the folder's nvcc for its version and architectures.

    Raises:
        SystemExit: nvcc does not answer as expected.
    """
    nvcc = str(home / "bin" / "nvcc")
    version = re.search(r"release (\d+\.\d+)", _output(nvcc, "--version"))
    numbers = {int(n) for n in re.findall(r"compute_(\d+)", _output(nvcc, "--list-gpu-arch"))}
    if version is None or not numbers:
        raise SystemExit(f"conv1x1_ext: {nvcc} --version and --list-gpu-arch: expected a release and architectures.")
    return Toolkit(home, version.group(1), tuple(f"{n // 10}.{n % 10}" for n in sorted(numbers)))


def wants_cuda(force: str | None, torch_cuda: str | None, home: Path | None, where: str) -> tuple[bool, str]:
    """Whether to build the CUDA kernels, and one line that says why.

    Args:
        force: FORCE_CUDA: "1" builds them or fails, "0" does not, None or "" leaves it to the rest.
        torch_cuda: torch.version.cuda. A torch without CUDA gets none unless forced: they could not be called.
        home, where: of ``find_cuda_home``.

    Raises:
        SystemExit: FORCE_CUDA=1 without a toolkit, or another value of it.
    """
    if force not in (None, "", "0", "1"):
        raise SystemExit(f"conv1x1_ext: FORCE_CUDA: expected 0 or 1, got {force!r}.")
    if force == "0":
        return False, "CPU kernels only: FORCE_CUDA=0"
    if home is None:
        missing = f"no CUDA toolkit (bin/nvcc and include/cuda_runtime.h): looked in {where}"
        if force == "1":
            raise SystemExit(f"conv1x1_ext: FORCE_CUDA=1, but {missing}.")
        return False, f"CPU kernels only: {missing}"
    if force == "1":
        return True, f"CPU and CUDA kernels: FORCE_CUDA=1, toolkit from {where}"
    if torch_cuda is None:
        return (
            False,
            f"CPU kernels only: this torch has no CUDA, though there is a toolkit ({where}); FORCE_CUDA=1 builds",
        )
    return True, f"CPU and CUDA kernels: torch has CUDA {torch_cuda}, toolkit from {where}"


def driver_warning(nvcc: str, torch_cuda: str | None) -> str:
    """What to say about nvcc's version beside torch's, or "".

    torch's headers and CUDA libraries are not used and cudart is linked statically, so the versions need not match. But
    a driver runs the CUDA versions up to its own, and that torch works promises torch's alone.
    """
    if torch_cuda is None or int(nvcc.split(".")[0]) <= int(torch_cuda.split(".")[0]):
        return ""
    return f"nvcc is of CUDA {nvcc}, torch of {torch_cuda}: the kernels need a driver for CUDA {nvcc.split('.')[0]}"


def tuning_macros(environ: Mapping[str, str]) -> list[tuple[str, str]]:
    """What a library for bench/cuda_tiles.py is compiled with: CONV1X1_TUNING=1 asks for one.

    Raises:
        SystemExit: another value of it than 0 and 1.
    """
    wanted = environ.get("CONV1X1_TUNING") or "0"
    if wanted not in ("0", "1"):
        raise SystemExit(f"conv1x1_ext: CONV1X1_TUNING: expected 0 or 1, got {wanted!r}.")
    return [("CONV1X1_TUNING", "1")] if wanted == "1" else []


_ARCH = re.compile(r"(\d+)\.(\d)([af]?)(\+PTX)?")


def _number(arch: str) -> tuple[int, int]:
    match = _ARCH.fullmatch(arch)
    assert match is not None, arch
    return int(match.group(1)), int(match.group(2))


def _text(number: tuple[int, int]) -> str:
    return f"{number[0]}.{number[1]}"


def choose_archs(
    requested: str | None, visible: Sequence[tuple[int, int]], toolkit: Toolkit
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The architectures to build for, as in "9.0" or "9.0+PTX", and those asked for that the kernels do not run on.

    Args:
        requested: TORCH_CUDA_ARCH_LIST: numbers such as 9.0, 9.0a or 9.0+PTX, between spaces or semicolons. It decides.
        visible: compute capabilities of the GPUs that torch sees; without a request, the kernels are for them.
        toolkit: without either, its part of the default list, the last with PTX.

    Raises:
        SystemExit: a request that is not understood or that nvcc cannot compile, or one with nothing to build.
    """
    names: list[str] = []
    if requested and requested.strip():
        names = re.split(r"[;\s]+", requested.strip("; \t\n"))
        for name in names:
            if not _ARCH.fullmatch(name):
                raise SystemExit(
                    f"conv1x1_ext: TORCH_CUDA_ARCH_LIST: expected numbers such as '8.0;9.0+PTX', got {name!r}."
                )
    elif visible:
        for gpu in sorted(set(visible)):
            older = [arch for arch in toolkit.archs if _number(arch) < gpu]
            # PTX of the newest older architecture, for the driver to compile for a GPU that nvcc does not know.
            names.append(_text(gpu) if _text(gpu) in toolkit.archs or not older else f"{older[-1]}+PTX")
    else:
        names = [name for name in DEFAULT_ARCHS if name in toolkit.archs]
        names[-1:] = [f"{name}+PTX" for name in names[-1:]]
    names = list(dict.fromkeys(names))
    too_old = tuple(name for name in names if _number(name) < MIN_ARCH)
    archs = tuple(name for name in names if name not in too_old)
    unknown = [name for name in archs if _text(_number(name)) not in toolkit.archs]
    if unknown or not archs:
        raise SystemExit(
            f"conv1x1_ext: CUDA architectures: expected some of {' '.join(toolkit.archs)}, those of nvcc "
            f"{toolkit.version}, from {_text(MIN_ARCH)} on; got {' '.join(unknown or too_old) or 'none'}."
        )
    return archs, too_old


def gencode_flags(archs: Sequence[str]) -> list[str]:
    """nvcc's flags for architectures as ``choose_archs`` gives them."""
    flags = []
    for arch in archs:
        number = arch.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags
