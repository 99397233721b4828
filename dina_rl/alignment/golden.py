"""The held-out golden metric: measured beside the reward from before the first update, never optimised.

Its scores have a type of their own, `GoldenScores`, which nothing that builds advantages, rewards or losses accepts.
"""

from collections.abc import Sequence
from typing import Protocol

import torch

from dina_rl import runtime
from dina_rl.config import CLIPModelConfig, GoldenConfig
from dina_rl.types import GoldenScores


class GoldenMetric(Protocol):
    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> GoldenScores:
        """Scores of images [B, 3, H, W] in [0, 1]."""
        ...


def open_metric(config: GoldenConfig) -> GoldenMetric:
    """The configured metric; its model, if it has one, loads onto this process's device.

    Raises:
        ValueError: the model cannot be read.
    """
    if config.clip_model is None:
        from dina_rl.shapes.metric import ShapesMetric

        return ShapesMetric()
    return CLIPMetric(config.clip_model, learned_scale=config.scorer == "pickscore")


class CLIPMetric:
    """`GoldenMetric` by PickScore or CLIPScore."""

    def __init__(self, model: CLIPModelConfig, *, learned_scale: bool) -> None:
        from dina_rl.scorers.clip import CLIPScorer

        self._scorer = CLIPScorer(model, learned_scale=learned_scale, device=runtime.device())

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> GoldenScores:
        return GoldenScores(values=tuple(self._scorer.score(images, tuple(prompts)).tolist()), parts={})
