"""Faults of a cluster, and what becomes of a run: `python -m benchmarks.chaos`."""
