"""Turns at GPUs that rollout actors, scorers and learner ranks share: one kind is at work, the others rest."""

from collections.abc import Callable
from dataclasses import dataclass

import ray

from dina_rl.alignment.layout import Kind
from dina_rl.config import WorkersConfig
from dina_rl.sleep import SharedGPU


@dataclass(frozen=True, slots=True, kw_only=True)
class _Crew:
    """All actors of a kind."""

    rest: Callable[[], None]
    wake: Callable[[], None]


class OnSharedGPU:
    """What `Shifts` tells an actor; who is one sets `_gpu`."""

    _gpu: SharedGPU

    @ray.method
    def rest(self) -> None:
        self._gpu.rest()

    @ray.method
    def wake(self) -> None:
        self._gpu.wake()


class Shifts:
    """Who rests has given back what its allocator kept, and with `workers.sleep` moved its models to the host.

    In the split layout everybody has GPUs of its own, and nobody waits for a turn.
    """

    def __init__(self, workers: WorkersConfig) -> None:
        self.in_turns = workers.colocated
        self._sleep = workers.sleep
        self._crews: dict[Kind, _Crew] = {}
        self._at_work: Kind | None = None

    def join(self, kind: Kind, *, rest: Callable[[], None], wake: Callable[[], None]) -> None:
        """Take part, with actors that have just been created; each call returns when all of them have followed it.

        With `workers.sleep` they rest at once, so that the next kind finds room to load its models.
        """
        self._crews[kind] = _Crew(rest=rest, wake=wake)
        if self._sleep:
            rest()

    def turn(self, kind: Kind) -> None:
        """From here to the next turn `kind` is at work, and no other."""
        if not self.in_turns or kind == self._at_work:
            return
        before, self._at_work = self._at_work, None  # nobody, if one of them is lost on the way
        if before is not None:
            self._crews[before].rest()
        self._crews[kind].wake()
        self._at_work = kind
