"""Win rates and position bias of verdicts, against counts by hand."""

import pytest
import torch

from dina_rl.scorers.base import Pair
from dina_rl.scorers.pairwise import ask, missing, position_bias, win_rates, wins_over

NONE = float("nan")


def test_a_judge_who_sees_alone_gives_the_share_of_the_others_that_a_picture_beats():
    strengths = torch.tensor([0.3, 0.9, 0.1, 0.5])
    verdicts = (strengths[:, None] > strengths).float()
    assert win_rates(verdicts).tolist() == pytest.approx([1 / 3, 1, 0, 2 / 3])
    assert position_bias(verdicts).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("place", [0.0, 1.0])
def test_a_judge_who_names_one_place_prefers_nothing_and_is_all_bias(place):
    verdicts = torch.full((2, 3, 3), place)
    assert win_rates(verdicts).tolist() == [[0.5] * 3] * 2
    assert position_bias(verdicts).tolist() == [[1.0] * 3] * 2


def test_both_orders_are_averaged_by_hand():
    # 0 beats 1 in both orders; 0 and 2: the place decides; 1 and 2: a tie in one order, 2 in the other
    verdicts = torch.tensor([[NONE, 1.0, 1.0], [0.0, NONE, 0.5], [1.0, 1.0, NONE]])
    assert win_rates(verdicts).tolist() == pytest.approx([(1 + 0.5) / 2, (0 + 0.25) / 2, (0.5 + 0.75) / 2])
    assert position_bias(verdicts).tolist() == pytest.approx([1 / 2, 0, 1 / 2])
    assert win_rates(verdicts).sum().item() == pytest.approx(3 / 2)


def test_a_missing_verdict_is_neither_a_tie_nor_a_loss():
    verdicts = torch.tensor([[NONE, 1.0, 1.0], [0.0, NONE, 1.0], [0.0, NONE, NONE]])
    assert win_rates(verdicts).isnan().tolist() == [False, True, True]
    assert win_rates(verdicts, least=0.5).tolist() == [1, 0, 0], "over picture 0 alone"
    assert win_rates(verdicts, least=0.51).isnan().tolist() == [False, True, True]
    assert missing(verdicts).tolist() == [0, 0.5, 0.5]
    assert position_bias(verdicts).tolist() == [0, 0, 0]
    silent = torch.full((2, 2), NONE)
    assert win_rates(silent, least=0.5).isnan().all()
    assert (missing(silent).tolist(), missing(silent[:1, :1]).tolist()) == ([1, 1], [0])


def test_win_rates_over_verdicts_that_came_by_chance_are_right_in_the_mean():
    """8 pictures, one verdict in 20 lost: few groups are dropped, and the rest is not pulled to 0 or to a half."""
    source = torch.Generator().manual_seed(0)
    strengths = torch.linspace(-2, 2, 8)
    verdicts = (strengths[:, None] - strengths).sigmoid().expand(4000, 8, 8).clone()
    verdicts[:, range(8), range(8)] = NONE
    whole = win_rates(verdicts[0])
    verdicts[torch.rand(verdicts.shape, generator=source) < 0.05] = NONE
    rates = win_rates(verdicts, least=0.5)
    kept = rates.isfinite().all(1)
    assert win_rates(verdicts).isfinite().all(1).float().mean() < 0.1, "one missing verdict costs a group"
    assert kept.float().mean() > 0.97
    torch.testing.assert_close(rates[kept].mean(0), whole, rtol=0, atol=5e-3)


class Brightness:
    """A judge without a server: the brighter picture is better."""

    def __init__(self):
        self.pairs = []

    def __call__(self, images, pairs):
        self.pairs += pairs
        bright = images.flatten(1).mean(1)
        return torch.tensor([float(bright[pair.first] > bright[pair.second]) for pair in pairs])

    def reduce(self, pixels):
        return pixels.float() / 255


def test_groups_are_asked_about_within_themselves_and_in_both_orders():
    levels = torch.tensor([[0.1, 0.5, 0.3], [0.9, 0.2, 0.6]])
    judge = Brightness()
    verdicts = ask(judge, levels.view(2, 3, 1, 1, 1).expand(-1, -1, 3, 2, 2), ("a", "b"))
    assert win_rates(verdicts).tolist() == [[0, 1, 0.5], [1, 0, 0.5]]
    assert [pair.prompt for pair in judge.pairs] == ["a"] * 6 + ["b"] * 6
    assert len({(pair.first, pair.second) for pair in judge.pairs}) == 12
    assert all(pair.first // 3 == pair.second // 3 for pair in judge.pairs)
    assert judge.pairs[0] == Pair(prompt="a", first=0, second=1)


def test_a_picture_wins_over_its_opponent_and_half_the_time_over_itself():
    images, darker = torch.full((2, 3, 2, 2), 0.5), torch.full((2, 3, 2, 2), 100, dtype=torch.uint8)
    rates, bias = wins_over(Brightness(), images, darker, ("a", "b"))
    assert (rates.tolist(), bias.tolist()) == ([1, 1], [0, 0])
    judge = Brightness()
    rates, bias = wins_over(judge, images, None, ("a", "b"))
    assert rates.tolist() == [0.5, 0.5]
    assert bias.isnan().all()
    assert not judge.pairs
