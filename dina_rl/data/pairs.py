"""Records of preference data on their way to the reward model.

Shapes: B pairs, C H W latent.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferenceRecord:
    """One human comparison as read from disk."""

    index: int  # position in the split's file
    prompt: str
    chosen: str  # path of the preferred image, relative to the dataset directory
    rejected: str
    votes: tuple[int, int] | None  # for chosen, for rejected
    confidence: float | None  # the annotators', in [0, 1]


@dataclass(frozen=True, slots=True, kw_only=True)
class SkippedRecord:
    """A comparison that cannot be used, and why."""

    file: str
    index: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PairBatch:
    """Pairs as the reward model takes them."""

    pair_ids: torch.Tensor  # [B] int64, `PreferenceRecord.index`: keys of the pair's random draws
    chosen: torch.Tensor  # [B, C, H, W] clean latents
    rejected: torch.Tensor  # [B, C, H, W]
    prompts: tuple[str, ...]  # B of them

    def __len__(self) -> int:
        return len(self.pair_ids)
