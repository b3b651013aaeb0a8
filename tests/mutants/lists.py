"""Every mutant, from one list a room."""

from __future__ import annotations

from . import api, cpu, cuda, kernels, kernels_amx, kernels_tile, python_routes
from .mutant import Stale

MUTANTS = [
    *python_routes.MUTANTS,
    *api.MUTANTS,
    *cpu.MUTANTS,
    *kernels.MUTANTS,
    *kernels_tile.MUTANTS,
    *kernels_amx.MUTANTS,
    *cuda.MUTANTS,
]

_twice = {m.name for m in MUTANTS if sum(m.name == other.name for other in MUTANTS) > 1}
if _twice:
    raise Stale(f"names given twice: {', '.join(sorted(_twice))}")
