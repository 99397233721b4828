"""All actors of an alignment run: up with their models loaded, killed at the end."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from time import perf_counter

from actors.experience import RayExperience
from actors.learner_gang import RayLearner
from actors.losses import losses_told
from actors.placement import Placement
from actors.shifts import Shifts
from dina_rl.alignment.planning import loads
from dina_rl.config import AlignRun
from dina_rl.loading import announce, say


@contextmanager
def open_actors(run: AlignRun) -> Iterator[tuple[RayExperience, RayLearner]]:
    """All actors of an alignment run, with their models loaded; killed at the end.

    Raises:
        RunStopped: they did not come up within `workers.start_timeout_s`, or one of them says so, at any time.
    """
    begin = perf_counter()
    told = [announce(who, sizes) for who, sizes in loads(run).items()]
    with losses_told(), ExitStack() as stack:
        placement, shifts = Placement(run.workers), Shifts(run.workers)
        stack.callback(placement.release)
        experience = RayExperience(run, placement, shifts)
        stack.callback(experience.shutdown)
        learner = RayLearner(run, placement, shifts)  # while the pools load their models
        stack.callback(learner.shutdown)
        experience.wait_until_ready()
        if any(told):
            say(f"all actors are ready after {perf_counter() - begin:.0f} s")
        yield experience, learner
