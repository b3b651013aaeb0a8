"""Sources and compiler flags, once: setup.py builds the library from them, bench/microkernel_table.py the table."""

from __future__ import annotations

from pathlib import Path

CSRC = Path(__file__).resolve().parent

# -ffp-contract=off: products and sums fuse only where a kernel says so, so that every tail of a kernel gives the same
# bits. No -march: instruction sets are chosen at run time (cpu/microkernels/isa.h).
CXX_FLAGS = ["-std=c++17", "-O3", "-g0", "-ffp-contract=off", "-fno-math-errno", "-fopenmp", "-fvisibility=hidden"]
CXX_FLAGS += ["-Wall", "-Wextra"]
LINK_FLAGS = ["-fopenmp"]

# Torch-free: what the microkernel table is built from.
KERNELS = ("portable", "avx2", "avx512", "avx512_bf16")
KERNEL_SOURCES = ["cpu/dispatch.cpp", *(f"cpu/microkernels/{name}.cpp" for name in KERNELS)]
LIBRARY_SOURCES = [
    "ops.cpp",
    "checks.cpp",
    "lower.cpp",
    "cpu/conv1x1_cpu.cpp",
    "cpu/avg_pool.cpp",
    "cpu/plan.cpp",
    "cpu/driver.cpp",
    *KERNEL_SOURCES,
]
TABLE_SOURCES = ["cpu/table_pybind.cpp", "lower.cpp", "cpu/plan.cpp", "cpu/driver.cpp", *KERNEL_SOURCES]

# The stable ABI of torch 2.10: one library for 2.10 and later, and no Python symbol, so for any Python.
TORCH_TARGET = "0x020a000000000000"
