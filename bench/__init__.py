"""Benchmarks: ``python -m bench.op``, ``bench.microkernel``, ``bench.small_calls``. Nothing here is installed."""
