"""What Ray says of lost actors and values, or on behalf of an actor, in the loop's own words."""

from collections.abc import Iterator
from contextlib import contextmanager

from ray.exceptions import GetTimeoutError, ObjectLostError, OutOfMemoryError, RayActorError, RayError, RayTaskError

from dina_rl.errors import RunStopped, WorkLost

ACTOR_DEATHS = (RayActorError, OutOfMemoryError)
"""What Ray raises of a call whose actor is gone. One that it killed for its node's memory has an error of its own.

To be caught after `RayTaskError`, which is also an instance of its cause: that may be another actor's death.
"""


@contextmanager
def losses_told() -> Iterator[None]:
    """Inside, a value that was lost with its node, or did not come from there in time, is `WorkLost`.

    It may be met here or in an actor that was to read it: Ray's error of a failed call is then also an instance of
    what the call failed of. Nothing lost is made again by Ray: the actors that made it have gone on.
    Where an actor says that the run cannot go on, that alone is raised: Ray's error would show a traceback.
    """
    try:
        yield
    except (ObjectLostError, GetTimeoutError) as lost:
        cause = lost.cause if isinstance(lost, RayTaskError) else lost
        raise WorkLost(f"a value was lost with its node: {_first_sentence(cause)}") from lost
    except RayTaskError as error:
        if isinstance(error.cause, RunStopped):
            raise error.cause from None
        raise


def cause_of(death: RayError) -> str:
    """What an actor died of, in a line: of Ray's own page the sentences that say it, and where the process was."""
    lines = [line for line in str(death).splitlines() if line.strip()] or [type(death).__name__]
    if isinstance(death, OutOfMemoryError):
        return lines[0]
    if isinstance(death, RayActorError) and death.actor_init_failed:
        return lines[-1].strip()  # of a traceback
    page = [line.strip().partition(": ") for line in lines if line.startswith("\t")]
    where = [f"{name} {value}" for name, _, value in page if name in ("pid", "ip")]
    sentences = [line for line in lines if not line.startswith("\t")]
    why = sentences[min(1, len(sentences) - 1)]  # the first says only that it died
    said, _, exit_of_process = why.partition("Worker exit detail: ")
    said = said.partition(". ")[0]
    if exit_of_process:
        said = f"{said}: {exit_of_process.partition('. ')[0]}"
    return f"{said} ({', '.join(where)})" if where else said


def _first_sentence(error: object) -> str:
    return str(error).strip().partition("\n")[0].partition(". ")[0]
