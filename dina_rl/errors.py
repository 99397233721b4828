"""The errors of a run that are no mistake of a program."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

LONGEST = 80
"""Characters of a value in an error line."""

LONGEST_LINE = 2000


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
    """A value in an error line, ASCII and short. Of one that is large, nests deep or holds itself no more is read."""
    text = ""
    for part in _parts(value):
        text += part
        if len(text) > LONGEST:
            return f"{text[: LONGEST - 3]}..."
    return text


def _parts(value: object) -> Iterator[str]:
    """What `ascii` says of a value, bit by bit: every level of its nesting is a character at least."""
    if type(value) is dict:
        yield from _listed("{", ((key, each) for key, each in value.items()), "}")
    elif type(value) is list:
        yield from _listed("[", ((each,) for each in value), "]")
    elif type(value) is tuple:
        yield from _listed("(", ((each,) for each in value), ",)" if len(value) == 1 else ")")
    elif isinstance(value, str | bytes | bytearray):
        yield ascii(value if len(value) <= LONGEST else value[: LONGEST + 1])
    elif type(value) is int and value.bit_length() > LONGEST * 4:
        yield f"{value:#x}"  # which has no limit of digits
    else:
        yield ascii(value)


def _listed(begin: str, entries: Iterable[tuple[object, ...]], end: str) -> Iterator[str]:
    yield begin
    for number, entry in enumerate(entries):
        yield ", " if number else ""
        for place, each in enumerate(entry):
            yield ": " if place else ""
            yield from _parts(each)
    yield end


def one_line(message: str) -> str:
    """A message for a terminal: on one line, with what is no text of it escaped, and cut where it has no end.

    What it quotes, names of files above all, may hold ends of lines and codes that terminals obey.
    """
    line = " ".join(message.split("\n"))
    line = line if len(line) <= LONGEST_LINE else f"{line[: LONGEST_LINE - 3]}..."
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in line)
