"""The rollout actor: `RolloutWorker` in a process of its own."""

from collections.abc import Sequence

import ray

from actors.remote import StoredTensors
from actors.shifts import OnSharedGPU
from dina_rl.alignment.measurement import EvaluationItem, EvaluationSamples
from dina_rl.alignment.rollout import RolloutWorker
from dina_rl.alignment.texts import EncodedTexts, PromptEncoder
from dina_rl.config import AlignRun
from dina_rl.errors import opening
from dina_rl.runtime import configure_process
from dina_rl.sleep import SharedGPU
from dina_rl.types import PolicyWeights, Rollout, WorkItem


class RolloutActor(OnSharedGPU):
    def __init__(self, run: AlignRun) -> None:
        configure_process(run.workers.threads_per_actor)
        self._run = run
        self._prompts: PromptEncoder | None = None
        self._worker: RolloutWorker
        self._gpu = SharedGPU(sleeps=run.workers.sleep)

    @ray.method
    @opening()
    def open(self) -> None:
        """Load the generator, and what else samples and measures."""
        if not self._run.workers.text_workers:
            self._prompts = PromptEncoder(self._run)
        self._worker = RolloutWorker(self._run)

    @ray.method
    def load_weights(self, version: int, number: int, parts: int, part: StoredTensors) -> int:
        """Part `number` of `parts`, in order; the one that comes last makes these the weights to sample with."""
        weights = PolicyWeights(version=version, tensors=part.tensors, part=number, parts=parts)
        return self._worker.load_weights(weights)

    @ray.method
    def rollout(self, items: Sequence[WorkItem], texts: EncodedTexts | None) -> list[Rollout]:
        return self._worker.rollout(items, texts or self._own.for_rollout(items))

    @ray.method
    def evaluate(self, item: EvaluationItem, texts: EncodedTexts | None) -> EvaluationSamples:
        return self._worker.evaluate(item, texts or self._own.for_evaluation([item]))

    @property
    def _own(self) -> PromptEncoder:
        assert self._prompts is not None, "with text workers every call comes with its embeddings"
        return self._prompts
