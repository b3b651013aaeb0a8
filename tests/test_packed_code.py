"""What the compiler made of the CPU's kernels: arithmetic on whole vectors, not on single elements, in every
instruction set. Read from the objects of the microkernel table, as test_cuda_build.py reads SASS."""

import re
import shutil
import subprocess
from collections import Counter

import pytest

from bench import object_cache
from bench.microkernel_table import build_config, library_flags
from bench.object_cache import Unit

# Functions whose loops run over float32 (or over pairs of bfloat16) and that take a share of a layer's time.
HOT = re.compile(
    r"\b(activate_tile<float>|tile<.*|finish_in_memory<.*|sum_lines<float.*|copy_lines<float.*|copy_every_second<float.*"
    r"|interleave<.*|compute_tiles<.*|plain_tiles<.*)\(|\bmask_line<"
)
ARITHMETIC = re.compile(
    r"v?(?:add|sub|mul|div|max|min|cmp\w*|fn?m(?:add|sub)\w{3}|u?comi|and|andn|xor|or|blendv)(ps|pd|ss|sd)$"
)

TAIL = 8  # what is left of a line after its vectors


def functions(path):
    """(name, its instructions) of an object."""
    command = ["objdump", "-d", "-C", "--no-show-raw-insn", "--no-addresses", str(path)]
    name, found = "", {}
    for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
        if line.startswith("<") and line.endswith(">:"):
            name = line[1:-2]
            found.setdefault(name, [])
        elif line.startswith("\t") and name:
            found[name].append(line.split()[0])
    return found


@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump, of binutils")
@pytest.mark.parametrize("source", [name for name in build_config().KERNEL_SOURCES if "dispatch" not in name])
def test_hot_functions_compute_in_vectors(source):
    (path,) = object_cache.compile_units([Unit(build_config().CSRC / source, library_flags())])
    scalar, seen = [], 0
    for name, instructions in functions(path).items():
        short = name.replace("(anonymous namespace)::", "")
        if not HOT.search(short):
            continue
        kinds = Counter(m[1][0] for m in map(ARITHMETIC.match, instructions) if m)
        seen += 1
        if kinds["s"] > kinds["p"] + TAIL:
            scalar.append(f"{short[:120]}: {kinds['s']} on single elements, {kinds['p']} on vectors")
    assert seen and not scalar, "\n".join(scalar)
