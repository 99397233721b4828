"""A rollout worker with who encodes its prompts beside it."""

from collections.abc import Sequence

from dina_rl.alignment.rollout import RolloutWorker
from dina_rl.alignment.texts import PromptEncoder
from dina_rl.config import AlignRun
from dina_rl.types import Rollout, WorkItem


class Rollouts:
    """Both in this process."""

    def __init__(self, run: AlignRun) -> None:
        self._prompts = PromptEncoder(run)
        self._worker = RolloutWorker(run)
        self.load_weights = self._worker.load_weights

    def rollout(self, items: Sequence[WorkItem]) -> list[Rollout]:
        return self._worker.rollout(items, self._prompts.for_rollout(items))
