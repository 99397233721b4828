"""TensorBoard's event files, written so that trouble with storage ends a run with one line."""

import threading
from collections.abc import Callable
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from dina_rl.storage import writing

WRITER = "tensorboard.summary.writer.event_file_writer"


class EventFile:
    """A `SummaryWriter` on a directory.

    Its thread does the writing, and keeps an error for the next call; `write` makes that call at once.

    Args:
        purge_step: what was written from this step on is about to be written again; None: nothing was.

    Raises:
        StorageFailed: storage refuses.
    """

    def __init__(self, directory: Path, purge_step: int | None = None) -> None:
        _keep_quiet()
        self._directory = directory
        with writing(directory / "events"):
            self._writer = SummaryWriter(str(directory), purge_step=purge_step)

    def write(self, add: Callable[[SummaryWriter], object]) -> None:
        """Raises StorageFailed where what `add` adds, or was added before, cannot be written."""
        with writing(self._directory / "events"):
            add(self._writer)
            self._writer.flush()

    def close(self) -> None:
        """Raises StorageFailed as `write`."""
        with writing(self._directory / "events"):
            self._writer.close()


class _OthersAlone:
    """A hook for threads' exceptions without those of the writer's, of which `write` is about to tell."""

    def __init__(self, before: Callable[[threading.ExceptHookArgs], object]) -> None:
        self._before = before

    def __call__(self, args: threading.ExceptHookArgs) -> None:
        if type(args.thread).__module__ != WRITER or not isinstance(args.exc_value, OSError):
            self._before(args)


def _keep_quiet() -> None:
    if not isinstance(threading.excepthook, _OthersAlone):
        threading.excepthook = _OthersAlone(threading.excepthook)
