"""Whether the preference likelihood (Eq. 8) means what it says: reliability curve, ECE, Brier score.

A comparison has no natural first image (HPDv3 always lists the preferred one first), so both orders count: the curve is
then symmetric around 1/2, and its upper half says everything. There a comparison is the predicted winner's probability
in [1/2, 1] and whether people prefer that image too; equal scores say 1/2 and are half right.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dina_rl.config import ThurstoneConfig
from dina_rl.reward.thurstone import comparison_variance, preference_probability


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Reliability of N comparisons in bins of equal width over the predicted winner's probability [1/2, 1]."""

    edges: tuple[float, ...]  # bins + 1
    counts: tuple[int, ...]
    confidence: tuple[float | None, ...]  # mean predicted probability of a bin; None: an empty bin
    accuracy: tuple[float | None, ...]  # share of a bin's comparisons in which people agree
    ece: float | None  # sum over bins of count / N * |accuracy - confidence|; None: all failed
    brier: float | None  # mean (1 - P(preferred image))^2; a fair coin has 0.25
    failed: int  # comparisons without a probability (a score is not a number), left out


def ensemble_variance(levels: Sequence[float], config: ThurstoneConfig) -> torch.Tensor:
    """Comparison variance, a float64 scalar, of a score at `levels`: Eq. 7 at one level, its mean over several.

    The paper defines the likelihood at one level only; the mean is our choice for its ensembles.
    """
    return comparison_variance(torch.tensor(levels, dtype=torch.float64), config).mean()


def thurstone_probability(margins: torch.Tensor, levels: Sequence[float], config: ThurstoneConfig) -> torch.Tensor:
    """P(preferred image wins) [N] (Eq. 8) for margins [N] of scores at `levels`."""
    return preference_probability(margins.double(), ensemble_variance(levels, config))


def calibrate(probability: torch.Tensor, *, bins: int) -> Calibration:
    """Calibration of the probabilities [N] that a scorer gives to the images that people prefer."""
    given = probability.double()
    given = given[~given.isnan()]
    confidence = torch.maximum(given, 1 - given)
    outcome = (given > 0.5).double() + 0.5 * (given == 0.5).double()
    edges = torch.linspace(0.5, 1, bins + 1, dtype=torch.float64)
    number = (torch.bucketize(confidence, edges, right=True) - 1).clamp(0, bins - 1)  # [low, high), the last closed

    def total(values: torch.Tensor) -> torch.Tensor:
        return torch.zeros(bins, dtype=torch.float64).index_add_(0, number, values)

    counts = total(torch.ones_like(confidence))
    means = [
        [value.item() if count else None for value, count in zip(total(values) / counts, counts, strict=True)]
        for values in (confidence, outcome)
    ]
    gaps = (total(outcome) - total(confidence)).abs()  # count * |accuracy - confidence|
    return Calibration(
        edges=tuple(edges.tolist()),
        counts=tuple(int(count) for count in counts),
        confidence=tuple(means[0]),
        accuracy=tuple(means[1]),
        ece=(gaps.sum() / len(given)).item() if len(given) else None,
        brier=((1 - given) ** 2).mean().item() if len(given) else None,
        failed=len(probability) - len(given),
    )
