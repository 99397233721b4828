import math

import pytest
import torch

from dina_rl.config import ThurstoneConfig
from dina_rl.evaluation.calibration import calibrate, ensemble_variance, thurstone_probability


def test_reliability_by_hand() -> None:
    """Two bins, [0.5, 0.75) and [0.75, 1]: 0.6 right and 0.4 (its mirror) wrong; 0.75, 0.9 right and 0.1 wrong."""
    result = calibrate(torch.tensor([0.6, 0.4, 0.75, 0.9, 0.1], dtype=torch.float64), bins=2)
    assert result.edges == (0.5, 0.75, 1.0)
    assert result.counts == (2, 3)
    assert result.confidence == pytest.approx((0.6, 0.85))
    assert result.accuracy == pytest.approx((0.5, 2 / 3))
    assert result.ece == pytest.approx((2 * 0.1 + 3 * abs(2 / 3 - 0.85)) / 5)
    assert result.brier == pytest.approx((0.16 + 0.36 + 0.0625 + 0.01 + 0.81) / 5)


def test_empty_bins_say_nothing() -> None:
    result = calibrate(torch.tensor([0.99, 1.0]), bins=5)
    assert result.counts == (0, 0, 0, 0, 2)
    assert result.confidence[:4] == result.accuracy[:4] == (None,) * 4


def test_equal_scores_are_half_right() -> None:
    result = calibrate(torch.tensor([0.5, 0.5]), bins=10)
    assert (result.ece, result.brier, result.accuracy[0]) == (0, 0.25, 0.5)


def test_failed_scores_are_left_out_and_counted() -> None:
    result = calibrate(torch.tensor([0.8, math.nan]), bins=10)
    assert (result.failed, sum(result.counts)) == (1, 1)
    nothing = calibrate(torch.tensor([math.nan]), bins=2)
    assert (nothing.ece, nothing.brier, nothing.counts, nothing.failed) == (None, None, (0, 0), 1)
    assert nothing.confidence == nothing.accuracy == (None, None)


def test_labels_drawn_from_the_likelihood_are_calibrated_and_wrong_scales_are_not() -> None:
    draws = torch.Generator().manual_seed(0)
    config = ThurstoneConfig(k=2.0, sigma_u=0.1)
    margin = 0.8 * torch.randn(20000, generator=draws, dtype=torch.float64)
    first_wins = torch.rand(20000, generator=draws) < thurstone_probability(margin, (0.4,), config)
    preferred = torch.where(first_wins, margin, -margin)
    assert calibrate(thurstone_probability(preferred, (0.4,), config), bins=10).ece < 0.015
    assert calibrate(thurstone_probability(3 * preferred, (0.4,), config), bins=10).ece > 0.1


def test_probability_is_equation_8() -> None:
    config = ThurstoneConfig(k=2.0, sigma_u=0.1)
    spread = math.sqrt(2 * (2 * 0.4**2 + 0.01))
    expected = (1 + math.erf(0.5 / spread / math.sqrt(2))) / 2
    assert thurstone_probability(torch.tensor([0.5]), (0.4,), config).item() == pytest.approx(expected, rel=1e-12)


def test_an_ensemble_has_the_mean_variance_of_its_levels() -> None:
    calibrated, fixed = ThurstoneConfig(k=2.0, sigma_u=0.1), ThurstoneConfig(variance="fixed", sigma_u=0.5)
    levels = (0.2, 0.5, 0.7)
    assert ensemble_variance(levels, calibrated).item() == pytest.approx(2 * (0.04 + 0.25 + 0.49) / 3 + 0.01)
    assert ensemble_variance(levels, fixed).item() == pytest.approx(0.25)
