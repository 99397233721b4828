"""The loop's experience on Ray: where text actors, rollout actors, scorers and the learner's ranks meet.

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

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Generic, TypeVar, cast

import ray
import torch

from actors.handles import Actor, AnyRef, Handle, both
from actors.losses import losses_told
from actors.placement import ActorOptions, Placement
from actors.pool import Pool
from actors.remote import RemoteRollout, RemoteWeights, in_parts
from actors.rollout import RolloutActor
from actors.scorer import ScorerActor
from actors.shifts import Shifts
from actors.text import TextActor
from dina_rl.alignment.algorithms.registry import open_algorithm
from dina_rl.alignment.layout import Kind
from dina_rl.alignment.loop import ScoredGroup
from dina_rl.alignment.measurement import EvaluationItem, Measurement, combine
from dina_rl.alignment.rollout import in_calls
from dina_rl.alignment.texts import EncodedTexts
from dina_rl.backbones.text import TOGETHER
from dina_rl.config import AlignRun
from dina_rl.types import PolicyWeights, Rollout, WorkItem

Item = TypeVar("Item")
Result = TypeVar("Result")

Scores = dict[str, torch.Tensor]  # by scorer


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
    actors have theirs in between. What lies on a node is gone with it: `collect` and `measure` raise `WorkLost`.
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
        self._unsent: RemoteWeights | None = None

        def text(options: ActorOptions) -> Handle[TextActor]:
            return ray.remote(**options)(TextActor).remote(run)

        def rollout(options: ActorOptions) -> Handle[RolloutActor]:
            return ray.remote(**options)(RolloutActor).remote(run)

        def scorer(options: ActorOptions) -> Handle[ScorerActor]:
            return ray.remote(**options)(ScorerActor).remote(run)

        self.texts = _pool(
            "text workers", text, lambda actor: actor.open.remote(), run, placement, "text", workers.text_workers
        )
        shifts.join(
            "text",
            rest=lambda: _tell(self.texts, lambda actor: actor.rest.remote()),
            wake=lambda: _tell(self.texts, lambda actor: actor.wake.remote()),
        )
        self.rollouts = _pool(
            "rollout workers",
            rollout,
            lambda actor: actor.open.remote(),
            run,
            placement,
            "rollout",
            workers.rollout_workers,
        )
        shifts.join(
            "rollout",
            rest=lambda: _tell(self.rollouts, lambda actor: actor.rest.remote()),
            wake=lambda: _tell(self.rollouts, lambda actor: actor.wake.remote()),
        )
        self.scorers = _pool(
            "scorers", scorer, lambda actor: actor.open.remote(), run, placement, "scorer", workers.scorers
        )
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

    @losses_told()
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
        if isinstance(weights, PolicyWeights):
            parts = tuple(ray.put(part) for part in in_parts(weights.tensors, self._part_bytes))
            weights = RemoteWeights(version=weights.version, parts=parts, timeout_s=self._timeout_s)
        self._unsent = weights

    @losses_told()
    def measure(self, items: Sequence[EvaluationItem]) -> Measurement:
        results = self._sample_and_score(
            items,
            # Opponents are pictures, which a text actor has no use for.
            Encoding(
                together=1,
                call=lambda actor, few: actor.for_evaluation.remote([replace(item, opponents=None) for item in few]),
            ),
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
        unsent, self._unsent = self._unsent, None
        if unsent is None:
            return
        version, parts = unsent.version, unsent.parts

        def load(actor: Handle[RolloutActor]) -> AnyRef:
            # In order, one at a time; the actor refuses what follows a part that it did not get.
            return [actor.load_weights.remote(version, n, len(parts), part) for n, part in enumerate(parts)][-1]

        self.rollouts.broadcast(load)


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
    opened: Callable[[Handle[Actor]], AnyRef],
    run: AlignRun,
    placement: Placement,
    kind: Kind,
    size: int,
) -> Pool[Actor]:
    workers = run.workers
    return Pool(
        lambda number: spawn(placement.options(kind, number)),
        size,
        opened=opened,
        name=name,
        start_timeout_s=workers.start_timeout_s,
        call_timeout_s=workers.call_timeout_s,
        max_restarts=workers.max_restarts,
    )
