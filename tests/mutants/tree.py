"""A copy of the tree for each job, and the library that its tests import.

A mutant is planted into a copy under build/mutants, never into the tree itself. Objects are those of
bench/object_cache.py, which all copies share: a fault costs the translation units that see it, and a link.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from .mutant import Mutant, digest, plant, put_back

ROOT = Path(__file__).resolve().parent.parent.parent
BUILD = ROOT / "build" / "mutants"
OBJECTS = BUILD / "objects"
# What decides a result; the lists of mutants do not.
DECIDES = ("csrc/", "conv1x1_ext/", "bench/", "tests/", "pyproject.toml")
LISTS = ("tests/mutants/", "tests/test_mutants.py")
IMPORTED_TEST = "tests/test_isa.py"  # by other test files

# Files whose tests build libraries of their own, and how they do.
NEEDS_TABLE, NEEDS_CUDA = {"test_microkernels.py", "test_packed_weight.py"}, {"test_cuda_emulated.py"}
TABLE = "from bench.microkernel_table import table_library, table_units; table_library('table', table_units())"
AMX_TABLE = "from amx import build; build.table()"
AMX = "from amx import build; print(build.package())"
CUDA = "from cuda_on_cpu import build; build.build_kernels()"


class BuildFailed(Exception):
    pass


def files() -> list[str]:
    """All that git knows or would: what is ignored is a build's."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
    return sorted(name for name in set(names) if name and (ROOT / name).is_file())


def tree_hash(names: list[str]) -> str:
    """Of all that decides the result of any mutant: the sources, and what tests share."""
    deciding = [name for name in names if name.startswith(DECIDES) and not name.startswith((*LISTS, "bench/results"))]
    shared = [name for name in deciding if not name.startswith("tests/test_") or name == IMPORTED_TEST]
    return digest([(name, (ROOT / name).read_bytes()) for name in shared])


def test_files(mutant: Mutant) -> list[str]:
    """The files of the tests named for a mutant, from the root of the tree."""
    words = [shlex.split(test)[0].split("::")[0] for test in mutant.tests]
    return sorted({f"tests/{word}" for word in words})


def refresh(copy: Path, names: list[str]) -> None:
    """Makes the copy what the tree is, by content: what has not changed keeps its time."""
    copy.mkdir(parents=True, exist_ok=True)
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


def link_objects(source: Path, target: Path) -> None:
    """What is compiled already: the same files under another folder."""
    target.mkdir(parents=True, exist_ok=True)
    for path in source.glob("*"):
        if path.suffix in (".o", ".so") and not (target / path.name).exists():
            os.link(path, target / path.name)


class Job:
    """A copy of the tree and the library in it, with a fault or without."""

    def __init__(self, number: int, names: list[str]) -> None:
        from amx import build

        self.copy = BUILD / f"copy{number}"
        self.planted_objects = BUILD / f"planted{number}"
        refresh(self.copy, names)
        self.object_cache = _load(self.copy / "bench" / "object_cache.py", f"object_cache_of_copy{number}")
        self.units = [replace(u, source=self.copy / u.source.relative_to(ROOT)) for u in build.library_units()]
        self.link_flags = build.link_flags()
        self.library = ""  # what is there
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("CONV1X1_")},
            "PYTHONPATH": str(self.copy),
            # A fault of the same length in the same second would meet the bytecode of what it replaced.
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_WAIT_POLICY": "passive",
        }
        self.build(OBJECTS)

    def build(self, objects: Path) -> None:
        """Compiles what has changed and puts the library in its place.

        Raises:
            BuildFailed: with the compiler's messages.
        """
        self.environment["CONV1X1_OBJECT_CACHE"] = str(objects)
        self.object_cache.CACHE = objects
        try:
            library = self.object_cache.build("library", self.units, self.link_flags)
        except RuntimeError as error:
            raise BuildFailed(str(error)[-3000:]) from None
        target = self.copy / "conv1x1_ext" / "_C.abi3.so"
        if library.name != self.library:
            partial = target.with_suffix(".partial")
            shutil.copyfile(library, partial)
            partial.replace(target)  # by another name first: a process that has the old one open keeps it
            self.library = library.name

    @contextmanager
    def planted(self, mutant: Mutant) -> Iterator[None]:
        """The copy with the fault in it, as long as the context lasts. Its objects are thrown away afterwards.

        Raises:
            BuildFailed, Stale
        """
        before = plant(self.copy, mutant)
        try:
            if mutant.compiled:
                shutil.rmtree(self.planted_objects, ignore_errors=True)
                link_objects(OBJECTS, self.planted_objects)
                self.build(self.planted_objects)
            yield
        finally:
            put_back(before)
            if mutant.compiled:
                self.build(OBJECTS)
                shutil.rmtree(self.planted_objects, ignore_errors=True)

    def environment_of(self, mutant: Mutant) -> dict[str, str]:
        """For the mutant's tests, with the libraries that they would build, built: that must not count as their time.

        Raises:
            BuildFailed
        """
        environment = dict(self.environment)
        files = {Path(name).name for name in test_files(mutant)}
        emulated = mutant.isa == "avx512_amx" and "amx_bf16" not in cpu_flags()
        if mutant.isa is not None:
            environment["CONV1X1_ISA"] = mutant.isa
        if emulated:
            environment["CONV1X1_TEST_AMX"] = self.prebuild(AMX)
            environment["PYTHONPATH"] = os.pathsep.join([environment["CONV1X1_TEST_AMX"], environment["PYTHONPATH"]])
        if files & NEEDS_TABLE:
            self.prebuild(AMX_TABLE if emulated else TABLE)
        if files & NEEDS_CUDA:
            self.prebuild(CUDA)
        return environment

    def prebuild(self, code: str) -> str:
        """Runs a build of the tests' in the copy; the last line that it printed."""
        command = [sys.executable, "-c", "import sys; sys.path.insert(0, 'tests'); " + code]
        result = subprocess.run(command, cwd=self.copy, env=self.environment, capture_output=True, text=True)
        if result.returncode != 0:
            raise BuildFailed(f"{code}\n{result.stdout[-1500:]}{result.stderr[-3000:]}")
        return (result.stdout.splitlines() or [""])[-1]


def _load(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look up their own module
    spec.loader.exec_module(module)
    return module


def cpu_flags() -> set[str]:
    from amx import build

    return build.cpu_flags()
