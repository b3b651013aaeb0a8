"""Builds native helpers at first use, above all the microkernel table: pybind11, NumPy arrays in, no torch between.

Used by the tests (every tail of every microkernel by itself) and by the microbenchmarks. Sources and flags are those of
csrc/build_config.py, so what is tested and timed here is what the library ships.
"""

from __future__ import annotations

import fcntl
import functools
import importlib.util
import os
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parent.parent
_lock = threading.Lock()


@functools.cache
def build_config() -> Any:
    """csrc/build_config.py as a module; csrc is no package."""
    spec = importlib.util.spec_from_file_location("conv1x1_build_config", ROOT / "csrc" / "build_config.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up their own module
    spec.loader.exec_module(module)
    return module


def build_extension(name: str, sources: list[Path], cflags: list[str], python_module: bool = True) -> Any:
    """Compiles ``sources`` into build/``name`` unless they are unchanged, and loads the result.

    Processes that ask at once (pytest-xdist) take turns, and a build that was killed leaves nothing to wait for.
    """
    directory = ROOT / "build" / name
    directory.mkdir(parents=True, exist_ok=True)
    path = os.environ.get("PATH", "")
    with _lock, open(directory / "turn", "w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        (directory / "lock").unlink(missing_ok=True)  # torch's own lock, which outlives a killed build
        try:
            # ninja is installed next to python, and a virtual environment need not be activated.
            os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), path])
            return cpp_extension.load(
                name=f"conv1x1_{name}",
                sources=[str(s) for s in sources],
                extra_cflags=cflags,
                extra_ldflags=build_config().LINK_FLAGS,
                build_directory=str(directory),
                is_python_module=python_module,
            )
        finally:
            os.environ["PATH"] = path


@functools.cache
def load_table(
    name: str = "table", more_sources: tuple[Path, ...] = (), more_flags: tuple[str, ...] = ()
) -> ModuleType:
    """The table's module: ``list()``, ``run(...)``, ``time(...)``, ``activate(...)``; see csrc/cpu/table_pybind.cpp."""
    config = build_config()
    sources = [config.CSRC / source for source in config.TABLE_SOURCES]
    module: ModuleType = build_extension(name, [*sources, *more_sources], [*config.CXX_FLAGS, *more_flags])
    return module


def in_parts(x: Any, parts: int) -> Any:
    """(k, n) as (groups of 32 k, parts, 16, n) pairs of bfloat16, k and k + 16: their sum over the parts is x.

    As the library makes panels for kernels of several parts (csrc/cpu/microkernels/parts.inc), zeros behind k.
    """
    import numpy as np

    x = np.pad(x, [(0, -len(x) % 32), (0, 0)]).reshape(-1, 2, 16, x.shape[1])
    panels = []
    for part in range(parts):
        bits = (x.view(np.uint32) + (0x8000 if part == 0 else 0)) >> 16  # the first one to nearest
        panels.append(bits[:, 0] | bits[:, 1] << 16)
        x = np.ascontiguousarray(x - (bits << 16).view(np.float32))
    assert not np.nan_to_num(x).any(), "not exact"
    return np.stack(panels, axis=1)
