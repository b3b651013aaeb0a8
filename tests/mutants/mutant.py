"""What a mutant is, and planting one into a copy of the tree."""

from __future__ import annotations

import hashlib
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


def _chain(source: Path, target: Path, csrc: Path) -> list[tuple[str, Path]] | None:
    """Includes that lead from a source to a header, in order."""
    for name, path in included(source, csrc):
        rest = [] if path == target else _chain(path, target, csrc)
        if rest is not None:
            return [(name, path), *rest]
    return None


def plant(root: Path, mutant: Mutant) -> dict[Path, str | None]:
    """Writes the fault into the tree at `root`.

    With a `unit`, the header stays as it is: that source alone includes a copy of it, under another name, with the
    fault, so that nothing else is compiled again.

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
        unit = root / "csrc" / mutant.unit
        chain = _chain(unit, path.resolve(), root / "csrc") if unit.is_file() else None
        if chain is None:
            raise Stale(f"{mutant.name}: csrc/{mutant.unit} does not include {mutant.file}")
        written, text = {}, fault
        for i in reversed(range(len(chain))):
            name, header = chain[i]
            if "#pragma once" in header.read_text():
                raise Stale(f"{mutant.name}: {header.name} is included once, so that a copy of it would clash")
            renamed = header.with_name(f"{header.stem}_mutant{header.suffix}")
            written[renamed] = text
            outer = chain[i - 1][1] if i > 0 else unit
            new_name = name.replace(header.name, renamed.name)
            text = once_replaced(outer.read_text(), f'"{name}"', f'"{new_name}"', mutant.name)
        written[unit] = text
    before = {file: file.read_text() if file.is_file() else None for file in written}
    for file, text in written.items():
        file.write_text(text)
    return before


def put_back(before: dict[Path, str | None]) -> None:
    for file, text in before.items():
        if text is None:
            file.unlink(missing_ok=True)
        else:
            file.write_text(text)
