"""What the benchmarks' options have in common."""

from typing import NoReturn

from pydantic import ValidationError

from dina_rl.cli import fail
from dina_rl.config.keys import explain


def one_or_several(value: object) -> object:
    """A single word of an option that takes several."""
    return [value] if isinstance(value, str) else value


def refuse(error: ValueError) -> NoReturn:
    """End the program over options that make no run: one line."""
    fail("; ".join(explain(error)) if isinstance(error, ValidationError) else str(error))
