"""The errors of a run that are no mistake of a program."""

from collections.abc import Iterator
from contextlib import contextmanager


class RunStopped(RuntimeError):
    """A run cannot go on, for a reason that its message says in full; a traceback would add nothing."""

    exit_code = 1


class BadInput(RunStopped):
    """What a run reads is broken, or nothing that it can use, which is found only once it has begun."""

    exit_code = 2


class WorkLost(RuntimeError):
    """What a run had made since its last checkpoint is gone with the node that held it. From there it can go on."""


@contextmanager
def opening() -> Iterator[None]:
    """The block opens what a run is made from, in whatever process.

    Raises:
        BadInput: a ValueError says what is wrong with it.
    """
    try:
        yield
    except ValueError as error:
        raise BadInput(str(error)) from error


def shown(value: object) -> str:
    """A value in an error line, ASCII and short."""
    full = ascii(value)
    return full if len(full) <= 80 else f"{full[:77]}..."
