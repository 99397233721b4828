"""What the rest of the system needs to know of a reward."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import nn

from dina_rl.config import ImageScorerConfig
from dina_rl.types import PromptEmbeds


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """What B samples are scored against."""

    prompts: tuple[str, ...]  # B of them
    embeds: PromptEmbeds  # B rows, as the generator's text encoders have them
    noise: torch.Tensor  # [B, draws, C, H, W] the latent scorers'; draws is 0 where none of them is in use
    sigma: float = 0.0  # noise level of the samples; 0: they are clean

    @staticmethod
    def of_images(prompts: Sequence[str]) -> "Conditions":
        """What scorers of images read: the prompts alone."""
        rows = len(prompts)
        return Conditions(
            prompts=tuple(prompts),
            embeds=PromptEmbeds(embeds=torch.empty(rows, 0, 0), pooled=torch.empty(rows, 0)),
            noise=torch.empty(rows, 0),
        )

    def select(self, rows: torch.Tensor) -> "Conditions":
        """The conditions of the samples `rows` [M], in that order."""
        return Conditions(
            prompts=tuple(self.prompts[row] for row in rows.tolist()),
            embeds=self.embeds.select(rows),
            noise=self.noise[rows],
            sigma=self.sigma,
        )


Space = Literal["latents", "images"]


class Scorer(Protocol):
    """A reward, frozen, on this process's device."""

    space: Space  # of the samples that it reads

    def __call__(self, samples: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        """Scores [B], fp32, differentiable in `samples`: latents [B, C, H, W] or images [B, 3, h, w] in [0, 1]."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EmptyImageScorer:
    """A scorer of images on the meta device, for plans."""

    model: nn.Module
    look: Callable[[], object]  # one picture through it


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageKind:
    """All that is asked of a kind of scorer of images. Every function takes its section of the configuration.

    `open` loads it onto a device (`judge` does, of one that compares), `check` sees whether it is there at all without
    loading weights, `empty` builds it without weights. All raise ValueError where it cannot be read, or is another kind
    of model.
    """

    open: Callable[[ImageScorerConfig, str], "ImageScorer"] | None  # None: it is a judge
    check: Callable[[ImageScorerConfig], None]
    empty: Callable[[ImageScorerConfig], EmptyImageScorer]
    files: tuple[str, str] | None  # that every repository of its weights, and of its processor, has; None: a server's
    backbone: str = "CLIP"  # as the paper's tables call what it is built on
    size: Callable[[ImageScorerConfig], int | None] | None = None  # bytes on disk, of weights in several folders
    judge: Callable[[ImageScorerConfig, str], "Judge"] | None = None


class ImageScorer(Scorer, Protocol):
    """A scorer of images of any size."""

    def reduce(self, pixels: torch.Tensor) -> torch.Tensor:
        """What it sees of one picture [3, H, W] uint8, as an image [3, h, w] in [0, 1] of bounded size."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two pictures of one prompt, in the order in which they are shown, by their place among the pictures."""

    prompt: str
    first: int
    second: int


class Judge(Protocol):
    """What compares two pictures of a prompt and has no score of one. `pairwise` makes numbers of its verdicts."""

    def __call__(self, images: torch.Tensor, pairs: Sequence[Pair]) -> torch.Tensor:
        """Verdicts [B], fp32 on the CPU, on pairs of images [N, 3, h, w] in [0, 1].

        The probability that the first is better as they are shown: 1, 0, .5 for a tie; NaN where there is no verdict.
        """
        ...

    def reduce(self, pixels: torch.Tensor) -> torch.Tensor:
        """See `ImageScorer.reduce`."""
        ...
