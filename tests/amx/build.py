"""Builds what runs AMX's kernels on a CPU without AMX: the library and the microkernel table, from the same sources and
flags as ever, with emulator.cpp linked in and one define, by which dispatch.cpp takes AMX for supported. All but
dispatch.cpp is compiled once for both and for the table without AMX.

    python tests/amx/build.py    builds the library and prints the folder whose conv1x1_ext it belongs to
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
from bench import object_cache  # noqa: E402
from bench.microkernel_table import build_config, library_flags, table_library, table_units  # noqa: E402
from bench.object_cache import Unit  # noqa: E402

HERE = Path(__file__).resolve().parent
DEFINE = "CONV1X1_TEST_EMULATES_AMX"
PACKAGE = ROOT / "build" / "amx_package"


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


def emulating(units: list[Unit]) -> list[Unit]:
    """The same units with the emulator, and with the define where a source asks for it."""
    return [*object_cache.defining(units, DEFINE), Unit(HERE / "emulator.cpp", library_flags())]


def table() -> Path:
    """The table's library; bench.microkernel_table.load makes it a module."""
    return table_library("amx_table", emulating(table_units()))


def probe() -> Path:
    """Functions that hand the emulator instructions, right and wrong ones."""
    flags = ("-std=c++17", "-O2", "-Wall", "-Wextra", "-fvisibility=hidden", "-fPIC")
    units = [Unit(HERE / "probe.cpp", flags), Unit(HERE / "emulator.cpp", library_flags())]
    return object_cache.build("amx_probe", units)


def library_units() -> list[Unit]:
    """The library's sources. Those that the table has are torch-free, and their objects are the table's."""
    import torch
    from torch.utils import cpp_extension

    config = build_config()
    folders = [part for folder in cpp_extension.include_paths() for part in ("-isystem", folder)]
    with_torch = (*library_flags(), f"-DTORCH_TARGET_VERSION={config.TORCH_TARGET}", *folders)
    units = []
    for name in (*config.LIBRARY_SOURCES, *config.NO_CUDA_SOURCES):
        torch_free = name in config.TABLE_SOURCES
        identity = () if torch_free else (torch.__version__,)
        units.append(Unit(config.CSRC / name, library_flags() if torch_free else with_torch, identity))
    return units


def link_flags() -> tuple[str, ...]:
    """Of the library."""
    from torch.utils import cpp_extension

    libraries = [f"-L{folder}" for folder in cpp_extension.library_paths()]
    return (*build_config().LINK_FLAGS, *libraries, "-lc10", "-ltorch_cpu", "-ltorch")


def package() -> Path:
    """A folder with a conv1x1_ext of its own."""
    library = object_cache.build("amx_library", emulating(library_units()), link_flags())
    folder = PACKAGE / library.stem / "conv1x1_ext"
    folder.mkdir(parents=True, exist_ok=True)
    for source in (*(ROOT / "conv1x1_ext").glob("*.py"), library):
        target = folder / ("_C.so" if source == library else source.name)
        if not target.exists() or target.read_bytes() != source.read_bytes():
            partial = target.with_name(f"{target.name}.{os.getpid()}")
            shutil.copyfile(source, partial)
            partial.replace(target)  # a process that has the old one open keeps it
    return folder.parent


if __name__ == "__main__":
    print(package())
