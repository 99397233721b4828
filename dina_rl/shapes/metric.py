"""The miniature world's golden metric: the rule-based score of a picture and its caption."""

from collections.abc import Sequence

import torch

from dina_rl.shapes.golden import golden_score
from dina_rl.types import GoldenScores


class ShapesMetric:
    """`GoldenMetric` by the world's own rules; part `shape_right` is the share of pictures with the asked shape."""

    def __call__(
        self, images: torch.Tensor, prompts: Sequence[str], opponents: torch.Tensor | None = None
    ) -> GoldenScores:
        scores = golden_score(images, prompts)
        return GoldenScores(
            values=tuple(scores.score.tolist()),
            parts={
                name: tuple(part.float().tolist())
                for name, part in (
                    ("shape_right", scores.shape_right),
                    ("shape", scores.shape),
                    ("colour", scores.colour),
                    ("clean", scores.clean),
                    ("sharp", scores.sharp),
                    ("contrast", scores.contrast),
                    ("frame", scores.frame),
                    ("whole", scores.whole),
                )
            },
        )
