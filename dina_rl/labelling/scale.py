"""From a difference of two scores to a probability (Thurstone, the paper's Eq. 5), and the scale that it takes.

y = Phi(margin / (sqrt(2) scale)). A teacher's scores have any unit, so the scale is its own: the one under which
people's labels are likeliest, or, without labels, the one that gives the pair of median margin a stated confidence.
"""

import math

import torch

from dina_rl.reward.thurstone import preference_probability

BISECTIONS = 60  # of an interval that a doubling found: to the last digit


def soft_label(margins: torch.Tensor, scale: float) -> torch.Tensor:
    """P(first preferred) [N], float64, of margins first - second [N] (Eq. 5 with sigma_u = scale)."""
    return preference_probability(margins.double(), torch.tensor(scale, dtype=torch.float64) ** 2)


def likeliest_scale(margins: torch.Tensor) -> float:
    """The scale under which the labels are likeliest: argmax of sum log Phi(margin / (sqrt(2) scale)).

    In b = 1 / (sqrt(2) scale) the sum is concave, so its slope has one zero, which bisection finds.

    Args:
        margins: preferred - other, of pairs that people labelled [N].

    Raises:
        ValueError: the labels are likelier without the teacher or have no doubt about it: there is no such scale.
    """
    margins = margins.double()
    if not (margins < 0).any():
        raise ValueError(
            f"the teacher agrees with all {len(margins)} labels: they say nothing of its scale; give scale"
        )
    if _slope(margins, 0.0) <= 0:
        raise ValueError(
            f"the teacher's scores say nothing of the {len(margins)} labels, or the opposite: they have no scale; is a "
            "weight of the wrong sign?"
        )
    low, high = 0.0, 1 / margins.abs().max().item()
    while _slope(margins, high) > 0:
        low, high = high, 2 * high
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if _slope(margins, middle) > 0 else (low, middle)
    return 1 / (math.sqrt(2) * high)


def median_scale(margins: torch.Tensor, confidence: float) -> float:
    """The scale at which the median |margin| of [N] has probability `confidence`, above 1/2.

    Raises:
        ValueError: the median is 0.
    """
    median: float = margins.double().abs().median().item()
    if not median:
        raise ValueError(
            "half the pairs or more have equal scores: their median margin is 0 and gives no scale; give one"
        )
    deviate: float = torch.special.ndtri(torch.tensor(confidence, dtype=torch.float64)).item()
    return median / (math.sqrt(2) * deviate)


def _slope(margins: torch.Tensor, b: float) -> float:
    """d/db of sum log Phi(b margin): sum margin phi(z) / Phi(z), the ratio by logarithms, which do not underflow."""
    z = b * margins
    ratio = torch.exp(-(z**2) / 2 - math.log(math.sqrt(2 * math.pi)) - torch.special.log_ndtr(z))
    return (margins * ratio).sum().item()
