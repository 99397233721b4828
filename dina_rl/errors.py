"""The errors of a run that are no mistake of a program."""


class RunStopped(RuntimeError):
    """A run cannot go on, for a reason that its message says in full; a traceback would add nothing."""

    exit_code = 1


class WorkLost(RuntimeError):
    """What a run had made since its last checkpoint is gone with the node that held it. From there it can go on."""


def shown(value: object) -> str:
    """A value in an error line, ASCII and short."""
    full = ascii(value)
    return full if len(full) <= 80 else f"{full[:77]}..."
