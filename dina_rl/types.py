"""Records that travel between the stages of a run.

Shape legend: P prompts, G samples of one prompt (the GRPO group), B samples, N denoising steps, W steps in the SDE
window, C H W latent, L text tokens, D text width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

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

    step: int  # outer iteration of the run
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

    def split(self, part_bytes: int) -> "list[PolicyWeights]":
        """The same weights in parts of about `part_bytes`, at least one tensor each, in order."""
        parts, size = [{}], 0
        for name, tensor in self.tensors.items():
            if parts[-1] and size + tensor.nbytes > part_bytes:
                parts.append({})
                size = 0
            parts[-1][name] = tensor
            size += tensor.nbytes
        return [
            PolicyWeights(version=self.version, tensors=tensors, part=number, parts=len(parts))
            for number, tensors in enumerate(parts)
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """What one group's rollout leaves behind: all that scoring and training need, nothing they would recompute.

    `states[k]` and `states[k + 1]` are the latents before and after window step `window_start + k`, fp32 and exactly as
    the sampler stored them, so that replaying the step gives the sampled log-probability back.
    """

    item: WorkItem
    policy_version: int
    sigmas: torch.Tensor  # [N + 1] the table the sampler used; it travels so that replay cannot use another one
    window_start: int
    dynamics: str  # which stochastic step, see flow/sde.py
    noise_level: float
    states: torch.Tensor  # [W + 1, G, C, H, W]
    log_probs: torch.Tensor  # [W, G]
    latents: torch.Tensor  # [G, C, H, W] the finished samples x0
    prompt: PromptEmbeds  # one row
    guidance_scale: float
    negative: PromptEmbeds | None  # one row, the empty prompt, where the loss is guided too


@dataclass(frozen=True, slots=True, kw_only=True)
class PretrainingSamples:
    """Real samples beside a group's own, for the flow-matching loss. G of them."""

    latents: torch.Tensor  # [G, C, H, W] clean
    noise: torch.Tensor  # [G, C, H, W]
    sigma: torch.Tensor  # [G] in (0, 1)
    prompt: PromptEmbeds  # G rows

    def select(self, index: torch.Tensor) -> "PretrainingSamples":
        """The samples at `index`, in that order."""
        return PretrainingSamples(
            latents=self.latents[index],
            noise=self.noise[index],
            sigma=self.sigma[index],
            prompt=self.prompt.select(index),
        )

    @staticmethod
    def cat(parts: Sequence["PretrainingSamples"]) -> "PretrainingSamples":
        """One batch from several, in order."""
        return PretrainingSamples(
            latents=torch.cat([part.latents for part in parts]),
            noise=torch.cat([part.noise for part in parts]),
            sigma=torch.cat([part.sigma for part in parts]),
            prompt=PromptEmbeds.cat([part.prompt for part in parts]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StoppedGroup:
    """What one group's rollout leaves behind for ReFL: where denoising stopped, and what it predicts from there."""

    item: WorkItem
    policy_version: int
    sigma: float  # where it stopped
    stopped: torch.Tensor  # [G, C, H, W], fp32
    latents: torch.Tensor  # [G, C, H, W]: x0 predicted in one step, stopped - sigma * velocity
    prompt: PromptEmbeds  # one row
    guidance_scale: float
    negative: PromptEmbeds | None  # one row, the empty prompt, where the loss is guided too
    pretraining: PretrainingSamples | None  # where the flow-matching loss has a weight


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledGroup:
    """A rollout with what the scorers say of it beyond its rewards."""

    sampled: Trajectory | StoppedGroup
    reward_gradient: torch.Tensor | None  # [G, C, H, W]: d reward / d latents, ReFL's


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingGroup:
    """A scored rollout with the weights of its samples: the learner's input."""

    trajectory: Trajectory | StoppedGroup
    advantages: torch.Tensor  # [G]; ones for ReFL
    reward_gradient: torch.Tensor | None = None  # [G, C, H, W]


@dataclass(frozen=True, slots=True, kw_only=True)
class GoldenScores:
    """Scores of a batch of images. Deliberately plain numbers and not a tensor: see the module's docstring."""

    values: tuple[float, ...]  # one per image
    parts: dict[str, tuple[float, ...]]  # named components, e.g. shape_right
