"""What an alignment algorithm is to the loop, the rollout worker, the learner and the planner, none of which asks which
one it holds.

    check -> [ texts -> sampling -> scorers -> weigh -> objective -> gate ] every iteration

One algorithm is one file beside this one, its section and rules in `config/algorithms.py`, and one line in
`registry.py`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from dina_rl.alignment.advantage import Advantages
from dina_rl.alignment.objective import Objective
from dina_rl.alignment.policy import Policy
from dina_rl.alignment.sampler import PolicySampler
from dina_rl.backbones.base import TextEncoder
from dina_rl.types import Rollout, WorkItem

SomeRollout = TypeVar("SomeRollout", bound=Rollout)

Sampling = Callable[[Sequence[WorkItem], TextEncoder], list[SomeRollout]]
"""One rollout per group; all groups belong to one iteration and go in one batch. Their texts' embeddings are given."""

Texts = Callable[[WorkItem], Sequence[str]]
"""What sampling a group reads beside its prompt and the negative one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What an algorithm does, for people and for the plan's arithmetic."""

    title: str
    sampling: str  # how a sample comes about
    texts_beside: int  # texts of one sample that are encoded beside its prompt
    sampled_passes: float  # forwards of one sample in the rollout, guidance apart; the mean where it is drawn
    prepared_passes: float  # forwards of one sample without a gradient, before an iteration's first update
    trained_passes: int  # forwards with a backward pass of one sample in one epoch
    reward_passes: int  # times that the learner differentiates the reward of one sample in one epoch
    latents_kept: int  # latents of one sample that travel from rollout to learner
    copies_kept: int  # of the trained weights that the objective's own state holds, in checkpoints
    charts: Mapping[str, str]  # what to look at of the learner's metrics: title -> metric


class Algorithm(Protocol[SomeRollout]):
    """One way to align. Built from the run's configuration in every process; it holds no state of its own."""

    wants_reward_gradients: bool  # the scorers are asked for d reward / d latents too
    rounds_apart: bool  # nothing of the update relies on a rollout's velocity being the learner's to the last digit

    def check(self, latent_shape: tuple[int, int, int]) -> None:
        """Look at what only this algorithm reads, before anything starts.

        Raises:
            ValueError: it is missing, or does not fit latents of `latent_shape`.
        """
        ...

    def texts(self, latent_shape: tuple[int, int, int]) -> Texts:
        """What has to be encoded for a group beyond the prompts; called once by whoever encodes."""
        ...

    def sampling(self, sampler: PolicySampler) -> Sampling[SomeRollout]:
        """How a rollout worker samples; called once a process."""
        ...

    def weigh(self, scores: Mapping[str, torch.Tensor]) -> Advantages:
        """What each sample is worth in the update, by its scores [P, G]."""
        ...

    def objective(self, policy: Policy) -> Objective[SomeRollout]:
        """What a rank of the learner trains; called once a process."""
        ...

    def gate(self, metrics: Mapping[str, float]) -> str | None:
        """What a user should know of an iteration's update, by the learner's metrics; None: nothing."""
        ...

    def work(self) -> Work: ...


def prompts_alone(item: WorkItem) -> Sequence[str]:
    """`Texts` of an algorithm that reads no others."""
    return ()
