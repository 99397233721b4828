"""The loop's two Protocols satisfied in this process, without Ray: for debuggers, tests and machines without it."""

from collections.abc import Sequence

import torch

from dina_rl.alignment.algorithms.registry import open_algorithm
from dina_rl.alignment.engine import TorchEngine
from dina_rl.alignment.learner import PolicyLearner
from dina_rl.alignment.loop import ScoredGroup
from dina_rl.alignment.measurement import EvaluationItem, Measurement, combine
from dina_rl.alignment.rewards import ScoringWorker
from dina_rl.alignment.rollout import RolloutWorker, in_calls
from dina_rl.alignment.texts import PromptEncoder
from dina_rl.config import AlignRun
from dina_rl.errors import opening
from dina_rl.types import PolicyWeights, Rollout, SampledGroup, TrainingGroup, WorkItem


class InlineExperience:
    @opening()
    def __init__(self, run: AlignRun) -> None:
        self._rewards = run.rewards
        self._groups_per_call = run.rollout.groups_per_call
        self._with_gradient = open_algorithm(run).wants_reward_gradients
        self._prompts = PromptEncoder(run)
        self._worker = RolloutWorker(run)
        self._scorer = ScoringWorker(run)

    def collect(self, items: Sequence[WorkItem]) -> list[ScoredGroup[SampledGroup[Rollout]]]:
        scored, texts = [], self._prompts.for_rollout(items)
        for call in in_calls(items, self._groups_per_call):
            sampled = self._worker.rollout(call, texts)
            gradients: Sequence[torch.Tensor | None] = [None] * len(sampled)
            if self._with_gradient:
                scores, computed = self._scorer.score_with_gradient(sampled)
                gradients = list(computed)
            else:
                scores = self._scorer.score(sampled)
            scored += [
                ScoredGroup(
                    handle=SampledGroup(rollout=group, reward_gradient=gradient),
                    scores={name: rows[number] for name, rows in scores.items()},
                )
                for number, (group, gradient) in enumerate(zip(sampled, gradients, strict=True))
            ]
        return scored

    def publish(self, weights: PolicyWeights) -> None:
        self._worker.load_weights(weights)

    def measure(self, items: Sequence[EvaluationItem]) -> Measurement:
        texts = self._prompts.for_evaluation(items)
        samples = [self._worker.evaluate(item, texts) for item in items]
        return combine(samples, [self._scorer.score_evaluation(batch) for batch in samples], self._rewards)


class InlineLearner:
    """One rank with plain torch AdamW."""

    @opening()
    def __init__(self, run: AlignRun) -> None:
        self._learner = PolicyLearner(run, lambda module: TorchEngine(module, run.learner))
        self.policy = self._learner.policy
        self.average = self._learner.average
        self.state = self._learner.state
        self.load_state = self._learner.load_state

    def update(
        self, iteration: int, handles: Sequence[SampledGroup[Rollout]], advantages: torch.Tensor, kl_scale: float
    ) -> dict[str, float]:
        groups = [
            TrainingGroup(rollout=handle.rollout, advantages=row, reward_gradient=handle.reward_gradient)
            for handle, row in zip(handles, advantages, strict=True)
        ]
        return self._learner.update(iteration, groups, kl_scale)
