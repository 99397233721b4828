"""The held-out golden metric: measured beside the reward from before the first update, never optimised.

Its scores have a type of their own, `GoldenScores`, which nothing that builds advantages, rewards or losses accepts.
A judge, who has no score of one picture, says how often a picture wins over the start's of the same prompt and noise.
"""

from collections.abc import Sequence
from typing import Protocol

import torch

from dina_rl import runtime
from dina_rl.config import GoldenConfig, ImageScorerConfig
from dina_rl.scorers.base import Conditions
from dina_rl.scorers.pairwise import BIAS, wins_over
from dina_rl.scorers.registry import open_image_scorer, open_judge
from dina_rl.types import GoldenScores


class GoldenMetric(Protocol):
    def __call__(
        self, images: torch.Tensor, prompts: Sequence[str], opponents: torch.Tensor | None = None
    ) -> GoldenScores:
        """Scores of images [B, 3, H, W] in [0, 1]; a judge's against `opponents`, uint8 of the same shape."""
        ...


def open_metric(config: GoldenConfig) -> GoldenMetric:
    """The configured metric; its model, if it has one, loads onto this process's device.

    Raises:
        ValueError: the model cannot be read.
    """
    if config.of_images is None:
        from dina_rl.shapes.metric import ShapesMetric

        return ShapesMetric()
    return JudgeMetric(config.of_images) if config.of_images.pairwise else ImageMetric(config.of_images)


class ImageMetric:
    """`GoldenMetric` by a scorer of images."""

    def __init__(self, config: ImageScorerConfig) -> None:
        self._scorer = open_image_scorer(config, device=runtime.device())

    @torch.no_grad()
    def __call__(
        self, images: torch.Tensor, prompts: Sequence[str], opponents: torch.Tensor | None = None
    ) -> GoldenScores:
        scores = self._scorer(images, Conditions.of_images(prompts))
        return GoldenScores(values=tuple(scores.tolist()), parts={})


class JudgeMetric:
    """`GoldenMetric` by a judge: win rates over the opponents; part `position_bias`."""

    def __init__(self, config: ImageScorerConfig) -> None:
        self._judge = open_judge(config, device=runtime.device())

    def __call__(
        self, images: torch.Tensor, prompts: Sequence[str], opponents: torch.Tensor | None = None
    ) -> GoldenScores:
        rates, bias = wins_over(self._judge, images, opponents, prompts)
        return GoldenScores(values=tuple(rates.tolist()), parts={BIAS: tuple(bias.tolist())})
