"""What a mutant is, and planting one into a copy of the tree."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

# The CPU's features that an instruction set needs, as /proc/cpuinfo has them.
ISA_FLAGS = {
    "scalar": set(),
    "avx2": {"avx2", "fma", "f16c"},
    "avx512": {"avx512f", "avx512vl", "avx512bw", "avx512dq"},
    "avx512_bf16": {"avx512f", "avx512vl", "avx512bw", "avx512dq", "avx512_bf16"},
    "avx512_amx": {"avx512f", "avx512vl", "avx512bw", "avx512dq", "avx512_bf16"},  # emulated where there is none
}


class Stale(Exception):
    """The list no longer fits the sources."""


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str  # from the root of the tree
    old: str  # occurs exactly once in it
    new: str
    tests: tuple[str, ...]  # pytest's arguments, from tests/ on: "test_errors.py -k stride"
    isa: str | None = None  # CONV1X1_ISA of the tests; AMX is emulated where the CPU has none
    unit: str | None = None  # of the sources that include `file`, the only one that gets the fault
    equivalent: str = ""  # why no test can see it

    @property
    def compiled(self) -> bool:
        return self.file.startswith("csrc/") and not self.file.endswith(".py")

    def key(self, tree: str) -> str:
        """What a result is kept by: this very fault, in this very tree."""
        return digest(tree, self.file, self.old, self.new, self.tests, self.isa, self.unit)


def mutant(
    name: str,
    file: str,
    old: str,
    new: str,
    *tests: str,
    isa: str | None = None,
    unit: str | None = None,
    equivalent: str = "",
) -> Mutant:
    """A line of the lists. In C++ for the CPU the tests run with AVX2 unless said otherwise: what a plan chooses
    depends on the instruction set, and most machines have that one."""
    if isa is None and file.startswith("csrc/cpu/"):
        isa = "avx2"
    if isa is not None and isa not in ISA_FLAGS:
        raise Stale(f"{name}: no instruction set {isa!r}")
    return Mutant(name, file, old, new, tests, isa, unit, equivalent)


def digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


def once_replaced(text: str, old: str, new: str, what: str) -> str:
    """
    Raises:
        Stale: `old` does not occur exactly once.
    """
    if old == new:
        raise Stale(f"{what}: the new text is the old one")
    if text.count(old) != 1:
        raise Stale(f"{what}: its text occurs {text.count(old)} times, not once: {old!r}")
    return text.replace(old, new)


INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]+"([^"]+)"', re.MULTILINE)


def included(path: Path, csrc: Path) -> list[tuple[str, Path]]:
    """What a source includes of ours: as it is written there, and the file."""
    found = []
    for name in INCLUDE.findall(path.read_text()):
        for folder in (path.parent, csrc):
            if (folder / name).is_file():
                found.append((name, (folder / name).resolve()))
                break
    return found


def closure(source: Path, csrc: Path) -> list[Path]:
    """The source and all of ours that it includes."""
    seen, todo = {source.resolve()}, [source.resolve()]
    while todo:
        for _, path in included(todo.pop(), csrc):
            if path not in seen:
                seen.add(path)
                todo.append(path)
    return sorted(seen)


def plant(root: Path, mutant: Mutant) -> dict[Path, str | None]:
    """Writes the fault into the tree at `root`.

    With a `unit`, the header stays as it is: that source alone is compiled from a copy of it and of all that it
    includes, in a folder of its own, so that nothing else is compiled again.

    Returns:
        what to put back: texts by file, None for a file that was not there.

    Raises:
        Stale: the list no longer fits the tree. Nothing is written then.
    """
    path = root / mutant.file
    if not path.is_file():
        raise Stale(f"{mutant.name}: there is no {mutant.file}")
    fault = once_replaced(path.read_text(), mutant.old, mutant.new, mutant.name)
    if mutant.unit is None:
        written = {path: fault}
    else:
        csrc = root / "csrc"
        unit = csrc / mutant.unit
        files = closure(unit, csrc) if unit.is_file() else []
        if path.resolve() not in files or path.resolve() == unit.resolve():
            raise Stale(f"{mutant.name}: csrc/{mutant.unit} does not include {mutant.file}")
        copies = {file: root / "csrc_mutant" / file.relative_to(csrc.resolve()) for file in files}
        written = {copy: fault if file == path.resolve() else file.read_text() for file, copy in copies.items()}
        written[unit] = f'#include "{os.path.relpath(copies[unit.resolve()], unit.resolve().parent)}"\n'
    before = {file: file.read_text() if file.is_file() else None for file in written}
    for file, text in written.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return before


def put_back(before: dict[Path, str | None]) -> None:
    for file, text in before.items():
        if text is None:
            file.unlink(missing_ok=True)
        else:
            file.write_text(text)
