"""An iteration as the GPUs of a layout see it: who computes how much, and who waits for whom.

Time is counted in operations of one GPU: all GPUs are alike and keep one pace in all phases.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from dina_rl.alignment.algorithms.base import Work
from dina_rl.alignment.costs import Costs
from dina_rl.alignment.layout import KINDS, Kind, Layout, layout_of
from dina_rl.config import AlignRun, WorkersConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Passes:
    """What an iteration is made of, whoever does it."""

    encoded: int  # texts
    sampled: float  # forwards of the rollout
    scored: int  # samples
    trained: int  # forwards with a backward
    reference: int  # forwards of the base
    prepared: float  # forwards before the first update
    rewarded: int  # samples whose reward the learner differentiates


def count_passes(run: AlignRun, work: Work) -> Passes:
    """Passes of one sample each; a guided velocity is two."""
    learner, samples = run.learner, run.rollout.prompts_per_iteration * run.rollout.group_size
    kept = run.rollout.prompts_per_iteration * run.kept_of_group
    guided = 2 if learner.guidance_in_loss else 1
    trained = kept * work.trained_passes * learner.epochs * guided
    return Passes(
        encoded=run.rollout.prompts_per_iteration + samples * work.texts_beside,
        sampled=samples * work.sampled_passes * (1 if run.rollout.guidance_scale == 1 else 2),
        scored=samples,
        trained=trained,
        reference=trained if run.kl_weight else 0,
        prepared=kept * work.prepared_passes * guided,
        rewarded=kept * work.reward_passes * learner.epochs,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Operations:
    """Operations of an iteration by phase."""

    text: float
    rollout: float
    scorer: float
    learner: float

    def of(self, kind: Kind) -> float:
        return {"text": self.text, "rollout": self.rollout, "scorer": self.scorer, "learner": self.learner}[kind]

    @property
    def total(self) -> float:
        return self.text + self.rollout + self.scorer + self.learner


def count_operations(run: AlignRun, passes: Passes, costs: Costs, *, with_gradient: bool) -> Operations:
    """Operations of an iteration; `with_gradient`: the scorers differentiate the reward too."""
    return Operations(
        text=passes.encoded * costs.prompt,
        rollout=passes.sampled * costs.sampled,
        scorer=passes.scored * (costs.score_gradient if with_gradient else costs.score),
        learner=passes.trained * costs.trained
        + (passes.reference + passes.prepared) * costs.forward
        + passes.rewarded * costs.score_gradient,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """An iteration on the GPUs of a layout."""

    length: float  # from start to end
    busy: tuple[float, ...]  # share of it in which each GPU computes

    @property
    def mean_busy(self) -> float:
        return sum(self.busy) / len(self.busy)


def timeline(run: AlignRun, layout: Layout, operations: Operations) -> Timeline | None:
    """How an iteration passes; None where not every actor has a GPU."""
    gpus = layout.gpus()
    if any(seat.gpus == 0 for seat in layout.seats()):
        return None
    calls = calls_of(run)
    if run.workers.text_workers == 0:
        operations = replace(operations, text=0.0, rollout=operations.rollout + operations.text)
    numbers = {kind: sum(seat.kind == kind for seat in layout.seats()) for kind in KINDS}
    dealt = {kind: _dealt(calls, number) for kind, number in numbers.items()}
    dealt["learner"] = [1 / numbers["learner"]] * numbers["learner"]
    loads = [
        {
            kind: sum(dealt[kind][seat.number] * operations.of(kind) for seat in gpu if seat.kind == kind)
            for kind in KINDS
        }
        for gpu in gpus
    ]
    length = _length(layout, loads, operations, calls)
    return Timeline(length=length, busy=tuple(sum(load.values()) / length for load in loads))


def calls_of(run: AlignRun) -> int:
    """Calls of rollout actors in an iteration."""
    return -(-run.rollout.prompts_per_iteration // run.rollout.groups_per_call)


def _dealt(calls: int, actors: int) -> list[float]:
    """The share of equal calls that each actor has."""
    return [(calls // actors + (number < calls % actors)) / calls for number in range(actors)]


def _length(layout: Layout, loads: Sequence[Mapping[Kind, float]], operations: Operations, calls: int) -> float:
    """A phase ends with the GPU that has most of it; those that overlap lag by one call behind each other."""
    longest = {kind: max(load[kind] for load in loads) for kind in KINDS}
    if layout.in_turns:
        return sum(longest.values())
    beside: tuple[Kind, ...] = ("text", "rollout", "scorer")
    together = max(sum(load[kind] for kind in beside) for load in loads)
    one_call = {kind: operations.of(kind) / calls for kind in beside}
    ends = [longest[kind] + sum(one_call[other] for other in beside if other != kind) for kind in beside]
    return max(together, *ends) + longest["learner"]


def other_layouts(run: AlignRun, gpus: int) -> Iterator[WorkersConfig]:
    """Layouts of as many GPUs that the run's batches divide over."""
    workers, rollout, learner = run.workers, run.rollout, run.learner
    minibatch = rollout.prompts_per_iteration // learner.updates_per_iteration * run.kept_of_group

    def fits(ranks: int) -> bool:
        alone = learner.engine == "torch" and ranks > 1
        return not alone and minibatch % (learner.micro_batch_size * ranks) == 0

    kept = {"cpus_per_actor": workers.cpus_per_actor, "threads_per_actor": workers.threads_per_actor}
    texts = workers.text_workers
    if fits(gpus):
        yield WorkersConfig(gpus=gpus, text_workers=min(texts, gpus), **kept)
    shares = {"gpus_per_rollout": 1, "gpus_per_scorer": 1, "gpus_per_rank": 1}
    for ranks in filter(fits, range(1, gpus - 1)):
        for scorers in range(1, gpus - ranks):
            rollouts = gpus - ranks - scorers
            numbers = {"rollout_workers": rollouts, "scorers": scorers, "learner_ranks": ranks}
            few = {"text_workers": min(texts, rollouts)}
            yield WorkersConfig.model_validate({**kept, **shares, **numbers, **few})


def best_layout(run: AlignRun, gpus: int, operations: Operations) -> tuple[WorkersConfig, Timeline] | None:
    """The layout of as many GPUs whose iterations are shortest; None where the batches divide over none."""
    found = [(workers, timeline(run, layout_of(workers), operations)) for workers in other_layouts(run, gpus)]
    known = [(workers, line) for workers, line in found if line is not None]
    return min(known, key=lambda pair: pair[1].length, default=None)


def measuring(run: AlignRun, costs: Costs) -> float:
    """Operations of all measurements of a run: dev samples along the way, test samples before and after."""
    golden, scale = run.golden, run.rollout.guidance_scale
    steps = golden.num_steps or run.rollout.num_steps
    points = 1 + -(-run.iterations // golden.every)

    def sampling(samples: int, guidances: Sequence[float]) -> float:
        passes = sum(steps * (1 if each == 1 else 2) for each in guidances)
        return samples * (passes * costs.sampled + len(guidances) * (costs.score + costs.golden))

    tested = [*{scale, *golden.guidances}, *{scale, *golden.aligned_guidances}]
    return points * sampling(golden.dev_samples, [scale]) + sampling(golden.test_samples, tested)
