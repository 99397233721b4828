"""Work that is begun anew where a node takes it along."""

from collections.abc import Callable
from typing import TypeVar

from dina_rl.errors import RunStopped, WorkLost
from dina_rl.loading import say

Result = TypeVar("Result")


def anew_where_lost(attempt: Callable[[], Result], *, times: int, setting: str, goes_on: Callable[[], str]) -> Result:
    """What `attempt` returns, tried anew at its last checkpoint.

    Args:
        times: that it may be begun anew.
        setting: which says so, for messages.
        goes_on: what happens next, for the line that tells of a loss.

    Raises:
        RunStopped: it was lost once more.
    """
    for again in range(times + 1):
        try:
            return attempt()
        except WorkLost as lost:
            if again == times:
                raise RunStopped(f"{lost}; begun again {again} times ({setting})") from lost
            say(f"{lost}; {goes_on()}")
    raise AssertionError("every attempt returns or raises")
