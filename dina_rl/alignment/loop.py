"""The alignment run on one screen, over two Protocols that in-process objects and Ray actors satisfy alike.

    plan -> rollout + score -> advantages -> update -> publish -> (measure, checkpoint) -> next iteration

Every draw is keyed by what it is for, so who does the work, and how many do, cannot change the numbers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch

from dina_rl.alignment.advantage import Advantages, equal_weights, group_advantages
from dina_rl.alignment.flow_grpo import ratio_gate
from dina_rl.alignment.measurement import EvaluationItem, Measurement, evaluation_items
from dina_rl.alignment.prompts import Prompts
from dina_rl.alignment.record import Recorder
from dina_rl.config import AlignRun
from dina_rl.errors import RunStopped
from dina_rl.scorers.mixture import group_weighted_sum, weighted_sum
from dina_rl.seeding import generator
from dina_rl.types import Weights, WorkItem

Handle = TypeVar("Handle")  # a trajectory, or a reference to one that stays where it was made


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredGroup(Generic[Handle]):
    handle: Handle
    scores: dict[str, torch.Tensor]  # [G] by scorer


class Experience(Protocol[Handle]):
    """Where rollouts, rewards and measurements come from."""

    def collect(self, items: Sequence[WorkItem]) -> list[ScoredGroup[Handle]]:
        """Roll out and score one group per item, in order, with the weights published last."""
        ...

    def publish(self, weights: Weights) -> None:
        """Sample with `weights` from now on."""
        ...

    def measure(self, items: Sequence[EvaluationItem]) -> Measurement:
        """Golden and proxy of the published weights."""
        ...


class Learner(Protocol[Handle]):
    """Where updates happen; see `PolicyLearner` for the meaning of each method."""

    def update(
        self, step: int, handles: Sequence[Handle], advantages: torch.Tensor, kl_scale: float
    ) -> dict[str, float]: ...

    def policy(self) -> Weights: ...

    def average(self) -> Weights: ...

    def state(self) -> dict[str, torch.Tensor]: ...

    def load_state(self, state: dict[str, torch.Tensor]) -> None: ...


def align(run: AlignRun, prompts: Prompts, experience: Experience, learner: Learner, recorder: Recorder) -> None:
    """Train for `run.steps` iterations, continuing from `recorder`'s last checkpoint if it has one.

    Raises:
        RunStopped: too many groups of an iteration had a reward that is not finite.
    """
    start, state = recorder.restore()
    if state is not None:
        learner.load_state(state)
    experience.publish(learner.average())
    if start == 0:
        with recorder.timed("measure"):
            recorder.base(measure_base(run, prompts.test, experience))
            recorder.measured(0, measure_dev(run, prompts.dev, experience), learner.average())
            if run.watch.action == "roll_back":
                roll_back(learner, recorder, 0)
    experience.publish(learner.policy())

    for step in recorder.progress(range(start, start if recorder.stopped else run.steps)):
        with recorder.timed("rollout"):
            groups = experience.collect(plan(run, prompts.train, step))
            scores = {name: torch.stack([group.scores[name] for group in groups]) for name in run.rewards.scorers}
        advantages = weigh(run, scores)
        if advantages.failed > run.rollout.max_failed * len(groups):
            raise RunStopped(
                f"iteration {step}: {advantages.failed} of {len(groups)} groups have a reward that is not finite "
                f"(rollout.max_failed allows {run.rollout.max_failed:.0%})"
            )
        with recorder.timed("update"):
            kept = advantages.kept.nonzero().flatten().tolist()
            handles = [groups[i].handle for i in kept]
            metrics = {"updates": 0}
            if handles:
                metrics = learner.update(step, handles, advantages.values[kept], recorder.kl_scale)
        if handles and run.algorithm == "grpo":
            recorder.warn(ratio_gate(run.grpo.clip_range, metrics["first_ratio_gap"], metrics["first_log_prob_noise"]))
        with recorder.timed("publish"):
            experience.publish(learner.policy())
        recorder.iteration(step, scores, advantages, metrics)
        del groups, handles  # references to trajectories: free them before the next rollout

        done = step + 1
        if done % run.golden.every == 0 or done == run.steps:
            with recorder.timed("measure"):
                average = learner.average()
                experience.publish(average)
                recorder.measured(done, measure_dev(run, prompts.dev, experience), average)
                if run.watch.action == "roll_back":
                    roll_back(learner, recorder, done)
                experience.publish(learner.policy())
        if done % run.checkpoint_every == 0 or done == run.steps or recorder.stopped:
            recorder.checkpoint(done, learner.state())
        if recorder.stopped:
            break

    final = recorder.best() if recorder.stopped else learner.average()
    experience.publish(final)
    with recorder.timed("measure"):
        recorder.aligned(measure_aligned(run, prompts.test, experience))
    recorder.export(final)


def roll_back(learner: Learner, recorder: Recorder, done: int) -> None:
    """Keep the learner's state if iteration `done` was the best in golden; take the kept one up again on an alarm."""
    if recorder.best_at == done:
        recorder.keep_best(learner.state())
    elif recorder.alarms[-1:] == [done]:
        learner.load_state(recorder.kept_best())


def weigh(run: AlignRun, scores: Mapping[str, torch.Tensor]) -> Advantages:
    """What each sample is worth in the update, by its scores [P, G]."""
    if run.algorithm == "refl":
        return equal_weights(weighted_sum(run.rewards, scores))
    combine = group_weighted_sum if run.rewards.normalise == "group" else weighted_sum
    return group_advantages(combine(run.rewards, scores), std=run.grpo.advantage_std, clip=run.grpo.advantage_clip)


def plan(run: AlignRun, prompts: Sequence[str], step: int) -> list[WorkItem]:
    """The groups of iteration `step`: prompts are dealt from a reshuffled deck per epoch, `prompts_per_step` at a time.

    Within one iteration no prompt comes twice: a deck's remainder smaller than one iteration is left out.
    """
    count = run.rollout.prompts_per_step
    if count > len(prompts):
        raise ValueError(f"rollout.prompts_per_step is {count}, but there are only {len(prompts)} training prompts")
    epoch, position = divmod(step, len(prompts) // count)
    deck = torch.randperm(len(prompts), generator=generator(run.seed, "prompts", epoch)).tolist()
    return [
        WorkItem(step=step, prompt_id=i, prompt=prompts[i], group_size=run.rollout.group_size)
        for i in deck[position * count : (position + 1) * count]
    ]


def measure_dev(run: AlignRun, prompts: Sequence[str], experience: Experience) -> Measurement:
    """The curve's point: dev prompts at the rollout's guidance scale."""
    golden = run.golden
    guidance = run.rollout.guidance_scale
    return experience.measure(evaluation_items("dev", prompts, golden.dev_samples, guidance, golden.batch_size))


def measure_base(run: AlignRun, prompts: Sequence[str], experience: Experience) -> list[Measurement]:
    """The base model on the test prompts over guidance scales, the rollout's own included."""
    scales = sorted({run.rollout.guidance_scale, *run.golden.guidances})
    return [_measure_test(run, prompts, experience, scale) for scale in scales]


def measure_aligned(run: AlignRun, prompts: Sequence[str], experience: Experience) -> list[Measurement]:
    """The aligned model on the test prompts: at the rollout's guidance scale and at `golden.aligned_guidances`."""
    scales = sorted({run.rollout.guidance_scale, *run.golden.aligned_guidances})
    return [_measure_test(run, prompts, experience, scale) for scale in scales]


def _measure_test(run: AlignRun, prompts: Sequence[str], experience: Experience, scale: float) -> Measurement:
    golden = run.golden
    return experience.measure(evaluation_items("test", prompts, golden.test_samples, scale, golden.batch_size))
