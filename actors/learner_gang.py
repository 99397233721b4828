"""The loop's learner on Ray: a gang of ranks, and what it takes to build it anew when one is lost."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import ray
import torch
from ray.exceptions import ObjectLostError, RayTaskError

from actors.gang import Gang, GangLost
from actors.learner import LearnerActor, Offering
from actors.losses import losses_told
from actors.placement import Placement
from actors.remote import Part, RemoteRollout, RemoteWeights, brought_here, in_parts
from actors.shifts import Shifts
from dina_rl.config import AlignRun
from dina_rl.errors import RunStopped
from dina_rl.types import Rollout

log = logging.getLogger(__name__)

Result = TypeVar("Result")

State = dict[str, torch.Tensor]  # of the learner


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteUpdate:
    """An update's arguments, to be made on a gang as often as one is lost. It keeps its rollouts in the store."""

    iteration: int
    picks: tuple[tuple[int, int], ...]
    advantages: torch.Tensor
    kl_scale: float
    objects: tuple[ray.ObjectRef[list[Rollout]] | ray.ObjectRef[torch.Tensor] | None, ...]

    def on(self, gang: Gang[LearnerActor]) -> ray.ObjectRef[dict[str, float]]:
        """Make it; returns its metrics, which all ranks compute alike."""
        return gang.call(
            lambda rank: rank.update.remote(self.iteration, self.picks, self.advantages, self.kl_scale, *self.objects)
        )[0]


class RayLearner:
    """The learner's gang, with what it takes to build it anew: a snapshot of its whole state, and the updates since.

    When a rank is lost, the new gang loads the snapshot (weights, moments, average), makes these updates again in their
    order, and then the call that was lost, so that a run with losses ends with the numbers of a run without. A snapshot
    is made every `workers.snapshot_every` updates, and whenever somebody asks for the state. Of it each rank's share
    lies on that rank's node, and rollouts on theirs: where a node takes them along, every method raises `WorkLost`.
    """

    def __init__(self, run: AlignRun, placement: Placement, shifts: Shifts) -> None:
        self.restarts = 0
        self._run = run
        self._placement = placement
        self._shifts = shifts
        self._snapshot: tuple[Part, ...] | None = None  # None: as built from the configuration's seed
        self._since: list[RemoteUpdate] = []  # in order
        self._gang: Gang[LearnerActor] | None = None  # between a loss and the next call
        while self._gang is None:
            try:
                self._gang = self._build()
            except GangLost as lost:
                self._note(lost)
        shifts.join("learner", rest=self._rest, wake=self._wake)

    @losses_told()
    def update(
        self, iteration: int, handles: Sequence[RemoteRollout], advantages: torch.Tensor, kl_scale: float
    ) -> dict[str, float]:
        calls = {handle.call: handle.gradients for handle in handles}
        position = {call: index for index, call in enumerate(calls)}
        update = RemoteUpdate(
            iteration=iteration,
            picks=tuple((position[handle.call], handle.number) for handle in handles),
            advantages=advantages,
            kl_scale=kl_scale,
            objects=tuple(each for pair in calls.items() for each in pair),
        )
        metrics = self._fetch(self._survive(update.on))
        self._since.append(update)
        if len(self._since) == self._run.workers.snapshot_every:
            self._take_snapshot()
        return metrics

    @losses_told()
    def policy(self) -> RemoteWeights:
        return self._shares("policy")

    @losses_told()
    def average(self) -> RemoteWeights:
        return self._shares("average")

    def _shares(self, what: Offering) -> RemoteWeights:
        """The shares of all ranks, each in the store of its node."""

        def take_parts(gang: Gang[LearnerActor]) -> RemoteWeights:
            offers = [self._fetch(offer) for offer in gang.call(lambda rank: rank.offer.remote(what))]
            taken = gang.call_often(lambda rank: rank.take.remote(), [count for _, count in offers])
            return RemoteWeights(
                version=offers[0][0],
                parts=tuple(part for of_rank in taken for part in of_rank),
                timeout_s=self._run.workers.call_timeout_s,
            )

        return self._survive(take_parts)

    @losses_told()
    def state(self) -> State:
        if self._snapshot is None or self._since:
            self._take_snapshot()
        assert self._snapshot is not None
        return brought_here(self._snapshot, timeout_s=self._run.workers.call_timeout_s)

    @losses_told()
    def load_state(self, state: State) -> None:
        part_bytes = self._run.workers.weights_part_mib * 2**20
        kept = self._snapshot = tuple(ray.put(part) for part in in_parts(state, part_bytes))
        self._since = []
        self._survive(lambda gang: gang.call(lambda rank: rank.load_state.remote(*kept)))

    def _take_snapshot(self) -> None:
        """The state as it is; the updates that led to it, and with them their rollouts, are no longer needed."""
        self._snapshot = self._shares("state").parts
        self._since = []

    def shutdown(self) -> None:
        if self._gang is not None:
            self._gang.shutdown()

    def _build(self) -> Gang[LearnerActor]:
        workers, placement = self._run.workers, self._placement
        gang = Gang(
            lambda rank: ray.remote(**placement.options("learner", rank))(LearnerActor).remote(rank, self._run),
            workers.learner_ranks,
            name="learner",
            start_timeout_s=workers.start_timeout_s,
            call_timeout_s=workers.call_timeout_s,
        )
        gang.call(lambda rank: rank.build.remote())
        kept = self._snapshot
        if kept is not None:
            gang.call(lambda rank: rank.load_state.remote(*kept))
        for update in self._since:
            update.on(gang)
        return gang

    def _survive(self, work: Callable[[Gang[LearnerActor]], Result]) -> Result:
        """`work` on the gang, or on its successors.

        Raises:
            RunStopped: a rank says so, or more gangs were lost than `workers.max_restarts`.
        """
        while True:
            try:
                self._shifts.turn("learner")
                if self._gang is None:
                    self._gang = self._build()
                return work(self._gang)
            except ObjectLostError:
                self._gang = None  # all its ranks were killed
                raise
            except RayTaskError as error:
                if isinstance(error.cause, RunStopped):
                    self._gang = None  # the same
                    raise error.cause from None
                raise
            except GangLost as lost:
                self._note(lost)

    def _note(self, lost: GangLost) -> None:
        self._gang = None
        self.restarts += 1
        if self.restarts > self._run.workers.max_restarts:
            raise RunStopped(f"{lost}; replaced {self.restarts - 1} times (workers.max_restarts)") from lost
        again = len(self._since)
        log.warning("%s; building the learner anew from its last snapshot and making updates again: %d", lost, again)

    def _rest(self) -> None:
        try:
            if self._gang is not None:
                self._gang.call(lambda rank: rank.rest.remote())
        except GangLost as lost:  # it rests for good
            self._note(lost)

    def _wake(self) -> None:
        if self._gang is not None:
            self._gang.call(lambda rank: rank.wake.remote())

    def _fetch(self, ref: ray.ObjectRef[Result]) -> Result:
        return ray.get(ref, timeout=self._run.workers.call_timeout_s)
