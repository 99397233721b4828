"""The error that ends a run with one line."""


class RunStopped(RuntimeError):
    """A run cannot go on, for a reason that its message says in full; a traceback would add nothing."""

    exit_code = 1


def shown(value: object) -> str:
    """A value in an error line, ASCII and short."""
    full = ascii(value)
    return full if len(full) <= 80 else f"{full[:77]}..."
