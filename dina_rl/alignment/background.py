"""Work that goes on while the run does."""

import threading
from collections.abc import Callable


class Background:
    """One piece of work at a time, in a thread that ends with the process: what it writes must appear whole or not."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._failed: BaseException | None = None

    def begin(self, work: Callable[[], None]) -> None:
        """Do it from now on. The one before has to be settled."""
        assert self._thread is None, "settle() the one before"
        self._thread = threading.Thread(target=self._do, args=(work,), name="background", daemon=True)
        self._thread.start()

    @property
    def works(self) -> bool:
        """Whether there is something to wait for."""
        return self._thread is not None and self._thread.is_alive()

    def settle(self) -> None:
        """Wait for its end, and raise what it ended with. An interrupted wait may be taken up again."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        failed, self._failed = self._failed, None
        if failed is not None:
            raise failed

    def _do(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # whatever it is, it is raised where somebody waits
            self._failed = error
