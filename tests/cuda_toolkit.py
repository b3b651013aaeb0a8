"""The CUDA toolkit's programs, wherever they are: nvcc, compute-sanitizer, cuobjdump (PyPI has it)."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path


def homes() -> list[Path]:
    """Toolkit folders, most explicit first."""
    named = [os.environ[v] for v in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(v)]
    found = shutil.which("nvcc")
    beside = [str(Path(found).resolve().parent.parent)] if found else []
    return [Path(p) for p in (*named, "/usr/local/cuda", *beside)]


def find_nvcc() -> str | None:
    """nvcc's path, or None."""
    return next((str(h / "bin" / "nvcc") for h in homes() if (h / "bin" / "nvcc").is_file()), shutil.which("nvcc"))


def find_sanitizer() -> str | None:
    """compute-sanitizer's path, or None."""
    places = [home / folder / "compute-sanitizer" for home in homes() for folder in ("bin", "compute-sanitizer")]
    return next((str(p) for p in places if p.is_file()), shutil.which("compute-sanitizer"))


def find_cuobjdump() -> str | None:
    """cuobjdump with nvdisasm beside it (pip puts both into site-packages/nvidia/cu*/bin), or None."""
    folders = [home / "bin" for home in homes()]
    folders += [p for entry in sys.path for p in sorted(Path(entry).glob("nvidia/cu*/bin"))]
    both = [f for f in folders if (f / "cuobjdump").is_file() and (f / "nvdisasm").is_file()]
    return str(both[0] / "cuobjdump") if both else None
