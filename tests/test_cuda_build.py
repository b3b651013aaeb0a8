"""What compiled CUDA kernels prove without a GPU: registers, spills, shared memory, and the instructions in SASS.

Kernels are compiled with nvcc into a temporary folder, without torch: for one architecture, and of the tensor-core
kernels those of one dtype, both chosen by CONV1X1_TEST_SEED. CONV1X1_TEST_FULL=1 compiles all for every architecture,
CONV1X1_TEST_ARCHS="80 86 89" all for those. SASS needs cuobjdump: pip install 'conv1x1_ext[test]'. Instructions are
judged inside the main loop, the innermost loops that multiply: what is saved around it, as for the call of the
epilogue, costs nothing.
"""

import concurrent.futures
import os
import random
import re
import subprocess
from collections import defaultdict
from dataclasses import dataclass

import pytest
from covering import full
from cuda_toolkit import find_cuobjdump, find_nvcc
from helpers import ROOT

from bench.microkernel_table import build_config

# Bytes of shared memory that a block may have: static and opted in.
STATIC = 48 << 10
SHARED = {"80": 163 << 10, "86": 99 << 10, "89": 99 << 10, "90": 227 << 10, "100": 227 << 10, "120": 99 << 10}
REGISTERS = 65536  # of a multiprocessor
GEMM = re.compile(r"conv1x1::cuda::gemm_(mma|simt)<")
# mma.sync in SASS, by element type.
PRODUCTS = {"__half": "HMMA.16816.F32", "__nv_bfloat16": "HMMA.16816.F32.BF16", "float": "HMMA.1688.F32.TF32"}


def chosen(values):
    return random.Random(os.environ.get("CONV1X1_TEST_SEED", "0")).choice(list(values))


def asked_sources():
    """The three dtypes of the tensor-core kernels are instantiations of one template, a third of a minute each."""
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    if full() or "CONV1X1_TEST_ARCHS" in os.environ:
        return sources
    tensor_cores = [source for source in sources if source.name.startswith("gemm_mma_")]
    return [source for source in sources if source not in tensor_cores] + [chosen(tensor_cores)]


def asked_archs():
    asked = os.environ.get("CONV1X1_TEST_ARCHS", " ".join(SHARED) if full() else chosen(SHARED))
    archs = asked.split()
    assert set(archs) <= set(SHARED), f"CONV1X1_TEST_ARCHS: expected some of {', '.join(SHARED)}, got {asked}"
    return archs


@dataclass
class Kernel:
    """What ptxas -v says of one entry function; the bounds are those of __launch_bounds__."""

    registers: int = 0
    static_shared: int = 0
    stack: int = 0
    spilled: int = 0  # bytes, stores and loads
    max_threads: int = 0
    min_blocks: int = 1


def parse_ptxas(text):
    """By mangled name. Device functions that were not inlined report their own frames, which are not a kernel's."""
    kernels, entry, function = {}, None, None
    for line in text.splitlines():
        if m := re.search(r"Compiling entry function '(\w+)'", line):
            entry = m[1]
            kernels[entry] = Kernel()
        elif m := re.search(r"Function properties for (\w+)", line):
            function = m[1]
        elif m := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            if function in kernels:
                kernels[function].stack = int(m[1])
                kernels[function].spilled = int(m[2]) + int(m[3])
        elif m := re.search(r"Used (\d+) registers", line):
            kernels[entry].registers = int(m[1])
            shared = re.search(r"(\d+) bytes smem", line)
            kernels[entry].static_shared = int(shared[1]) if shared else 0
    return kernels


def parse_bounds(ptx, kernels):
    """Fills in the launch bounds from PTX."""
    for name, bounds in re.findall(r"\.entry (\w+)\s*\(.*?\)\s*([^{]*)\{", ptx, re.S):
        if name in kernels:
            threads = re.search(r"\.maxntid (\d+)(?:, (\d+))?(?:, (\d+))?", bounds)
            blocks = re.search(r"\.minnctapersm (\d+)", bounds)
            if threads:
                sizes = [int(s) for s in threads.groups() if s]
                kernels[name].max_threads = sizes[0] * (sizes[1] if len(sizes) > 1 else 1)
            kernels[name].min_blocks = int(blocks[1]) if blocks else 1


def parse_sass(text):
    """Instructions as (address, operation, branch target or None), by mangled name."""
    functions, current = {}, None
    for line in text.splitlines():
        if m := re.search(r"Function : (\S+)", line):
            current = functions.setdefault(m[1], [])
        elif m := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)([^;]*);", line):
            target = re.search(r"0x([0-9a-f]+)\s*$", m[3]) if m[2].startswith("BRA") else None
            current.append((int(m[1], 16), m[2], int(target[1], 16) if target else None))
    return functions


def main_loops(instructions, multiplies):
    """The operations of each innermost loop in which ``multiplies`` says yes to one."""
    loops = [(t, a) for a, _, t in instructions if t is not None and t < a]
    found = []
    for begin, end in loops:
        body = [op for a, op, _ in instructions if begin <= a <= end]
        inner = [(b, e) for b, e in loops if (b, e) != (begin, end) and begin <= b and e <= end]
        nested = any(multiplies(op) and b <= a <= e for b, e in inner for a, op, _ in instructions)
        if any(map(multiplies, body)) and not nested:
            found.append(body)
    return found


def demangle(names):
    out = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return dict(zip(names, out.stdout.splitlines(), strict=True))


PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z4gemmv' for 'sm_80'
ptxas info    : Function properties for _Z4gemmv
    8 bytes stack frame, 12 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers, 1024 bytes smem, 1240 bytes cmem[0]
ptxas info    : Function properties for _Z8epiloguev
    16 bytes stack frame, 20 bytes spill stores, 24 bytes spill loads
ptxas info    : Compiling entry function '_Z4copyv' for 'sm_80'
ptxas info    : Function properties for _Z4copyv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 20 registers, 400 bytes cmem[0]
"""
PTX = ".visible .entry _Z4gemmv(\n.param .u64 a\n)\n.maxntid 128, 2, 1\n.minnctapersm 2\n{ ret; }"
SASS = """\
		Function : _Z4gemmv
        /*0000*/                   STL [R1], R2 ;                    /* 0x00 */
                                                                     /* 0x01 */
        /*0010*/                   MOV R1, 0x20 ;                    /* 0x00 */
        /*0020*/                   LDSM.16.M88.4 R28, [R28+0x10] ;   /* 0x00 */
        /*0030*/                   HMMA.16816.F32 R4, R8, R2, R4 ;   /* 0x00 */
        /*0040*/              @!P1 BRA 0x20 ;                        /* 0x00 */
        /*0050*/                   LDL R2, [R1] ;                    /* 0x00 */
        /*0060*/               @P0 BRA 0x10 ;                        /* 0x00 */
        /*0070*/                   BRA 0x70 ;                        /* 0x00 */
"""


def test_parsers():
    kernels = parse_ptxas(PTXAS)
    parse_bounds(PTX, kernels)
    assert kernels["_Z4gemmv"] == Kernel(128, 1024, 8, 16, 256, 2) and kernels["_Z4copyv"] == Kernel(20)
    functions = parse_sass(SASS)
    assert [op for _, op, _ in functions["_Z4gemmv"]][:3] == ["STL", "MOV", "LDSM.16.M88.4"]
    loops = main_loops(functions["_Z4gemmv"], lambda op: op.startswith("HMMA"))
    assert loops == [["LDSM.16.M88.4", "HMMA.16816.F32", "BRA"]]


@pytest.fixture(scope="module")
def nvcc():
    return find_nvcc() or pytest.skip("no nvcc")


def compile_arch(nvcc, arch, folder):
    """Kernels by mangled name, and the cubins."""
    flags = [*build_config().NVCC_FLAGS, f"-arch=sm_{arch}", "-Xptxas", "-v", "-cubin", "--keep", "--keep-dir"]
    # One after the other under xdist: its other worker is compiling another architecture.
    jobs = 1 if int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) > 1 else 2

    def one(source):
        keep = folder / source.stem
        keep.mkdir()
        cubin = folder / f"{source.stem}.cubin"
        command = [nvcc, *flags, keep, "-o", cubin, source]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout + result.stderr
        assert "warning" not in result.stderr, result.stderr
        kernels = parse_ptxas(result.stdout + result.stderr)
        parse_bounds("".join(p.read_text() for p in keep.glob("*.ptx")), kernels)
        return kernels, cubin

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        results = list(pool.map(one, asked_sources()))
    return {name: k for kernels, _ in results for name, k in kernels.items()}, [cubin for _, cubin in results]


# Of heuristics.h's kinds of tensor-core kernels, those in which A or B lies along k.
ALONG_K = {0, 1, 3, 5}


def problems_of_registers(kernels, names):
    for mangled, k in kernels.items():
        name = names[mangled]
        if k.static_shared > STATIC:
            yield f"{name}: {k.static_shared} bytes of static shared memory"
        if k.max_threads == 0:
            yield f"{name}: no __launch_bounds__"
        if -(-k.registers // 8) * 8 * k.max_threads * k.min_blocks > REGISTERS:
            yield f"{name}: {k.registers} registers for {k.min_blocks} blocks of {k.max_threads} threads"
        if k.stack or k.spilled:
            yield f"{name}: {k.stack} bytes of stack, {k.spilled} bytes spilled"


def problems_of_instructions(name, instructions):
    operations = [op for _, op, _ in instructions]
    kind = GEMM.search(name)[1]
    product = re.compile("HMMA|FFMA|DFMA" if kind == "simt" else "HMMA").match
    loops = main_loops(instructions, product)
    if not loops:
        yield f"{name}: no main loop"
    for loop in loops:
        local = [op for op in loop if op.startswith(("LDL", "STL"))]
        if local:
            yield f"{name}: local memory in the main loop: {local}"
    if kind == "simt":
        return
    element = re.search(r"MmaConfig<([\w:]+),", name)[1]
    wanted = {"__half": "HMMA.16816.F32", "__nv_bfloat16": "HMMA.16816.F32.BF16", "float": "HMMA.1688.F32.TF32"}[
        element
    ]
    if not any(wanted in (op, op.removesuffix(".F32")) or op == wanted for op in operations):
        yield f"{name}: no {wanted}"
    if any(op.startswith("HMMA") and op != wanted for op in operations):
        yield f"{name}: other products than {wanted}"
    if not any(op.startswith("LDGSTS") for op in operations):
        yield f"{name}: no LDGSTS, so cp.async is not asynchronous"
    # Of float32, ldmatrix serves only tiles along k.
    along_k = int(re.search(r"MmaConfig<[\w:]+, (\d+), \d+>", name)[1]) in ALONG_K
    if (element != "float" or along_k) and not any(op.startswith("LDSM") for op in operations):
        yield f"{name}: no LDSM"


@pytest.mark.parametrize("arch", asked_archs())
def test_kernels(nvcc, arch, tmp_path):
    kernels, cubins = compile_arch(nvcc, arch, tmp_path)
    names = demangle(sorted(kernels))
    counts = defaultdict(int)
    for name in names.values():
        counts[m[0] if (m := GEMM.search(name)) else "others"] += 1
    assert counts["conv1x1::cuda::gemm_mma<"] >= 3 and counts["conv1x1::cuda::gemm_simt<"] >= 4, dict(counts)
    problems = list(problems_of_registers(kernels, names))
    cuobjdump = find_cuobjdump()
    for cubin in cubins if cuobjdump else ():
        sass = subprocess.run([cuobjdump, "-sass", cubin], capture_output=True, text=True, check=True).stdout
        for mangled, instructions in parse_sass(sass).items():
            if GEMM.search(names.get(mangled, "")):
                problems += problems_of_instructions(names[mangled], instructions)
    assert not problems, "\n".join(problems)
    if cuobjdump is None:
        pytest.skip("registers are right; SASS was not read: no cuobjdump (pip install 'conv1x1_ext[test]')")


def test_shared_memory_of_every_configuration(nvcc, tmp_path):
    """Of the smallest architecture, as one table serves all."""
    program = tmp_path / "shared_bytes"
    command = [nvcc, *build_config().NVCC_FLAGS, "-arch=sm_80", "-o", program, ROOT / "tests" / "cuda_shared_bytes.cu"]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    lines = subprocess.run([program], capture_output=True, text=True, check=True).stdout.splitlines()
    smallest = {}
    for line in lines:
        kind, threads, shared = map(int, line.split())
        assert 0 < threads <= 1024 and threads % 32 == 0 and 0 < shared <= max(SHARED.values()), line
        smallest[kind] = min(shared, smallest.get(kind, shared))
    # Plans leave out what a GPU has no room for; something must be left of every kind.
    assert len(smallest) >= 7 and max(smallest.values()) <= min(SHARED.values()), smallest
