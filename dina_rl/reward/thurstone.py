"""Preference likelihood on noisy states and the fidelity loss (paper section 4.1, Eq. 5-9).

sigma(t) = t throughout: rectified flow's noise magnitude (paper section 3).
"""

import math

import torch

from dina_rl.config import ThurstoneConfig

PROBABILITY_FLOOR = 1e-12
"""Lower bound of the probability under the square root of Eq. 9, whose derivative is infinite at 0. A pair below it
(the model is wrong by more than 7 standard deviations) gets no gradient; Eq. 9 itself leaves it less than 1e-5."""


def comparison_variance(t: torch.Tensor, config: ThurstoneConfig) -> torch.Tensor:
    """sigma_u^2(t) of one sample at noise levels t [B] in [0, 1] (Eq. 7); sigma_u^2 at every t if `fixed` (Table 2)."""
    if config.variance == "fixed":
        return torch.full_like(t, config.sigma_u**2)
    return config.k * t**2 + config.sigma_u**2


def preference_probability(margin: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
    """P(first preferred) [B] for score differences `margin` = r_first - r_second [B] (Eq. 8; Eq. 5 at t = 0).

    Args:
        variance: `comparison_variance` of each of the two samples [B].
    """
    return _normal_cdf(margin / torch.sqrt(2 * variance))


def fidelity_loss(margin: torch.Tensor, variance: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """1 - sqrt(y p + (1 - y)(1 - p)) per pair [B] (Eq. 9).

    Args:
        margin: r_first - r_second [B].
        variance: `comparison_variance` of each of the two samples [B].
        label: y in [0, 1] [B], the probability that the first one is preferred.
    """
    first = preference_probability(margin, variance)
    second = preference_probability(-margin, variance)  # not 1 - first, which loses the small tail in fp32
    return 1 - torch.sqrt((label * first + (1 - label) * second).clamp_min(PROBABILITY_FLOOR))


def matched_fidelity_loss(margin: torch.Tensor, variance: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """1 - sqrt(y p) - sqrt((1 - y)(1 - p)) per pair [B]: the fidelity loss of Tsai et al. (FRank), the paper's [36].

    For y of 0 or 1 it is `fidelity_loss`. Between them it has its minimum, 0, where p = y. Eq. 9 as the paper writes it
    has none there: it falls with p for every y above 1/2. Arguments as `fidelity_loss`.
    """
    first = preference_probability(margin, variance).clamp_min(PROBABILITY_FLOOR)
    second = preference_probability(-margin, variance).clamp_min(PROBABILITY_FLOOR)
    return 1 - label.sqrt() * first.sqrt() - (1 - label).sqrt() * second.sqrt()


def _normal_cdf(z: torch.Tensor) -> torch.Tensor:
    # erfc keeps its relative accuracy in the lower tail, where (1 + erf) / 2 cancels to 0.
    tail: torch.Tensor = torch.special.erfc(-z / math.sqrt(2))
    return tail / 2
