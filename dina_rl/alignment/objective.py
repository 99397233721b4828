"""What an algorithm gives the learner: the forwards of an iteration's minibatches, and the loss of each."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch

from dina_rl.alignment.policy import Policy
from dina_rl.types import Rollout, TrainingGroup

Trained = TypeVar("Trained", bound=Rollout)


@dataclass(frozen=True, slots=True, kw_only=True)
class PassLoss:
    """Outcome of one pass."""

    loss: torch.Tensor  # summed over the pass's terms
    sums: dict[str, float]  # statistics summed over terms; `terms`, and `<prefix>/terms` for prefixed ones, count them
    maxima: dict[str, float]


Pass = Callable[[float], PassLoss]
"""One forward of the policy (and its reference) that ends in one backward; called with the factor of its KL term."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Minibatch:
    """What one optimizer update is made of."""

    passes: Sequence[Pass]  # this rank's; equally many, of equal shapes, on every rank
    terms: int  # of the objective, over all ranks; the loss is their mean
    samples: int  # that go through the model, over all ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedUpdates:
    """An iteration's minibatches."""

    minibatches: Sequence[Minibatch]
    maxima: dict[str, float] = field(default_factory=dict)  # found under the policy that sampled


class Objective(Protocol[Trained]):
    """What is trained. All ranks build it alike and call it alike."""

    def prepare(self, minibatches: Sequence[Sequence[TrainingGroup[Trained]]]) -> PreparedUpdates:
        """The forwards of every minibatch of groups. Called before the iteration's first update.

        Raises:
            ValueError: groups of one minibatch that cannot share a forward.
        """
        ...

    def before_first_step(self, maxima: Mapping[str, float]) -> None:
        """Look at the first minibatch's maxima, over all ranks, before anything is changed; may raise RunStopped."""
        ...

    def after_updates(self, updates: int) -> None:
        """Called after an iteration's last update; `updates` counts those of the run."""
        ...

    def sampling_weights(self) -> dict[str, torch.Tensor]:
        """The trained part to sample with from now on, CPU fp32: this rank's share, see `Engine.mine`."""
        ...

    def state(self) -> dict[str, torch.Tensor]:
        """What the objective itself remembers between iterations, of weights this rank's share."""
        ...

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Continue exactly where `state()` was taken, on all ranks' shares together."""
        ...


class SamplesItself:
    """The part of an `Objective` whose policy samples with its own weights and that remembers nothing."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    def before_first_step(self, maxima: Mapping[str, float]) -> None: ...

    def after_updates(self, updates: int) -> None: ...

    def sampling_weights(self) -> dict[str, torch.Tensor]:
        engine = self._policy.engine
        return engine.weights(engine.mine)

    def state(self) -> dict[str, torch.Tensor]:
        return {}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None: ...


def deal(count: int, size: int, rank: int, world_size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(rows [size], weights [size]) of each forward of this rank over `count` samples.

    Samples are padded with zero-weight copies of the first to a multiple of `size * world_size`, so that every rank
    makes equally many forwards of equal shape, and dealt out in turn. A shorter last forward would be cheaper, but
    round otherwise than the rollout's. Whole minibatches divide, so padding comes of dropped samples alone.
    """
    padded = -(-count // (size * world_size)) * size * world_size
    index = torch.arange(padded)
    weights = (index < count).float()
    rows = torch.where(index < count, index, 0)
    starts = range(rank * size, padded, size * world_size)
    return [(rows[first : first + size], weights[first : first + size]) for first in starts]
