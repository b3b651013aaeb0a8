"""What building the library takes: wall time and peak memory of every translation unit. Not part of the suite.

``python tests/check_build.py`` compiles each source of csrc/build_config.py by itself, one after the other, with the
flags that setup.py uses, and exits with 1 where a compiler process takes more memory than ``--most-mb``. ``--cuda``
compiles the CUDA sources, too; ``--cxx clang++`` asks another compiler; names (``avx512``) choose sources.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "csrc"))
import build_config  # noqa: E402


def commands(args: argparse.Namespace) -> dict[str, list[str]]:
    """How each source is compiled, by its path in csrc/; the output's path is to be appended."""
    # Not imported here: what this process holds counts as the peak of each process that it starts.
    paths = "from torch.utils import cpp_extension; print(*cpp_extension.include_paths(), sep='\\n')"
    found_paths = subprocess.run([sys.executable, "-c", paths], capture_output=True, text=True, check=True).stdout
    includes = [f"-I{path}" for path in found_paths.splitlines()]
    cxx = ["-fPIC", f"-DTORCH_TARGET_VERSION={build_config.TORCH_TARGET}", *includes]
    found = {}
    sources = build_config.LIBRARY_SOURCES + (build_config.CUDA_SOURCES if args.cuda else build_config.NO_CUDA_SOURCES)
    home, where = build_config.find_cuda_home(os.environ)
    if args.cuda and home is None:
        raise SystemExit(f"no CUDA toolkit: looked in {where}")
    for source in sources:
        path = str(build_config.CSRC / source)
        if source.endswith(".cu"):
            assert home is not None
            archs, _ = build_config.choose_archs(
                os.environ.get("TORCH_CUDA_ARCH_LIST"), [], build_config.toolkit_at(home)
            )
            flags = [*build_config.NVCC_FLAGS, *build_config.gencode_flags(archs), "--compiler-options=-fPIC"]
            found[source] = [str(home / "bin" / "nvcc"), *flags, "-c", path, "-o"]
        else:
            more = [f"-I{home / 'include'}", '-DCONV1X1_CUDA_ARCHS=""', '-DCONV1X1_NVCC=""'] if args.cuda else []
            found[source] = [args.cxx, *build_config.CXX_FLAGS, *cxx, *more, "-c", path, "-o"]
    return {s: c for s, c in found.items() if not args.names or any(name in s for name in args.names)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="parts of sources' names; default: all")
    parser.add_argument("--cxx", default=os.environ.get("CXX", "c++"))
    parser.add_argument("--cuda", action="store_true")
    parser.add_argument("--most-mb", type=int, default=1000, help="exit with 1 above this; default 1000")
    args = parser.parse_args()
    version = subprocess.run([args.cxx, "--version"], capture_output=True, text=True, check=True).stdout.split("\n")[0]
    print(f"{version}; {platform.machine()}, {os.cpu_count()} cores\n{'seconds':>8} {'peak MB':>8} {'KB':>7}  source")
    total = worst = size = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for source, command in commands(args).items():
            output = Path(folder) / "object.o"
            begin = time.perf_counter()
            process = subprocess.Popen([*command, str(output)])
            _, status, usage = os.wait4(process.pid, 0)  # of the compiler's own children, too
            seconds = time.perf_counter() - begin
            if status != 0:
                raise SystemExit(f"{source}: the compiler failed")
            peak, kb = usage.ru_maxrss / 1024, output.stat().st_size / 1024
            total, worst, size = total + seconds, max(worst, peak), size + kb
            print(f"{seconds:8.1f} {peak:8.0f} {kb:7.0f}  {source}", flush=True)
    print(f"{total:8.1f} {worst:8.0f} {size:7.0f}  together, the most, together")
    if worst > args.most_mb:
        raise SystemExit(f"a compiler process took {worst:.0f} MB: more than {args.most_mb}")


if __name__ == "__main__":
    main()
