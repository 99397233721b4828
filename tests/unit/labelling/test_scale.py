import math

import pytest
import torch

from dina_rl.labelling.scale import likeliest_scale, median_scale, soft_label
from dina_rl.seeding import generator


def log_likelihood(margins: torch.Tensor, scale: float) -> float:
    return torch.special.log_ndtr(margins / (math.sqrt(2) * scale)).sum().item()


def test_a_label_is_equation_5() -> None:
    margins = torch.tensor([-0.3, 0.0, 0.2], dtype=torch.float64)
    expected = torch.distributions.Normal(0.0, 1.0).cdf(margins / math.sqrt(0.1**2 + 0.1**2))
    torch.testing.assert_close(soft_label(margins, 0.1), expected)


@pytest.mark.parametrize("unit", [1e-3, 1e4])
def test_the_likeliest_scale_is_the_annotators_noise(unit: float) -> None:
    """Whatever unit the scores have: judges whose doubt about each picture has deviation 0.3 label by Eq. 5."""
    draws = generator("scale")
    margins = torch.randn(5000, generator=draws, dtype=torch.float64)
    doubt = 0.3 * torch.randn(2, 5000, generator=draws, dtype=torch.float64)
    preferred = torch.where(margins + doubt[0] - doubt[1] > 0, margins, -margins) * unit
    scale = likeliest_scale(preferred)
    assert scale == pytest.approx(0.3 * unit, rel=0.05)
    best = log_likelihood(preferred, scale)
    assert best > max(log_likelihood(preferred, scale * factor) for factor in (0.99, 1.01))


def test_labels_without_a_scale_are_refused() -> None:
    with pytest.raises(ValueError, match="agrees with all 2 labels: they say nothing of its scale; give scale"):
        likeliest_scale(torch.tensor([0.5, 2.0]))
    with pytest.raises(ValueError, match="say nothing of the 3 labels, or the opposite"):
        likeliest_scale(torch.tensor([0.5, -0.2, -1.0]))


def test_the_median_pair_has_the_stated_confidence() -> None:
    margins = torch.tensor([-4.0, 1.0, -2.0, 0.1, 8.0])
    assert soft_label(torch.tensor([2.0]), median_scale(margins, 0.8)).item() == pytest.approx(0.8)
    with pytest.raises(ValueError, match="equal scores"):
        median_scale(torch.tensor([0.0, 0.0, 3.0]), 0.8)
