"""The loop's two Protocols on Ray: where text actors, rollout actors, scorers and the learner's ranks meet.

                                 weights (object store)
                        +------------------------------------------+
                        v                                          |
    text pool ---> rollout pool ---rollout refs----> scorer pool   learner gang
       embeddings'      |                              |           ^
       refs             +-------- rollout refs --------|-----------+
                                                       +--> scores [G] to the driver, who makes advantages of them

Embeddings, rollouts and the reward's gradients at them stay in the store of the node that made them; the driver passes
references. Where the kinds share GPUs they take turns (`actors/shifts.py`); else encoding and scoring overlap with
sampling.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Generic, Literal, TypeVar, cast

import ray
import torch
from ray.exceptions import RayTaskError

from actors.gang import Gang, GangLost
from actors.handles import Actor, AnyRef, Handle, both
from actors.learner import LearnerActor
from actors.placement import ActorOptions, Placement
from actors.pool import Pool
from actors.rollout import RolloutActor
from actors.scorer import ScorerActor
from actors.shifts import Shifts
from actors.text import TextActor
from dina_rl.alignment.algorithms.registry import open_algorithm
from dina_rl.alignment.layout import Kind
from dina_rl.alignment.loop import ScoredGroup
from dina_rl.alignment.measurement import EvaluationItem, Measurement, combine
from dina_rl.alignment.planning import loads
from dina_rl.alignment.rollout import in_calls
from dina_rl.alignment.texts import EncodedTexts
from dina_rl.backbones.text import TOGETHER
from dina_rl.config import AlignRun
from dina_rl.errors import RunStopped
from dina_rl.loading import announce, say
from dina_rl.types import PolicyWeights, Rollout, WorkItem

log = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")

Scores = dict[str, torch.Tensor]  # by scorer
State = dict[str, torch.Tensor]  # of the learner


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteRollout:
    """Rollout number `number` of the list that a call returned, and where the reward's gradients of that call are."""

    call: ray.ObjectRef[list[Rollout]]
    gradients: ray.ObjectRef[torch.Tensor] | None
    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteWeights:
    """The policy's weights in the object store, where the learner's rank 0 left them."""

    version: int
    parts: tuple[ray.ObjectRef[PolicyWeights], ...]
    timeout_s: float  # longest wait for one part

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """All of them, brought here."""
        parts = (ray.get(part, timeout=self.timeout_s) for part in self.parts)
        return {name: tensor for part in parts for name, tensor in part.tensors.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedItem(Generic[Item]):
    """An item of work and where the embeddings that it reads are."""

    item: Item
    texts: ray.ObjectRef[EncodedTexts | None] | None  # None: whoever does the work has the text encoders


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoding(Generic[Item]):
    """How a text actor is asked for the embeddings of `together` items at once: its forwards are full so."""

    together: int
    call: Callable[[Handle[TextActor], Sequence[Item]], ray.ObjectRef[EncodedTexts]]


class RayExperience:
    """Embeddings, rollouts and scores from pools of actors. Who is lost is replaced, the work done again, same numbers.

    Weights are sent when they are first sampled with: some are replaced before, and where turns are taken the text
    actors have theirs in between.
    """

    def __init__(self, run: AlignRun, placement: Placement, shifts: Shifts) -> None:
        workers = run.workers
        self._rewards = run.rewards
        self._groups_per_call = run.rollout.groups_per_call
        self._with_gradient = open_algorithm(run).wants_reward_gradients
        self._timeout_s = workers.call_timeout_s
        self._part_bytes = workers.weights_part_mib * 2**20
        self._shifts = shifts
        self._has_text_workers = workers.text_workers > 0
        self._unsent: tuple[ray.ObjectRef[PolicyWeights], ...] = ()

        def text(options: ActorOptions) -> Handle[TextActor]:
            return ray.remote(**options)(TextActor).remote(run)

        def rollout(options: ActorOptions) -> Handle[RolloutActor]:
            return ray.remote(**options)(RolloutActor).remote(run)

        def scorer(options: ActorOptions) -> Handle[ScorerActor]:
            return ray.remote(**options)(ScorerActor).remote(run)

        self.texts = _pool("text workers", text, run, placement, "text", workers.text_workers)
        shifts.join(
            "text",
            rest=lambda: _tell(self.texts, lambda actor: actor.rest.remote()),
            wake=lambda: _tell(self.texts, lambda actor: actor.wake.remote()),
        )
        self.rollouts = _pool("rollout workers", rollout, run, placement, "rollout", workers.rollout_workers)
        shifts.join(
            "rollout",
            rest=lambda: _tell(self.rollouts, lambda actor: actor.rest.remote()),
            wake=lambda: _tell(self.rollouts, lambda actor: actor.wake.remote()),
        )
        self.scorers = _pool("scorers", scorer, run, placement, "scorer", workers.scorers)
        shifts.join(
            "scorer",
            rest=lambda: _tell(self.scorers, lambda actor: actor.rest.remote()),
            wake=lambda: _tell(self.scorers, lambda actor: actor.wake.remote()),
        )

    def wait_until_ready(self) -> None:
        """Block until all actors have loaded their models."""
        self.texts.wait_until_ready()
        self.rollouts.wait_until_ready()
        self.scorers.wait_until_ready()

    def collect(self, items: Sequence[WorkItem]) -> list[ScoredGroup[RemoteRollout]]:
        calls = in_calls(items, self._groups_per_call)
        gradients: dict[ray.ObjectRef[list[Rollout]], ray.ObjectRef[torch.Tensor]] = {}  # of a call's rewards

        def score(actor: Handle[ScorerActor], sampled: ray.ObjectRef[list[Rollout]]) -> ray.ObjectRef[Scores]:
            if not self._with_gradient:
                return actor.score.remote(sampled)
            scores, gradients[sampled] = both(actor.score_with_gradient.remote(sampled))
            return scores

        results = self._sample_and_score(
            calls,
            Encoding(
                together=-(-TOGETHER // self._groups_per_call),
                call=lambda actor, few: actor.for_rollout.remote([item for call in few for item in call]),
            ),
            lambda actor, call: actor.rollout.remote(call.item, call.texts),
            score,
        )
        return [
            ScoredGroup(
                handle=RemoteRollout(call=ref, gradients=gradients.get(ref), number=number),
                scores={name: rows[number] for name, rows in scores.items()},
            )
            for (ref, scores), call in zip(results, calls, strict=True)
            for number in range(len(call))
        ]

    def publish(self, weights: RemoteWeights | PolicyWeights) -> None:
        if isinstance(weights, RemoteWeights):
            self._unsent = weights.parts
        else:
            self._unsent = tuple(ray.put(part) for part in weights.split(self._part_bytes))

    def measure(self, items: Sequence[EvaluationItem]) -> Measurement:
        results = self._sample_and_score(
            items,
            Encoding(together=1, call=lambda actor, few: actor.for_evaluation.remote(few)),
            lambda actor, call: actor.evaluate.remote(call.item, call.texts),
            lambda actor, samples: actor.score_evaluation.remote(samples),
        )
        samples = ray.get([ref for ref, _ in results], timeout=self._timeout_s)
        return combine(samples, [scores for _, scores in results], self._rewards)

    def shutdown(self) -> None:
        self.texts.shutdown()
        self.rollouts.shutdown()
        self.scorers.shutdown()

    def _sample_and_score(
        self,
        items: Sequence[Item],
        encoding: Encoding[Item],
        sample: Callable[[Handle[RolloutActor], EncodedItem[Item]], ray.ObjectRef[Result]],
        score: Callable[[Handle[ScorerActor], ray.ObjectRef[Result]], ray.ObjectRef[Scores]],
    ) -> list[tuple[ray.ObjectRef[Result], Scores]]:
        """(reference to the samples, their scores) per item, in order; the three stages overlap where they can."""
        samples: dict[int, ray.ObjectRef[Result]] = {}

        def kept(sampled: Iterable[tuple[int, ray.ObjectRef[Result]]]) -> Iterator[tuple[int, ray.ObjectRef[Result]]]:
            for index, ref in sampled:
                samples[index] = ref
                yield index, ref

        calls = self._encode(items, encoding)
        self._shifts.turn("rollout")
        self._send_weights()
        sampled = self._stage("rollout", self.rollouts, calls, sample)
        scored = self._stage("scorer", self.scorers, kept(sampled), score)
        scores = {index: ray.get(ref, timeout=self._timeout_s) for index, ref in scored}
        return [(samples[index], scores[index]) for index in range(len(items))]

    def _encode(self, items: Sequence[Item], encoding: Encoding[Item]) -> Iterator[tuple[int, EncodedItem[Item]]]:
        """Every item with its number; its embeddings too, where rollout actors do not make them themselves."""
        if not self._has_text_workers:
            return ((index, EncodedItem(item=item, texts=None)) for index, item in enumerate(items))
        few = encoding.together
        chunks = ((start, items[start : start + few]) for start in range(0, len(items), few))
        encoded = self._stage("text", self.texts, chunks, encoding.call)
        optional = partial(cast, "ray.ObjectRef[EncodedTexts | None]")  # a reference is invariant in what it refers to
        return (
            (index, EncodedItem(item=items[index], texts=optional(ref)))
            for start, ref in encoded
            for index in range(start, min(start + few, len(items)))
        )

    def _stage(
        self,
        kind: Kind,
        pool: Pool[Actor],
        items: Iterable[tuple[int, Item]],
        call: Callable[[Handle[Actor], Item], ray.ObjectRef[Result]],
    ) -> Iterable[tuple[int, ray.ObjectRef[Result]]]:
        """(number, result) of every numbered item; all at once where the next stage is another's turn."""
        self._shifts.turn(kind)
        results = _numbered(pool, items, call)
        return list(results) if self._shifts.in_turns else results

    def _send_weights(self) -> None:
        parts, self._unsent = self._unsent, ()

        def load(actor: Handle[RolloutActor]) -> AnyRef:
            # In order, one at a time; the actor refuses what follows a part that it did not get.
            return [actor.load_weights.remote(part) for part in parts][-1]

        if parts:
            self.rollouts.broadcast(load)


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteUpdate:
    """An update's arguments, to be made on a gang as often as one is lost. It keeps its rollouts in the store."""

    iteration: int
    picks: tuple[tuple[int, int], ...]
    advantages: torch.Tensor
    kl_scale: float
    objects: tuple[ray.ObjectRef[list[Rollout]] | ray.ObjectRef[torch.Tensor] | None, ...]

    def on(self, gang: Gang[LearnerActor]) -> ray.ObjectRef[dict[str, float]]:
        """Make it; returns its metrics."""
        return gang.call(
            lambda rank: rank.update.remote(self.iteration, self.picks, self.advantages, self.kl_scale, *self.objects)
        )


class RayLearner:
    """The learner's gang, with what it takes to build it anew: a snapshot of its whole state, and the updates since.

    When a rank is lost, the new gang loads the snapshot (weights, moments, average), makes these updates again in their
    order, and then the call that was lost, so that a run with losses ends with the numbers of a run without. A snapshot
    is made every `workers.snapshot_every` updates, and whenever somebody asks for the state.
    """

    def __init__(self, run: AlignRun, placement: Placement, shifts: Shifts) -> None:
        self.restarts = 0
        self._run = run
        self._placement = placement
        self._shifts = shifts
        self._snapshot: ray.ObjectRef[State] | None = None  # None: as built from the configuration's seed
        self._since: list[RemoteUpdate] = []  # in order
        self._gang: Gang[LearnerActor] | None = self._build()  # None between a loss and the next call
        shifts.join("learner", rest=self._rest, wake=self._wake)

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

    def policy(self) -> RemoteWeights:
        return self._weights("policy")

    def average(self) -> RemoteWeights:
        return self._weights("average")

    def _weights(self, which: Literal["policy", "average"]) -> RemoteWeights:
        def take_parts(gang: Gang[LearnerActor]) -> RemoteWeights:
            version, count = self._fetch(gang.call(lambda rank: rank.offer.remote(which)))
            parts = tuple(gang.call(partial(_take, part)) for part in range(count))
            return RemoteWeights(version=version, parts=parts, timeout_s=self._run.workers.call_timeout_s)

        return self._survive(take_parts)

    def state(self) -> State:
        if self._snapshot is None or self._since:
            self._take_snapshot()
        assert self._snapshot is not None
        return self._fetch(self._snapshot)

    def load_state(self, state: State) -> None:
        kept = self._snapshot = ray.put(state)
        self._since = []
        self._survive(lambda gang: gang.call(lambda rank: rank.load_state.remote(kept)))

    def _take_snapshot(self) -> None:
        """The state as it is; the updates that led to it, and with them their rollouts, are no longer needed."""
        self._snapshot = self._survive(lambda gang: gang.call(lambda rank: rank.state.remote()))
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
            gang.call(lambda rank: rank.load_state.remote(kept))
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
            except RayTaskError as error:
                if isinstance(error.cause, RunStopped):
                    self._gang = None  # it is gone: all its ranks were killed
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


@contextmanager
def open_actors(run: AlignRun) -> Iterator[tuple[RayExperience, RayLearner]]:
    """All actors of an alignment run, with their models loaded; killed at the end.

    Raises:
        RunStopped: they did not come up within `workers.start_timeout_s`.
    """
    begin = perf_counter()
    told = [announce(who, sizes) for who, sizes in loads(run).items()]
    with ExitStack() as stack:
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


def _take(part: int, rank: Handle[LearnerActor]) -> ray.ObjectRef[PolicyWeights]:
    return rank.take.remote(part)


def _numbered(
    pool: Pool[Actor],
    items: Iterable[tuple[int, Item]],
    call: Callable[[Handle[Actor], Item], ray.ObjectRef[Result]],
) -> Iterator[tuple[int, ray.ObjectRef[Result]]]:
    """(number, result) of every numbered item, as they finish."""
    numbers: list[int] = []

    def as_they_come() -> Iterator[Item]:
        for number, item in items:
            numbers.append(number)
            yield item

    for position, ref in pool.stream(as_they_come(), call):
        yield numbers[position], ref


def _tell(pool: Pool[Actor], call: Callable[[Handle[Actor]], AnyRef]) -> None:
    """Whose turn it is; returns when all actors have heard it."""
    pool.broadcast(call, about="turn")
    pool.wait_until_ready()


def _pool(
    name: str,
    spawn: Callable[[ActorOptions], Handle[Actor]],
    run: AlignRun,
    placement: Placement,
    kind: Kind,
    size: int,
) -> Pool[Actor]:
    workers = run.workers
    return Pool(
        lambda number: spawn(placement.options(kind, number)),
        size,
        name=name,
        start_timeout_s=workers.start_timeout_s,
        call_timeout_s=workers.call_timeout_s,
        max_restarts=workers.max_restarts,
    )
