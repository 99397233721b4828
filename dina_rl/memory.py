"""Peak memory of a run over all its processes."""

import os
import threading
from types import TracebackType

import psutil

INTERVAL_S = 0.5


class PeakMemory:
    """Context manager that samples the resident memory of this process and its descendants.

    Pages that processes share are counted once per process, so the peak is an upper bound; peaks shorter than half a
    second can be missed.
    """

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peak-memory", daemon=True)

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(timeout=10)

    def _watch(self) -> None:
        root = psutil.Process(os.getpid())
        while not self._stop.wait(INTERVAL_S):
            total = 0
            for process in [root, *root.children(recursive=True)]:
                try:
                    total += process.memory_info().rss
                except psutil.NoSuchProcess:  # it ended between the listing and the look
                    continue
            self.peak_bytes = max(self.peak_bytes, total)
