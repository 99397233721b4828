"""What can be set."""

from pathlib import Path

from dina_rl.config.base import NonNegative, Positive, Section


class BenchmarkRun(Section):
    """Trials of a small run under faults."""

    trials: Positive = 20
    """faults that are tried, one a run"""
    seed: NonNegative = 0
    """of what is drawn"""
    only: str | None = None
    """a fault by (a part of) its name; None: all"""
    keep: Path | None = None
    """directory for the logs of the runs; None: they go"""
