"""What a second is."""

from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Literal

import psutil

Clock = Callable[[], float]
ClockName = Literal["wall", "cpu"]


def processor_seconds() -> float:
    """That this process and those that it started have had of the cores; blind to who else was using them."""
    here = psutil.Process()
    total = 0.0
    for process in (here, *here.children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:  # it ended between the listing and the look
            continue
        total += times.user + times.system
    return total


CLOCKS: Mapping[ClockName, Clock] = {"wall": perf_counter, "cpu": processor_seconds}
