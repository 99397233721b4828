"""Records that travel between the stages of a run.

Shape legend: P prompts, G samples of one prompt (the group), B samples, C H W latent, L text tokens, D text width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, NotRequired, Protocol, TypedDict, TypeVar

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptEmbeds:
    """Text conditioning of a batch, encoded once per prompt and sent along with what it conditions.

    L is the same for all prompts of a pipeline. SD3 and FLUX read all L tokens, padding included; Z-Image reads the
    first `lengths[b]` of row b and ignores the rest.
    """

    embeds: torch.Tensor  # [B, L, D]
    pooled: torch.Tensor  # [B, D_pooled]; D_pooled is 0 where the family has no pooled embedding
    lengths: torch.Tensor | None = None  # [B] int64, tokens of each row in front of its padding; None: all are read

    def __len__(self) -> int:
        return len(self.embeds)

    def repeat(self, count: int) -> "PromptEmbeds":
        """Each prompt `count` times in a row: [a, b] -> [a, a, b, b]."""
        return self._map(lambda tensor: tensor.repeat_interleave(count, 0))

    def select(self, index: torch.Tensor | slice) -> "PromptEmbeds":
        """The prompts at `index`, in that order."""
        return self._map(lambda tensor: tensor[index])

    def to(self, device: torch.device | str) -> "PromptEmbeds":
        return self._map(lambda tensor: tensor.to(device))

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "PromptEmbeds":
        return PromptEmbeds(
            embeds=change(self.embeds),
            pooled=change(self.pooled),
            lengths=None if self.lengths is None else change(self.lengths),
        )

    @staticmethod
    def cat(parts: Sequence["PromptEmbeds"]) -> "PromptEmbeds":
        """One batch from several of the same family, in order."""
        lengths = [part.lengths for part in parts if part.lengths is not None]
        assert len(lengths) in (0, len(parts)), "prompts of two families in one batch"
        return PromptEmbeds(
            embeds=torch.cat([part.embeds for part in parts]),
            pooled=torch.cat([part.pooled for part in parts]),
            lengths=torch.cat(lengths) if lengths else None,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkItem:
    """One group to roll out: a prompt and the keys of its randomness. Whoever runs it, the result is the same."""

    iteration: int  # of the run, counted from 0
    prompt_id: int  # line number in the prompt file
    prompt: str
    group_size: int  # G


class Weights(Protocol):
    """The policy's trained weights: `PolicyWeights`, or a reference to some that stay where they were made."""

    @property
    def version(self) -> int: ...

    @property
    def tensors(self) -> dict[str, torch.Tensor]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyWeights:
    """Trained weights of the policy (its LoRA adapter, or all of them), CPU fp32, as published by the learner."""

    version: int  # number of optimizer updates behind these weights
    tensors: dict[str, torch.Tensor]
    part: int = 0  # number of this part, of `parts` in all
    parts: int = 1


class Rollout(Protocol):
    """What every algorithm's record of one group's rollout holds; the rest of it is the algorithm's own business."""

    @property
    def item(self) -> WorkItem: ...

    @property
    def policy_version(self) -> int:
        """Of the weights that sampled it."""
        ...

    @property
    def latents(self) -> torch.Tensor:
        """Latents [G, C, H, W], finished, predicted or on their way: what the reward is asked about."""
        ...

    @property
    def latents_sigma(self) -> float:
        """Noise level of the latents; 0: they are clean."""
        ...

    @property
    def prompt(self) -> PromptEmbeds:
        """One row."""
        ...


SomeRollout = TypeVar("SomeRollout", bound=Rollout)


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledGroup(Generic[SomeRollout]):
    """A rollout with what the scorers say of it beyond its rewards."""

    rollout: SomeRollout
    reward_gradient: torch.Tensor | None  # [G, C, H, W]: d reward / d latents, for an algorithm that asks for it


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingGroup(Generic[SomeRollout]):
    """A scored rollout with the weights of its samples: the learner's input."""

    rollout: SomeRollout
    advantages: torch.Tensor  # [G], as the algorithm weighs the rewards
    reward_gradient: torch.Tensor | None = None  # [G, C, H, W]


@dataclass(frozen=True, slots=True, kw_only=True)
class GoldenScores:
    """Scores of a batch of images. Deliberately plain numbers and not a tensor: see the module's docstring."""

    values: tuple[float, ...]  # one per image
    parts: dict[str, tuple[float, ...]]  # named components, e.g. shape_right


GRID_TAG = "guard/grid"
"""Of the curve of the grid in the pictures; those of zero-shot probabilities are `probes/NAME`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeReadings:
    """What was seen in a batch of images beside golden. Plain numbers and not a tensor, for the same reason."""

    values: dict[str, tuple[float, ...]]  # one per image, by the tag of its curve


class Point(TypedDict):
    """A measurement on the dev prompts: one point of the proxy and golden curves."""

    iteration: int
    golden: float
    golden_std: float  # over samples
    proxy: float
    proxy_std: float
    parts: dict[str, float]
    proxy_parts: dict[str, float]
    samples: int
    probes: NotRequired[dict[str, float]]  # means by tag, where probes are on
