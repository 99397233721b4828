import numpy
import pytest
import torch

from dina_rl.evaluation.uncertainty import score_variance, uncertainty, variation_ratio


def test_variation_ratio_by_hand() -> None:
    """Four draws: always right, always wrong, 3 of 4, 2 of 4; an equal score is not a win (Eq. 14)."""
    margins = torch.tensor([[1.0, -1, 1, 1], [2, -2, 1, 1], [1, -1, 1, 0], [1, -3, -1, -1]])
    assert variation_ratio(margins).tolist() == [0, 0, 0.25, 0.5]


def test_variance_is_the_unbiased_one() -> None:
    scores = numpy.random.default_rng(0).normal(size=(10, 7))
    assert score_variance(torch.tensor(scores)).numpy() == pytest.approx(scores.var(0, ddof=1))


def test_the_table_line_averages_over_pairs_and_images() -> None:
    draws = numpy.random.default_rng(1)
    better, worse = draws.normal(0.5, 1, (6, 20)), draws.normal(0, 1, (6, 20))
    margins, scores = better - worse, numpy.concatenate([better, worse], 1)
    wins = (margins > 0).mean(0)
    result = uncertainty(torch.tensor(margins), torch.tensor(scores))
    assert result.variation_ratio == pytest.approx(numpy.minimum(wins, 1 - wins).mean())
    assert result.mean_margin == pytest.approx(margins.mean())
    assert result.score_variance == pytest.approx(scores.var(0, ddof=1).mean())
    assert (result.draws, result.pairs, result.images) == (6, 20, 40)


def test_one_draw_has_no_spread() -> None:
    with pytest.raises(ValueError, match="2 or more draws"):
        uncertainty(torch.ones(1, 3), torch.ones(1, 6))


def test_failed_scores_are_left_out_and_counted() -> None:
    nan, inf = float("nan"), float("inf")
    margins = torch.tensor([[1.0, 2, 1], [nan, -2, inf]])
    scores = torch.tensor([[1.0, 0, 2, 0, 1], [nan, 0, 0, 2, inf]])
    result = uncertainty(margins, scores)
    assert (result.pairs, result.failed_pairs, result.images, result.failed_images) == (1, 2, 3, 2)
    assert (result.variation_ratio, result.mean_margin) == (0.5, 0)
    assert result.score_variance == pytest.approx(4 / 3)
    nothing = uncertainty(torch.full((2, 3), nan), torch.full((2, 6), nan))
    assert (nothing.variation_ratio, nothing.mean_margin, nothing.score_variance) == (None, None, None)
    assert (nothing.pairs, nothing.failed_pairs, nothing.failed_images) == (0, 3, 6)
