"""A copy of the tree for each job, and the library that its tests import.

A mutant is planted into a copy under build/mutants, never into the tree itself. Objects are kept there too, named by a
hash of the compiler's flags, the source and all that it includes: a fault costs one translation unit and a link.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

from .mutant import closure, digest

ROOT = Path(__file__).resolve().parent.parent.parent
BUILD = ROOT / "build" / "mutants"
OBJECTS = BUILD / "objects"
# What decides a result; the lists of mutants do not.
DECIDES = ("csrc/", "conv1x1_ext/", "bench/", "tests/", "pyproject.toml")
LISTS = ("tests/mutants/", "tests/test_mutants.py")


class BuildFailed(Exception):
    pass


def files() -> list[str]:
    """All that git knows or would: what is ignored is a build's."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
    return sorted(name for name in set(names) if name and (ROOT / name).is_file())


def tree_hash(names: list[str]) -> str:
    deciding = [name for name in names if name.startswith(DECIDES) and not name.startswith((*LISTS, "bench/results"))]
    return digest([(name, (ROOT / name).read_bytes()) for name in deciding])


def refresh(copy: Path, names: list[str]) -> None:
    """Makes the copy what the tree is, by content: what has not changed keeps its time."""
    for name in names:
        source, target = ROOT / name, copy / name
        if not target.is_file() or target.read_bytes() != source.read_bytes():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
            shutil.copymode(source, target)
    known = set(names)
    for path in list(copy.rglob("*")):
        name = path.relative_to(copy).as_posix()
        if path.is_file() and name not in known and not name.startswith("build/") and path.suffix != ".so":
            path.unlink()


class Library:
    """conv1x1_ext/_C.abi3.so of a copy, without CUDA."""

    def __init__(self, copy: Path, build_config: ModuleType) -> None:
        from torch.utils import cpp_extension

        self.csrc = copy / "csrc"
        self.target = copy / "conv1x1_ext" / "_C.abi3.so"
        self.cxx = os.environ.get("CXX", "c++")
        self.sources = [*build_config.LIBRARY_SOURCES, *build_config.NO_CUDA_SOURCES]
        self.flags = ["-fPIC", "-DNDEBUG", f"-DTORCH_TARGET_VERSION={build_config.TORCH_TARGET}"]
        self.flags += [f"-I{folder}" for folder in cpp_extension.include_paths()]
        self.flags += build_config.CXX_FLAGS
        self.link = [*build_config.LINK_FLAGS, *(f"-L{folder}" for folder in cpp_extension.library_paths())]
        self.link += ["-ltorch", "-ltorch_cpu", "-lc10"]
        self.linked = ""

    def object_of(self, source: str) -> Path:
        texts = [(path.relative_to(self.csrc.resolve()), path.read_bytes()) for path in self._closure(source)]
        return OBJECTS / f"{Path(source).stem}-{digest(self.cxx, self.flags, source, texts)}.o"

    def _closure(self, source: str) -> list[Path]:
        return closure(self.csrc / source, self.csrc)

    def build(self, keep: bool = True) -> None:
        """Compiles what has changed and links. Without `keep`, new objects are thrown away again: a mutant's.

        Raises:
            BuildFailed: with the compiler's messages.
        """
        OBJECTS.mkdir(parents=True, exist_ok=True)
        objects, new = [], []
        for source in self.sources:
            target = self.object_of(source)
            if not target.exists():
                partial = target.with_name(f"{target.name}.{os.getpid()}-{self.csrc.parent.name}")
                _run([self.cxx, *self.flags, "-c", source, "-o", str(partial)], self.csrc)
                partial.replace(target)
                new.append(target)
            objects.append(str(target))
        linked = digest(objects, self.link)
        if linked != self.linked or not self.target.exists():
            # By another name first: a process that has the old one open keeps it.
            partial = self.target.with_suffix(".partial")
            _run([self.cxx, "-shared", *objects, *self.link, "-o", str(partial)], self.csrc)
            partial.replace(self.target)
            self.linked = linked
        if not keep:
            for path in new:
                path.unlink(missing_ok=True)


def _run(command: list[str], folder: Path) -> None:
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise BuildFailed(f"{' '.join(command[-3:])}\n{result.stderr[-3000:]}")


# Libraries that tests make for themselves, which must not count as a test's time: made before, by the tests' own means.
TABLE = "from bench.microkernel_table import load_table; load_table()"
CUDA = "import sys; sys.path.insert(0, 'tests'); from cuda_on_cpu import build; build.build_kernels()"
AMX = "import sys; sys.path.insert(0, 'tests'); from amx import build; print(build.package())"
AMX_TABLE = "import sys; sys.path.insert(0, 'tests'); from amx import build; build.table()"


def prebuild(copy: Path, code: str, environment: dict[str, str]) -> str:
    """Runs such a build in a copy and returns the last line it printed."""
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise BuildFailed(f"{code}\n{result.stdout[-1500:]}{result.stderr[-3000:]}")
    return (result.stdout.splitlines() or [""])[-1]
