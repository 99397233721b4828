"""The learner actor: one rank of `PolicyLearner`."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import ray
import torch

from actors.gang import GangMember
from actors.shifts import OnSharedGPU
from dina_rl.alignment.engine import TorchEngine
from dina_rl.alignment.learner import PolicyLearner
from dina_rl.config import AlignRun
from dina_rl.errors import opening
from dina_rl.runtime import configure_process
from dina_rl.sleep import SharedGPU
from dina_rl.types import PolicyWeights, Rollout, TrainingGroup


class LearnerActor(GangMember, OnSharedGPU):
    """A rank of the gang. What every rank computes alike is sent to the driver by rank 0 alone."""

    def __init__(self, rank: int, run: AlignRun) -> None:
        super().__init__(rank, run.workers.learner_ranks, timeout_s=run.workers.call_timeout_s)
        configure_process(run.workers.threads_per_actor)
        self._run = run
        self._learner: PolicyLearner
        self._offered: dict[int, PolicyWeights] = {}
        self._gpu = SharedGPU(sleeps=run.workers.sleep)

    @ray.method
    @opening()
    def build(self) -> None:
        """Load the policy and start the engine; after `join`, because DeepSpeed splits the weights over the ranks."""
        if self._run.learner.engine == "torch":
            assert self.world_size == 1, "the torch engine does not average gradients over ranks"
            self._learner = PolicyLearner(self._run, lambda policy: TorchEngine(policy, self._run.learner))
            return
        from actors.engine import DeepSpeedEngine

        self._learner = PolicyLearner(self._run, lambda policy: DeepSpeedEngine(policy, self._run.learner))

    @ray.method
    def update(
        self,
        iteration: int,
        picks: Sequence[tuple[int, int]],
        advantages: torch.Tensor,
        kl_scale: float,
        *calls: list[Rollout] | torch.Tensor | None,
    ) -> dict[str, float]:
        """Train on rollouts `calls[2 i][j]` for (i, j) in `picks`, with `advantages` [picks, G].

        `calls[2 i + 1]` holds the reward's gradients of call i [groups, G, C, H, W], or is None. (Ray brings objects
        only where they are arguments of their own.)
        """
        groups = []
        for (call, number), row in zip(picks, advantages, strict=True):
            rollouts, gradients = calls[2 * call], calls[2 * call + 1]
            assert isinstance(rollouts, list)
            assert gradients is None or isinstance(gradients, torch.Tensor)
            gradient = None if gradients is None else gradients[number]
            groups.append(TrainingGroup(rollout=rollouts[number], advantages=row, reward_gradient=gradient))
        return self._learner.update(iteration, groups, kl_scale)

    @ray.method
    def offer(self, which: Literal["policy", "average"]) -> tuple[int, int]:
        """Get the weights ready to be taken part by part; returns their version and the number of parts."""
        weights = self._learner.policy() if which == "policy" else self._learner.average()
        self._offered = dict(enumerate(weights.split(self._run.workers.weights_part_mib * 2**20)))
        return weights.version, len(self._offered)

    @ray.method
    def take(self, part: int) -> PolicyWeights:
        """One of the parts offered last; it is not kept. Only rank 0's holds tensors."""
        taken = self._offered.pop(part)
        return taken if self.rank == 0 else replace(taken, tensors={})

    @ray.method
    def state(self) -> dict[str, torch.Tensor]:
        """The learner's state; empty but on rank 0."""
        state = self._learner.state()
        return state if self.rank == 0 else {}

    @ray.method
    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        self._learner.load_state(state)
