"""The alignment run on one screen, over two Protocols that in-process objects and Ray actors satisfy alike.

    plan -> rollout + score -> advantages -> update -> publish -> (measure, checkpoint) -> next iteration

Every draw is keyed by what it is for, so who does the work, and how many do, cannot change the numbers.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch

from dina_rl.alignment.algorithms.registry import open_algorithm
from dina_rl.alignment.measurement import EvaluationItem, Measurement, evaluation_items
from dina_rl.alignment.prompts import Prompts
from dina_rl.alignment.record import Recorder
from dina_rl.config import AlignRun
from dina_rl.errors import RunStopped, WorkLost
from dina_rl.seeding import generator
from dina_rl.termination import Terminated, deferred, heard
from dina_rl.types import PolicyWeights, Weights, WorkItem

Handle = TypeVar("Handle")  # a sampled group, or a reference to one that stays where it was made
Used = TypeVar("Used", contravariant=True)  # the same, where it is trained on
Published = TypeVar("Published", bound=Weights)  # weights as the learner offers them and the sampler takes them
Offered = TypeVar("Offered", bound=Weights, covariant=True)
Taken = TypeVar("Taken", bound=Weights, contravariant=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredGroup(Generic[Handle]):
    handle: Handle
    scores: dict[str, torch.Tensor]  # [G] by scorer, and a judge's position bias beside them


class Measuring(Protocol):
    """Where measurements come from."""

    def measure(self, items: Sequence[EvaluationItem]) -> Measurement:
        """Golden and proxy of the published weights."""
        ...


class Experience(Measuring, Protocol[Handle, Taken]):
    """Where rollouts and rewards come from too."""

    def collect(self, items: Sequence[WorkItem]) -> list[ScoredGroup[Handle]]:
        """Roll out and score one group per item, in order, with the weights published last."""
        ...

    def publish(self, weights: Taken | PolicyWeights) -> None:
        """Sample with `weights` from now on."""
        ...


class Learner(Protocol[Used, Offered]):
    """Where updates happen; see `PolicyLearner` for the meaning of each method."""

    def update(
        self, iteration: int, handles: Sequence[Used], advantages: torch.Tensor, kl_scale: float
    ) -> dict[str, float]: ...

    def policy(self) -> Offered: ...

    def average(self) -> Offered: ...

    def state(self) -> dict[str, torch.Tensor]: ...

    def load_state(self, state: dict[str, torch.Tensor]) -> None: ...


@deferred()
def align(
    run: AlignRun,
    prompts: Prompts,
    experience: Experience[Handle, Published],
    learner: Learner[Handle, Published],
    recorder: Recorder,
) -> None:
    """Train for `run.iterations` iterations, continuing from `recorder`'s last checkpoint if it has one.

    Raises:
        RunStopped: too many groups of an iteration had a reward that is not finite.
        WorkLost: what was sampled or learnt went with a node; what could be kept of it is in a checkpoint.
        StorageFailed: storage refuses.
        Terminated: SIGTERM came; what was learnt is in a checkpoint.
    """
    with recorder.settled():
        algorithm, watch = open_algorithm(run), recorder.watch
        start, state = recorder.restore()
        if state is not None:
            learner.load_state(state)
            del state  # of all weights it is 16 bytes a parameter
        experience.publish(learner.average())
        if start == 0:
            with recorder.timed("measure"), heard():
                base = measure_base(run, prompts.test, experience)
            recorder.base(base)
        if start == 0 or (measures(run, start) and not recorder.history.measured(start)):
            measure(run, prompts.dev, start, learner.average(), experience, learner, recorder)
        experience.publish(learner.policy())

        for iteration in recorder.progress(range(start, start if watch.stopped else run.iterations)):
            with kept(iteration, learner, recorder), recorder.timed("rollout"), heard():
                groups = experience.collect(plan(run, prompts.train, iteration))
                found = {name: torch.stack([group.scores[name] for group in groups]) for name in groups[0].scores}
                scores = {name: found.pop(name) for name in run.rewards.scorers}
            advantages = algorithm.weigh(scores)
            if advantages.failed > run.rollout.max_failed * len(groups):
                raise RunStopped(
                    f"iteration {iteration}: {advantages.failed} of {len(groups)} groups have a reward that is not "
                    f"finite (rollout.max_failed allows {run.rollout.max_failed:.0%})"
                )
            with kept(iteration, learner, recorder), recorder.timed("update"):
                used = advantages.kept.nonzero().flatten().tolist()
                handles = [groups[i].handle for i in used]
                metrics: dict[str, float] = {"updates": 0}
                if handles:
                    metrics = learner.update(iteration, handles, advantages.values[used], watch.kl_scale)
                    recorder.warn(algorithm.gate(metrics))
            done = iteration + 1
            with recorder.timed("publish"):
                if not measures(run, done):  # the average comes first, and then these
                    experience.publish(learner.policy())
            recorder.iteration(iteration, scores, advantages, metrics, beside=found)
            del groups, handles  # trajectories, or references to them: whoever needs them longer has its own

            if measures(run, done):
                average = learner.average()
                experience.publish(average)
                measure(run, prompts.dev, done, average, experience, learner, recorder)
                experience.publish(learner.policy())
            if done % run.checkpoint_every == 0 or done == run.iterations or watch.stopped:
                recorder.settle()  # before there are two states
                recorder.checkpoint(done, learner.state())
            if watch.stopped:
                break

        final: Published | PolicyWeights = recorder.checkpoints.best_weights() if watch.stopped else learner.average()
        experience.publish(final)
        with recorder.timed("measure"), heard():
            aligned = measure_aligned(run, prompts.test, experience, recorder.opponents("test"))
        recorder.aligned(aligned)
        recorder.export(final)


def measures(run: AlignRun, done: int) -> bool:
    """Whether the curves have a point after `done` iterations, beside the one before all of them."""
    return done % run.golden.every == 0 or done == run.iterations


@contextmanager
def kept(done: int, learner: Learner[Handle, Published], recorder: Recorder) -> Iterator[None]:
    """What was learnt in the `done` iterations before a block, which leaves the learner as it was or loses it.

    It is saved if the block ends early and the state can still be had: the next attempt begins there.
    """
    try:
        yield
    except (WorkLost, Terminated):
        recorder.leave()
        if done > recorder.checkpoints.done():
            with suppress(WorkLost):  # the state went the same way
                recorder.checkpoint(done, learner.state())
        raise


def measure(
    run: AlignRun,
    prompts: Sequence[str],
    done: int,
    average: Published,
    experience: Experience[Handle, Published],
    learner: Learner[Handle, Published],
    recorder: Recorder,
) -> None:
    """A point of the curves, for the average, which is published.

    The learner's state is kept, or taken back to the best one, as the watch says.
    """
    opponents = recorder.opponents("dev") if done else None
    with kept(done, learner, recorder), recorder.timed("measure"), heard():
        found = measure_dev(run, prompts, experience, opponents)
    recorder.measured(done, found, average)
    if recorder.watch.keeps_state and recorder.watch.improved:
        recorder.checkpoints.keep_best_state(learner.state())
    elif recorder.watch.rolls_back:
        learner.load_state(recorder.checkpoints.best_state())


def plan(run: AlignRun, prompts: Sequence[str], iteration: int) -> list[WorkItem]:
    """The groups of an iteration: prompts come from a reshuffled deck per epoch, `prompts_per_iteration` at a time.

    Within one iteration no prompt comes twice: a deck's remainder smaller than one iteration is left out.
    """
    count = run.rollout.prompts_per_iteration
    if count > len(prompts):
        raise ValueError(
            f"rollout.prompts_per_iteration is {count}, but there are only {len(prompts)} training prompts"
        )
    epoch, position = divmod(iteration, len(prompts) // count)
    deck = torch.randperm(len(prompts), generator=generator(run.seed, "prompts", epoch)).tolist()
    return [
        WorkItem(iteration=iteration, prompt_id=i, prompt=prompts[i], group_size=run.rollout.group_size)
        for i in deck[position * count : (position + 1) * count]
    ]


def measure_dev(
    run: AlignRun, prompts: Sequence[str], experience: Measuring, opponents: torch.Tensor | None = None
) -> Measurement:
    """The curve's point: dev prompts at the rollout's guidance scale.

    Args:
        opponents: what judges compare with, the start's pictures [dev_samples, 3, H, W]; None: it is measured itself.
    """
    golden, scale = run.golden, run.rollout.guidance_scale
    items = evaluation_items("dev", prompts, golden.dev_samples, scale, golden.batch_size, opponents)
    return experience.measure(items)


def measure_base(run: AlignRun, prompts: Sequence[str], experience: Measuring) -> list[Measurement]:
    """The base model on the test prompts over guidance scales, the rollout's own included.

    That one comes first: its pictures are what judges compare all others with.
    """
    own = run.rollout.guidance_scale
    first = _measure_test(run, prompts, experience, own)
    opponents = first.images if run.compares else None
    others = [_measure_test(run, prompts, experience, scale, opponents) for scale in {*run.golden.guidances} - {own}]
    return sorted([first, *others], key=lambda measurement: measurement.guidance_scale)


def measure_aligned(
    run: AlignRun, prompts: Sequence[str], experience: Measuring, opponents: torch.Tensor | None = None
) -> list[Measurement]:
    """The aligned model on the test prompts: at the rollout's guidance scale and at `golden.aligned_guidances`."""
    scales = sorted({run.rollout.guidance_scale, *run.golden.aligned_guidances})
    return [_measure_test(run, prompts, experience, scale, opponents) for scale in scales]


def _measure_test(
    run: AlignRun,
    prompts: Sequence[str],
    experience: Measuring,
    scale: float,
    opponents: torch.Tensor | None = None,
) -> Measurement:
    golden = run.golden
    items = evaluation_items("test", prompts, golden.test_samples, scale, golden.batch_size, opponents)
    return experience.measure(items)
