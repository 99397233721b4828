"""SIGTERM: of `ray job stop`, of a node that is taken back, of a batch system at its time limit.

It raises `Terminated` wherever the program is, as Ctrl-C raises KeyboardInterrupt; but inside `deferred`, where it must
not come between a change of weights and its record, only in the long waits, which are `heard`.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Terminated(BaseException):
    """Somebody asked this process to end. No `Exception`: nothing but the end of the program handles it."""


class _Signal:
    """Of this process: whether it came, and whether it may interrupt."""

    came = False
    interrupts = True


def listen() -> None:
    """Handle SIGTERM so from now on. Called in the main thread, and again when Ray has set a handler of its own."""
    signal.signal(signal.SIGTERM, _on_signal)


@contextmanager
def listening() -> Iterator[None]:
    """`listen` for the time of a block."""
    before = signal.getsignal(signal.SIGTERM)
    listen()
    try:
        with _unwrapped():
            yield
    finally:
        signal.signal(signal.SIGTERM, before)
        _Signal.came = False


@contextmanager
def deferred() -> Iterator[None]:
    """Inside, SIGTERM waits for the next block that is `heard`."""
    before, _Signal.interrupts = _Signal.interrupts, False
    try:
        yield
    finally:
        _Signal.interrupts = before


@contextmanager
def heard() -> Iterator[None]:
    """Inside, SIGTERM raises `Terminated`; one that was deferred does at once."""
    before, _Signal.interrupts = _Signal.interrupts, True
    try:
        if _Signal.came:
            raise Terminated
        with _unwrapped():
            yield
    finally:
        _Signal.interrupts = before


@contextmanager
def _unwrapped() -> Iterator[None]:
    """What a signal raised, out of Ray's compiled calls too.

    Where one has its result already, it returns that although the handler raised inside it: to Python a SystemError.
    """
    try:
        yield
    except SystemError as error:
        if isinstance(error.__cause__, Terminated | KeyboardInterrupt):
            raise error.__cause__ from None
        raise


def _on_signal(_number: int, _frame: FrameType | None) -> None:
    _Signal.came = True
    if _Signal.interrupts:
        raise Terminated
