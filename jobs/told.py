"""What ends a job, told by Ray Data's tasks and actors in columns of their rows.

An error that they raise Ray Data wraps, and shows its traceback, in the driver and in the logs of whoever reads the
rows.
"""

from collections.abc import Mapping

from dina_rl.errors import BadInput, RunStopped
from dina_rl.storage import StorageFailed

FATAL = (ValueError, RunStopped)
"""What a job answers with a line, wherever it is raised: a mistake in its inputs, or that it cannot go on."""

NOTHING: dict[str, str | int] = {"failed": "", "number": 0}
"""Where nothing has gone wrong."""


def told(error: ValueError | RunStopped) -> dict[str, str | int]:
    """The columns that say so; all of `told` and `NOTHING` go together in one dataset."""
    return {"failed": str(error), "number": error.number if isinstance(error, StorageFailed) else 0}


def check_told(row: Mapping[str, object]) -> None:
    """Whether a row is what was asked for.

    Raises:
        StorageFailed: its maker could not write or read.
        BadInput: another error was `told`.
    """
    failed, number = row["failed"], row["number"]
    assert isinstance(failed, str)
    assert isinstance(number, int)
    if number:
        raise StorageFailed(failed, number)
    if failed:
        raise BadInput(failed)
