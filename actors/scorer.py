"""The scorer actor: `ScoringWorker` in a process of its own."""

from collections.abc import Sequence

import torch

from dina_rl.alignment.measurement import EvaluationSamples
from dina_rl.alignment.rewards import ScoringWorker
from dina_rl.config import AlignRun
from dina_rl.runtime import configure_process
from dina_rl.types import Rollout


class ScorerActor:
    def __init__(self, run: AlignRun) -> None:
        configure_process(run.workers.threads_per_actor)
        self._worker = ScoringWorker(run)

    def score(self, rollouts: Sequence[Rollout]) -> dict[str, torch.Tensor]:
        return self._worker.score(rollouts)

    def score_with_gradient(self, groups: Sequence[Rollout]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        return self._worker.score_with_gradient(groups)

    def score_evaluation(self, samples: EvaluationSamples) -> dict[str, torch.Tensor]:
        return self._worker.score_evaluation(samples)
