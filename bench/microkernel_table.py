"""The microkernel table, built at first use: pybind11, NumPy arrays in, no torch between.

Used by the tests (every tail of every microkernel by itself) and by the microbenchmarks. Sources and flags are those of
csrc/build_config.py, so what is tested and timed here is what the library ships.
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from bench.object_cache import ROOT, Unit, build

MODULE, BINDING = "conv1x1_table", "cpu/kernels/table_pybind.cpp"


@functools.cache
def build_config() -> Any:
    """csrc/build_config.py as a module; csrc is no package."""
    spec = importlib.util.spec_from_file_location("conv1x1_build_config", ROOT / "csrc" / "build_config.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up their own module
    spec.loader.exec_module(module)
    return module


def library_flags() -> tuple[str, ...]:
    """What a source of the library that needs neither torch nor Python is compiled with."""
    return (*build_config().CXX_FLAGS, "-fPIC")


def table_units() -> list[Unit]:
    """The table's sources. One knows pybind11 and Python; the others are the library's own."""
    import pybind11

    config = build_config()
    folders = (pybind11.get_include(), sysconfig.get_path("include"))
    python = (f"-DTORCH_EXTENSION_NAME={MODULE}", *(part for f in folders for part in ("-isystem", f)))
    identity = (pybind11.__version__, sys.version)
    binding = Unit(config.CSRC / BINDING, (*library_flags(), *python), identity)
    names = config.TABLE_SOURCES
    return [binding if name == BINDING else Unit(config.CSRC / name, library_flags()) for name in names]


def table_library(name: str, units: Sequence[Unit]) -> Path:
    """The shared library of a table. They all define the same module: a process loads one of them."""
    return build(name, units, build_config().LINK_FLAGS)


def load(path: Path) -> ModuleType:
    """The module of a table's library."""
    loader = importlib.machinery.ExtensionFileLoader(MODULE, str(path))
    spec = importlib.util.spec_from_loader(MODULE, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@functools.cache
def load_table() -> ModuleType:
    """The table's module: ``list()``, ``run(...)``, ``time(...)``, ``activate(...)``; see table_pybind.cpp."""
    return load(table_library("table", table_units()))


def in_parts(x: Any, parts: int) -> Any:
    """(k, n) as (groups of 32 k, parts, 16, n) pairs of bfloat16, k and k + 16: their sum over the parts is x.

    As the library makes panels for kernels of several parts (csrc/cpu/kernels/amx/parts.h), zeros behind k.
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
