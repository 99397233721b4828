"""The learner actor: one rank of `PolicyLearner`."""

from collections import deque
from collections.abc import Sequence
from typing import Literal

import ray
import torch

from actors.gang import GangMember
from actors.remote import StoredTensors, in_parts, together
from actors.shifts import OnSharedGPU
from dina_rl.alignment.engine import TorchEngine
from dina_rl.alignment.learner import PolicyLearner
from dina_rl.config import AlignRun
from dina_rl.errors import opening
from dina_rl.runtime import configure_process
from dina_rl.sleep import SharedGPU
from dina_rl.types import Rollout, TrainingGroup

Offering = Literal["policy", "average", "state"]


class LearnerActor(GangMember, OnSharedGPU):
    """A rank of the gang. Of weights and state each rank gives its share, in parts."""

    def __init__(self, rank: int, run: AlignRun) -> None:
        super().__init__(rank, run.workers.learner_ranks, timeout_s=run.workers.call_timeout_s)
        configure_process(run.workers.threads_per_actor)
        self._run = run
        self._learner: PolicyLearner
        self._offered: deque[StoredTensors] = deque()
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
    def offer(self, what: Offering) -> tuple[int, int]:
        """Get this rank's share ready to be taken part by part; returns the weights' version and the number of parts.

        All ranks must be asked.
        """
        self._offered.clear()  # the new offer needs its room
        learner = self._learner
        match what:
            case "policy":
                tensors = learner.policy().tensors
            case "average":
                tensors = learner.average().tensors
            case "state":
                tensors = learner.state()
        self._offered.extend(in_parts(tensors, self._run.workers.weights_part_mib * 2**20))
        return learner.version, len(self._offered)

    @ray.method
    def take(self) -> StoredTensors:
        """The next part of what was offered last; it is not kept."""
        return self._offered.popleft()

    @ray.method
    def load_state(self, *parts: StoredTensors) -> None:
        """Go on from all ranks' shares of a state."""
        self._learner.load_state(together(parts))
