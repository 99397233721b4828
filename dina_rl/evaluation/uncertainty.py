"""What the noise does to scores and decisions: the paper's Appendix A, Eq. 14-17.

K noise draws, N comparisons that people decide, M images.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Uncertainty:
    """One line of the paper's Table 4."""

    variation_ratio: float  # VR, in [0, 1/2]
    mean_margin: float  # in units of the score
    score_variance: float  # Var(r), in squared units of the score
    draws: int
    pairs: int
    images: int


def variation_ratio(margins: torch.Tensor) -> torch.Tensor:
    """VR = min(p, 1 - p) [N], p the share of draws in which the margin [K, N] is positive (Eq. 14, 15)."""
    share = (margins > 0).double().mean(0)
    return torch.minimum(share, 1 - share)


def score_variance(scores: torch.Tensor) -> torch.Tensor:
    """Unbiased variance [M] over draws of scores [K, M], K > 1 (Eq. 17)."""
    return scores.double().var(0, correction=1)


def uncertainty(margins: torch.Tensor, scores: torch.Tensor) -> Uncertainty:
    """Appendix A's numbers at one noise level.

    Args:
        margins: preferred image's score minus the other's [K, N] (Eq. 16 before its mean).
        scores: [K, M], every evaluated image of those comparisons once.

    Raises:
        ValueError: fewer than 2 draws, nothing to compare, or scores that are not numbers.
    """
    if len(margins) < 2 or len(margins) != len(scores) or not margins.shape[1]:
        raise ValueError(f"uncertainty needs 2 or more draws of 1 or more pairs, got {list(margins.shape)}")
    if not (margins.isfinite().all() and scores.isfinite().all()):
        raise ValueError("scores that are not numbers have no uncertainty")
    return Uncertainty(
        variation_ratio=variation_ratio(margins).mean().item(),
        mean_margin=margins.double().mean().item(),
        score_variance=score_variance(scores).mean().item(),
        draws=len(margins),
        pairs=margins.shape[1],
        images=scores.shape[1],
    )
