"""The learner actor: one rank of `PolicyLearner`."""

from collections.abc import Sequence
from typing import Literal

import torch

from actors.gang import GangMember
from dina_rl.alignment.engine import TorchEngine
from dina_rl.alignment.learner import PolicyLearner
from dina_rl.config import AlignRun
from dina_rl.runtime import configure_process
from dina_rl.types import PolicyWeights, Rollout, TrainingGroup


class LearnerActor(GangMember):
    """A rank of the gang. What every rank computes alike is sent to the driver by rank 0 alone."""

    def __init__(self, rank: int, run: AlignRun) -> None:
        super().__init__(rank, run.workers.learner_ranks, timeout_s=run.workers.call_timeout_s)
        configure_process(run.workers.threads_per_actor)
        self._run = run
        self._learner: PolicyLearner
        self._offered: list[PolicyWeights | None] = []

    def build(self) -> None:
        """Load the policy and start the engine; after `join`, because DeepSpeed splits the weights over the ranks."""
        if self._run.learner.engine == "torch":
            assert self.world_size == 1, "the torch engine does not average gradients over ranks"
            self._learner = PolicyLearner(self._run, lambda policy: TorchEngine(policy, self._run.learner))
            return
        from actors.engine import DeepSpeedEngine

        self._learner = PolicyLearner(self._run, lambda policy: DeepSpeedEngine(policy, self._run.learner))

    def update(
        self,
        iteration: int,
        picks: Sequence[tuple[int, int]],
        advantages: torch.Tensor,
        kl_scale: float,
        *calls: list[Rollout] | torch.Tensor | None,
    ) -> dict[str, float]:
        """Train on rollouts `calls[2 i][j]` for (i, j) in `picks`, with `advantages` [picks, G].

        `calls[2 i + 1]` holds the reward's gradients of call i [groups, G, C, H, W], or is None.
        """
        groups = [
            TrainingGroup(
                rollout=calls[2 * call][number],
                advantages=row,
                reward_gradient=None if calls[2 * call + 1] is None else calls[2 * call + 1][number],
            )
            for (call, number), row in zip(picks, advantages, strict=True)
        ]
        return self._learner.update(iteration, groups, kl_scale)

    def offer(self, which: Literal["policy", "average"]) -> tuple[int, int]:
        """Get the weights ready to be taken part by part; returns their version and the number of parts."""
        weights = self._learner.policy() if which == "policy" else self._learner.average()
        self._offered = weights.split(self._run.workers.weights_part_mib * 2**20)
        return weights.version, len(self._offered)

    def take(self, part: int) -> PolicyWeights | None:
        """One of the parts offered last; it is not kept."""
        taken, self._offered[part] = self._offered[part], None
        return taken if self.rank == 0 else None

    def state(self) -> dict[str, torch.Tensor] | None:
        state = self._learner.state()
        return state if self.rank == 0 else None

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        self._learner.load_state(state)
