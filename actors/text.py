"""The text actor: `PromptEncoder` in a process of its own."""

from collections.abc import Sequence

import ray

from actors.shifts import OnSharedGPU
from dina_rl.alignment.measurement import EvaluationItem
from dina_rl.alignment.texts import EncodedTexts, PromptEncoder
from dina_rl.config import AlignRun
from dina_rl.errors import opening
from dina_rl.runtime import configure_process
from dina_rl.sleep import SharedGPU
from dina_rl.types import WorkItem


class TextActor(OnSharedGPU):
    def __init__(self, run: AlignRun) -> None:
        configure_process(run.workers.threads_per_actor)
        self._run = run
        self._prompts: PromptEncoder
        self._gpu = SharedGPU(sleeps=run.workers.sleep)

    @ray.method
    @opening()
    def open(self) -> None:
        """Load the text encoders."""
        self._prompts = PromptEncoder(self._run)

    @ray.method
    def for_rollout(self, items: Sequence[WorkItem]) -> EncodedTexts:
        return self._prompts.for_rollout(items)

    @ray.method
    def for_evaluation(self, items: Sequence[EvaluationItem]) -> EncodedTexts:
        return self._prompts.for_evaluation(items)
