"""What can be set."""

from pathlib import Path

from dina_rl.config.base import NonNegative, Positive, Section


class BenchmarkRun(Section):
    """Trials of damaged inputs, each in a process of its own."""

    trials: Positive = 300
    """damaged inputs, shared evenly by the kinds"""
    seed: NonNegative = 0
    """of what is drawn"""
    only: str | None = None
    """a kind by (a part of) its name; None: all"""
    trial: NonNegative | None = None
    """this one alone of every kind, as a find names it; None: the first ones"""
    keep: Path | None = None
    """directory for the damaged inputs of finds, and for what was said of them; None: they go"""
    processes: Positive = 2
    """trials at a time"""
    limit_s: Positive = 20
    """seconds of a processor that one may take; beside a busy machine's other work it may last 15 times that long"""
    memory_mib: Positive = 640
    """memory that one may take, beside what the process began with"""
