"""An iteration of the alignment as `dina_rl.alignment.loop` makes it, with its seconds."""

from collections.abc import Sequence
from time import perf_counter
from typing import TypeVar

import torch

from benchmarks.clocks import Clock
from dina_rl.alignment.algorithms.registry import open_algorithm
from dina_rl.alignment.loop import Experience, Learner, plan
from dina_rl.config import AlignRun
from dina_rl.config.base import Positive, Section
from dina_rl.types import Weights

Handle = TypeVar("Handle")
Published = TypeVar("Published", bound=Weights)

SAMPLE, UPDATE = "sample and score", "update"
Seconds = dict[str, float]  # by SAMPLE and UPDATE


class IterationSizes(Section):
    """How large an iteration is: `configs/local.yaml`'s."""

    prompts: Positive = 8
    """groups of an iteration"""
    group_size: Positive = 12
    """samples of a group"""
    groups_per_call: Positive = 2
    """groups sampled and scored in one batch"""
    micro_batch_size: Positive = 24
    """samples of a forward with a gradient"""
    updates: Positive = 2
    """optimizer updates of an iteration"""


def iterate(
    run: AlignRun,
    prompts: Sequence[str],
    experience: Experience[Handle, Published],
    learner: Learner[Handle, Published],
    number: int,
    clock: Clock = perf_counter,
) -> Seconds:
    """Iteration `number` of a run whose earlier ones are done; publishing counts as update."""
    begin = clock()
    groups = experience.collect(plan(run, prompts, number))
    scores = {name: torch.stack([group.scores[name] for group in groups]) for name in run.rewards.scorers}
    advantages = open_algorithm(run).weigh(scores)
    sampled = clock()
    kept = advantages.kept.nonzero().flatten().tolist()
    learner.update(number, [groups[i].handle for i in kept], advantages.values[kept], 1.0)
    experience.publish(learner.policy())
    return {SAMPLE: sampled - begin, UPDATE: clock() - sampled}
