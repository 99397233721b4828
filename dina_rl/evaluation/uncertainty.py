"""What the noise does to scores and decisions: the paper's Appendix A, Eq. 14-17.

K noise draws, N comparisons that people decide, M images.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Uncertainty:
    """One line of the paper's Table 4. Its numbers are None where no pair or image has a score in every draw."""

    variation_ratio: float | None  # VR, in [0, 1/2]
    mean_margin: float | None  # in units of the score
    score_variance: float | None  # Var(r), in squared units of the score
    draws: int
    pairs: int
    images: int
    failed_pairs: int  # with a score that is not a finite number in some draw, left out
    failed_images: int


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
        ValueError: fewer than 2 draws, or nothing to compare.
    """
    if len(margins) < 2 or len(margins) != len(scores) or not margins.shape[1]:
        raise ValueError(f"uncertainty needs 2 or more draws of 1 or more pairs, got {list(margins.shape)}")
    compared, scored = (values[:, values.isfinite().all(0)] for values in (margins, scores))
    return Uncertainty(
        variation_ratio=variation_ratio(compared).mean().item() if compared.numel() else None,
        mean_margin=compared.double().mean().item() if compared.numel() else None,
        score_variance=score_variance(scored).mean().item() if scored.numel() else None,
        draws=len(margins),
        pairs=compared.shape[1],
        images=scored.shape[1],
        failed_pairs=margins.shape[1] - compared.shape[1],
        failed_images=scores.shape[1] - scored.shape[1],
    )
