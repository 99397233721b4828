"""What is measured of a policy: batches of evaluation samples, and golden and proxy over all of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from statistics import pstdev

import torch

from dina_rl.config import RewardsConfig
from dina_rl.errors import RunStopped
from dina_rl.scorers.mixture import weighted_sum
from dina_rl.types import GoldenScores, ProbeReadings, PromptEmbeds


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationItem:
    """One batch of evaluation samples. Noise depends on (split, prompt, sample) alone: every policy sees the same."""

    split: str  # dev or test
    prompt_ids: tuple[int, ...]  # [B]
    prompts: tuple[str, ...]  # [B]
    sample_ids: tuple[int, ...]  # [B] number of the sample among those of its prompt
    guidance_scale: float
    opponents: torch.Tensor | None = field(default=None, compare=False)  # [B, 3, H, W] uint8: the start's, for judges


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSamples:
    """An evaluated batch: what the golden metric says, and what the proxy needs to score it too."""

    item: EvaluationItem
    golden: GoldenScores
    latents: torch.Tensor  # [B, C, H, W]
    prompt: PromptEmbeds  # B rows
    images: torch.Tensor  # [B, 3, H, W] uint8
    probes: ProbeReadings | None = None  # where they are on, and only of dev samples


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """Golden and proxy of one policy at one guidance scale over one split.

    Means and deviations are over the samples that have a finite score, of which there are some: a failed one is no 0.
    """

    guidance_scale: float
    golden: tuple[float, ...]  # per sample, in a fixed order
    parts: dict[str, float]  # means
    proxy: tuple[float, ...]  # per sample, the weighted sum
    proxy_parts: dict[str, float]  # mean score by scorer, and a judge's position bias
    images: torch.Tensor  # [B, 3, H, W] uint8
    prompts: tuple[str, ...]  # [B]
    probes: dict[str, float] = field(default_factory=dict)  # means by tag, where probes are on

    @property
    def golden_mean(self) -> float:
        return _mean(self.golden)

    @property
    def golden_std(self) -> float:
        return pstdev(_finite(self.golden))

    @property
    def proxy_mean(self) -> float:
        return _mean(self.proxy)

    @property
    def proxy_std(self) -> float:
        return pstdev(_finite(self.proxy))

    @property
    def measured(self) -> int:
        """Samples with a finite golden score."""
        return len(_finite(self.golden))


def evaluation_items(
    split: str,
    prompts: Sequence[str],
    samples: int,
    guidance_scale: float,
    batch_size: int,
    opponents: torch.Tensor | None = None,
) -> list[EvaluationItem]:
    """`samples` evaluation samples over `prompts`, each prompt in turn, in batches that depend on nothing else.

    Args:
        opponents: [samples, 3, H, W] uint8, pictures of the same prompts and noise that a judge sees beside them.
    """
    ids = [i % len(prompts) for i in range(samples)]
    numbers = [i // len(prompts) for i in range(samples)]
    return [
        EvaluationItem(
            split=split,
            prompt_ids=tuple(ids[first : first + batch_size]),
            prompts=tuple(prompts[i] for i in ids[first : first + batch_size]),
            sample_ids=tuple(numbers[first : first + batch_size]),
            guidance_scale=guidance_scale,
            opponents=None if opponents is None else opponents[first : first + batch_size],
        )
        for first in range(0, samples, batch_size)
    ]


def combine(
    samples: Sequence[EvaluationSamples], scores: Sequence[Mapping[str, torch.Tensor]], rewards: RewardsConfig
) -> Measurement:
    """One measurement from its batches, in order; `scores[i]` [B] by scorer are those of `samples[i]`.

    Raises:
        RunStopped: no sample has a finite score.
    """
    whole = {name: torch.cat([batch[name] for batch in scores]) for name in scores[0]}
    golden = [value for batch in samples for value in batch.golden.values]
    proxy = weighted_sum(rewards, {name: whole[name] for name in rewards.scorers}).tolist()
    probes = _probed([batch.probes for batch in samples if batch.probes is not None])
    for name, values in (("golden", golden), ("reward", proxy), *probes.items()):
        if not _finite(values):
            raise RunStopped(f"none of the {len(values)} samples of a measurement has a finite {name} score")
    parts = {name: [v for b in samples for v in b.golden.parts[name]] for name in samples[0].golden.parts}
    return Measurement(
        guidance_scale=samples[0].item.guidance_scale,
        golden=tuple(golden),
        parts={name: _mean(values) for name, values in parts.items() if _finite(values)},
        proxy=tuple(proxy),
        proxy_parts={name: s[s.isfinite()].mean().item() for name, s in whole.items() if s.isfinite().any()},
        images=torch.cat([batch.images for batch in samples]),
        prompts=tuple(prompt for batch in samples for prompt in batch.item.prompts),
        probes={tag: _mean(values) for tag, values in probes.items()},
    )


def _probed(readings: Sequence[ProbeReadings]) -> dict[str, list[float]]:
    """By tag, one value per sample."""
    tags = readings[0].values if readings else {}
    return {tag: [value for batch in readings for value in batch.values[tag]] for tag in tags}


def _finite(values: Sequence[float]) -> list[float]:
    return [value for value in values if isfinite(value)]


def _mean(values: Sequence[float]) -> float:
    finite = _finite(values)
    return sum(finite) / len(finite)
