"""The scorer actor: `ScoringWorker` in a process of its own."""

import ray
import torch

from actors.shifts import OnSharedGPU
from dina_rl.alignment.measurement import EvaluationSamples
from dina_rl.alignment.rewards import ScoringWorker
from dina_rl.config import AlignRun
from dina_rl.errors import opening
from dina_rl.runtime import configure_process
from dina_rl.sleep import SharedGPU
from dina_rl.types import Rollout


class ScorerActor(OnSharedGPU):
    def __init__(self, run: AlignRun) -> None:
        configure_process(run.workers.threads_per_actor)
        self._run = run
        self._worker: ScoringWorker
        self._gpu = SharedGPU(sleeps=run.workers.sleep)

    @ray.method
    @opening()
    def open(self) -> None:
        """Load the rewards."""
        self._worker = ScoringWorker(self._run)

    @ray.method
    def score(self, rollouts: list[Rollout]) -> dict[str, torch.Tensor]:
        return self._worker.score(rollouts)

    @ray.method(num_returns=2)  # the gradients can stay where they are while the driver looks at the scores
    def score_with_gradient(self, groups: list[Rollout]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        return self._worker.score_with_gradient(groups)

    @ray.method
    def score_evaluation(self, samples: EvaluationSamples) -> dict[str, torch.Tensor]:
        return self._worker.score_evaluation(samples)
