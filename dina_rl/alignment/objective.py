"""What an algorithm gives the learner: forwards of a minibatch, and a loss for each."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch

from dina_rl.types import TrainingGroup

Pass = TypeVar("Pass")  # one forward (of the policy and its reference) that ends in one backward


@dataclass(frozen=True, slots=True, kw_only=True)
class PassLoss:
    """Outcome of one pass."""

    loss: torch.Tensor  # summed over the pass's terms
    sums: dict[str, float]  # statistics summed over terms; `terms`, and `<prefix>/terms` for prefixed ones, count them
    maxima: dict[str, float]


class Objective(Protocol, Generic[Pass]):
    """What is trained: Flow-GRPO (`grpo.py`) or ReFL (`refl.py`)."""

    def passes(self, groups: Sequence[TrainingGroup]) -> list[Pass]:
        """This rank's forwards of one minibatch; equally many, of equal shapes, on every rank."""
        ...

    def terms(self, groups: Sequence[TrainingGroup]) -> int:
        """Terms of a minibatch's objective over all ranks; the loss is their mean."""
        ...

    def before_updates(self, minibatches: Sequence[Sequence[Pass]]) -> dict[str, float]:
        """Called under the policy that sampled; returns maxima that only that policy has."""
        ...

    def loss(self, each: Pass, kl_scale: float) -> PassLoss:
        """Loss of one pass, its KL term times `kl_scale`."""
        ...

    def before_first_step(self, maxima: dict[str, float]) -> None:
        """Look at the first minibatch's maxima, over all ranks, before anything is changed; may raise RunStopped."""
        ...


def deal(count: int, size: int, rank: int, world_size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(rows [size], weights [size]) of each forward of this rank over `count` samples.

    Samples are padded with zero-weight copies of the first to a multiple of `size * world_size`, so that every rank
    makes equally many forwards of equal shape, and dealt out in turn.
    """
    padded = -(-count // (size * world_size)) * size * world_size
    index = torch.arange(padded)
    weights = (index < count).float()
    rows = torch.where(index < count, index, 0)
    starts = range(rank * size, padded, size * world_size)
    return [(rows[first : first + size], weights[first : first + size]) for first in starts]
