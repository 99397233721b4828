"""Comparisons of two images on their way to the reward model.

Shapes: B pairs, C H W latent.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from dina_rl.data.records import PreferenceRecord

_RANKED = 32  # bits of a pair id below the record's number, where a record holds more than one pair


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferencePair:
    """One human comparison of two images."""

    index: int  # the pair's id, unique in its split: of a pair set the record's index
    prompt: str
    chosen: str  # key of the preferred image inside the set
    rejected: str
    votes: tuple[int, int] | None  # for chosen, for rejected
    confidence: float | None  # the annotators', in [0, 1]


@dataclass(frozen=True, slots=True, kw_only=True)
class PairBatch:
    """Pairs as the reward model takes them."""

    pair_ids: torch.Tensor  # [B] int64, `PreferencePair.index`: keys of the pair's random draws
    chosen: torch.Tensor  # [B, C, H, W] clean latents
    rejected: torch.Tensor  # [B, C, H, W]
    prompts: tuple[str, ...]  # B of them

    def __len__(self) -> int:
        return len(self.pair_ids)


def pair_id(record: int, position: int, num_images: int) -> int:
    """Id of a record's `position`-th ordered pair: the record's index if it holds no other, else a number beyond those.

    A function of the record alone, so that records can stream.
    """
    return record if num_images == 2 else ((record + 1) << _RANKED) + position


def pairs_of(record: PreferenceRecord) -> Iterator[PreferencePair]:
    """Every pair of images that people do not rank alike, the better one as `chosen`."""
    for position, (better, worse) in enumerate(record.ordered_pairs()):
        yield PreferencePair(
            index=pair_id(record.index, position, len(record.images)),
            prompt=record.prompt,
            chosen=record.images[better],
            rejected=record.images[worse],
            votes=None if record.votes is None else (record.votes[better], record.votes[worse]),
            confidence=record.confidence,
        )
