"""Objects and shared libraries by content: each source is compiled once for its text, its headers and its flags.

The microkernel table, the emulated AMX library and the emulated CUDA kernels are built from many of the same sources.
An object's name is a hash of everything that it is made from: the source, every header of this repository that it
includes, the flags, the compiler and its version, and the versions of what `identity` names. The headers are read anew
each time, so that nothing that was remembered can be stale.

Processes share the folder. A lock for each object and library keeps two of them from making the same one; they do make
different ones at the same time. What a killed process leaves behind is never taken for finished.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Names do not tell where the tree lies: copies of it may share a folder (tests/mutants).
CACHE = Path(os.environ.get("CONV1X1_OBJECT_CACHE") or ROOT / "build" / "objects")
CXX = os.environ.get("CXX", "g++")
_INCLUDE = re.compile(r"^[ \t]*#[ \t]*include[ \t]*(.*)$", re.MULTILINE)
_NAMED = re.compile(r'"([^"]+)"|<([^>]+)>')


@dataclass(frozen=True)
class Unit:
    """A source and the flags that it is compiled with, -fPIC among them."""

    source: Path
    flags: tuple[str, ...]
    identity: tuple[str, ...] = ()  # versions of what is included from outside this repository


def _folders(flags: Sequence[str]) -> list[Path]:
    """The folders of -I and -isystem that belong to this repository."""
    joined = [f[2:] for f in flags if f.startswith("-I") and f != "-I"]
    apart = [value for name, value in itertools.pairwise(flags) if name in ("-I", "-isystem")]
    # Not those of an environment that lies in the repository, as make's does: they have versions.
    return [f for f in map(Path, (*joined, *apart)) if f.is_relative_to(ROOT) and not f.is_relative_to(sys.prefix)]


def included(source: Path, flags: Sequence[str] = ()) -> list[Path]:
    """The headers of this repository that a source includes, however deep, under any condition.

    Raises:
        RuntimeError: an include that names no file, as a macro would; its header could change unseen.
    """
    folders, found, waiting = _folders(flags), dict[Path, None](), [source.resolve()]
    while waiting:
        path = waiting.pop()
        for text in _INCLUDE.findall(path.read_text()):
            named = _NAMED.match(text)
            if named is None:
                raise RuntimeError(f'{path}: #include {text}: expected "name" or <name>')
            places = ([path.parent] if named[1] else []) + folders
            header = next((p for p in (folder / (named[1] or named[2]) for folder in places) if p.is_file()), None)
            if header is not None and header.resolve() not in found:
                found[header.resolve()] = None
                waiting.append(header.resolve())
    return sorted(found)


def defining(units: Sequence[Unit], define: str) -> list[Unit]:
    """The units, with a define, "NAME" or "NAME=value", for those whose text or headers name it.

    The others' objects stay those of every build without it.

    Raises:
        RuntimeError: none of them names it.
    """
    word = re.compile(rf"\b{define.split('=')[0]}\b")
    changed = []
    for unit in units:
        files = [unit.source, *included(unit.source, unit.flags)]
        asks = any(word.search(file.read_text()) for file in files)
        changed.append(Unit(unit.source, (*unit.flags, f"-D{define}"), unit.identity) if asks else unit)
    if changed == list(units):
        raise RuntimeError(f"no source names {define}")
    return changed


@functools.cache
def _compiler(command: str) -> str:
    return subprocess.run([command, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]


def _hash(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


def _in_tree(text: Path | str) -> str:
    return str(text).replace(str(ROOT), "")


def object_of(unit: Unit) -> Path:
    """Where a unit's object lies, or will lie."""
    files = [(_in_tree(file), file.read_bytes()) for file in (unit.source, *included(unit.source, unit.flags))]
    made_from = (files, tuple(map(_in_tree, unit.flags)), unit.identity)
    return CACHE / f"{unit.source.stem}-{_hash(CXX, _compiler(CXX), *made_from)}.o"


@contextmanager
def _turn(target: Path, wait: bool) -> Iterator[bool]:
    """Whether this process may make the target now; without `wait` perhaps not, as another one is at it."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(target.with_suffix(target.suffix + ".lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def _make(target: Path, command: Sequence[str], wait: bool = True) -> bool:
    """Runs a command that writes the target, unless it is there. Returns False where another process is at it."""
    if target.exists():
        return True
    with _turn(target, wait) as ours:
        if ours and not target.exists():
            partial = target.with_suffix(".partial")
            whole = [*command, "-o", str(partial)]
            result = subprocess.run(whole, capture_output=True, text=True, check=False)
            if result.returncode != 0:
                raise RuntimeError(f"{' '.join(whole)}\n{result.stderr}")
            partial.rename(target)
    return ours


def _compile(unit: Unit, target: Path, wait: bool) -> bool:
    # -x c++: CUDA sources are compiled for the CPU.
    return _make(target, [CXX, *unit.flags, "-x", "c++", "-c", str(unit.source)], wait)


def jobs() -> int:
    """Compilers at a time: the cores, shared with the other workers of pytest-xdist."""
    return max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))


def compile_units(units: Sequence[Unit]) -> list[Path]:
    """The units' objects. First made are those that no other process is making."""
    targets = [object_of(unit) for unit in units]
    with ThreadPoolExecutor(jobs()) as pool:
        done = list(pool.map(_compile, units, targets, [False] * len(units)))
        left = [(unit, target) for unit, target, ready in zip(units, targets, done, strict=True) if not ready]
        for _ in pool.map(lambda pair: _compile(*pair, wait=True), left):
            pass
    return targets


def build(name: str, units: Sequence[Unit], link_flags: Sequence[str] = ()) -> Path:
    """The shared library of some units. Raises RuntimeError with the compiler's messages."""
    objects = compile_units(units)
    made_from = ([o.name for o in objects], tuple(map(_in_tree, link_flags)))
    library = CACHE / f"{name}-{_hash(CXX, _compiler(CXX), *made_from)}.so"
    _make(library, [CXX, "-shared", *map(str, objects), *link_flags])
    return library
