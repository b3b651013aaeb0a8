"""Builds what runs AMX's kernels on a CPU without AMX: the library and the microkernel table, from the same sources and
flags as ever, with emulator.cpp linked in and one define, by which dispatch.cpp takes AMX for supported.

    python tests/amx/build.py    builds the library and prints the folder whose conv1x1_ext it belongs to
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
from bench.microkernel_table import build_config, build_extension, load_table  # noqa: E402

EMULATOR = Path(__file__).resolve().parent / "emulator.cpp"
DEFINE = "-DCONV1X1_TEST_EMULATES_AMX"
NAME = "amx_library"


def cpu_flags() -> set[str]:
    """What Linux says that the CPU has, and lets programs use; nothing elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.split(":", 1)[1].split()) for line in lines if line.startswith("flags")), set())


def cannot_emulate() -> str:
    """Why not, or ""."""
    flags = cpu_flags()
    if "amx_bf16" in flags:
        return "this CPU has AMX"
    missing = {"avx512f", "avx512vl", "avx512bw", "avx512dq", "avx512_bf16"} - flags
    return f"all but AMX itself is not emulated, and this CPU has no {', '.join(sorted(missing))}" if missing else ""


def table() -> ModuleType:
    return load_table("amx_table", (EMULATOR,), (DEFINE,))


def package() -> Path:
    """A folder with a conv1x1_ext of its own. Built in a process of its own: a library can be loaded once."""
    result = subprocess.run([sys.executable, __file__], capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(result.stdout + result.stderr)
    return Path(result.stdout.splitlines()[-1])


def main() -> None:
    config = build_config()
    sources = [config.CSRC / source for source in (*config.LIBRARY_SOURCES, *config.NO_CUDA_SOURCES)]
    flags = [*config.CXX_FLAGS, f"-DTORCH_TARGET_VERSION={config.TORCH_TARGET}", DEFINE]
    build_extension(NAME, [*sources, EMULATOR], flags, python_module=False)
    built = ROOT / "build" / NAME
    folder = built / "package" / "conv1x1_ext"
    folder.mkdir(parents=True, exist_ok=True)
    for source in (*(ROOT / "conv1x1_ext").glob("*.py"), built / f"conv1x1_{NAME}.so"):
        target = folder / ("_C.so" if source.suffix == ".so" else source.name)
        if not target.exists() or target.read_bytes() != source.read_bytes():
            partial = target.with_name(f"{target.name}.{os.getpid()}")
            shutil.copyfile(source, partial)
            partial.replace(target)  # a process that has the old one open keeps it
    print(folder.parent)


if __name__ == "__main__":
    main()
