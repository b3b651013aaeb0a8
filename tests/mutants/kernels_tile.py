"""Faults in the tiles in registers: tails, masks, chains, the epilogue, stores."""

MUTANTS = []
