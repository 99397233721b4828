"""Group advantages against a float64 numpy derivation, and what is dropped."""

import numpy as np
import pytest
import torch

from dina_rl.alignment.advantage import group_advantages, relative_advantages
from dina_rl.config import RewardsConfig
from dina_rl.types import GoldenScores

REWARDS = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("std", ["group", "global"])
def test_advantages_match_numpy(std):
    values = REWARDS.double().numpy()
    centred = values - values.mean(1, keepdims=True)
    spread = values.std(1, keepdims=True) if std == "group" else values.std()
    expected = np.clip(centred / (spread + 1e-4), -1.2, 1.2)
    result = group_advantages(REWARDS, std=std, clip=1.2)
    assert np.allclose(result.values.numpy(), expected, atol=1e-5)
    assert np.abs(expected).max() == pytest.approx(1.2), "the clip must bind for this test to mean anything"


def test_constant_groups_are_dropped_and_counted():
    rewards = REWARDS.clone()
    rewards[1] = 0.3
    result = group_advantages(rewards)
    assert result.kept.tolist() == [True, False, True, True, True]
    assert (result.constant, result.failed) == (1, 0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_failed_reward_drops_its_group_and_leaves_the_others_alone(bad):
    rewards = REWARDS.clone()
    rewards[2, 3] = bad
    result = group_advantages(rewards, std="global")
    others = [0, 1, 3, 4]
    assert (result.constant, result.failed) == (0, 1)
    assert torch.equal(result.values[2], torch.zeros(7))
    assert torch.equal(result.values[others], group_advantages(REWARDS[others], std="global").values)


def test_all_groups_constant_gives_no_update_rather_than_nan():
    result = group_advantages(torch.ones(3, 4))
    assert not result.kept.any()
    assert torch.equal(result.values, torch.zeros(3, 4))


def test_the_golden_metric_is_refused():
    golden = GoldenScores(values=(0.1, 0.9), parts={})
    with pytest.raises(ValueError, match="rewards must be"):
        group_advantages(golden)


MIXED = RewardsConfig.model_validate({"dina": {}, "pickscore": {"weight": 0.2}, "normalise": "advantage"})


def test_scorers_with_advantages_of_their_own_add_up_and_are_not_standardised_again():
    scores = {"dina": REWARDS, "pickscore": 30 * REWARDS.flip(1) ** 2}
    expected = 0.0
    for weight, score in zip((1.0, 0.2), scores.values(), strict=True):
        values = score.double().numpy()
        expected += weight * np.clip((values - values.mean(1, keepdims=True)) / (values.std() + 1e-4), -1.2, 1.2)
    found = relative_advantages(MIXED, scores, std="global", clip=1.2)
    assert np.allclose(found.values.numpy(), expected, atol=1e-5)
    assert found.kept.all()


def test_a_mixed_group_fails_with_any_scorer_and_is_constant_with_all():
    scores = {"dina": REWARDS.clone(), "pickscore": REWARDS.clone()}
    scores["dina"][0, 1] = float("nan")  # failed, though PickScore has an opinion
    scores["dina"][1] = 0.5  # PickScore still tells its samples apart
    scores["dina"][2] = scores["pickscore"][2] = 0.5
    found = relative_advantages(MIXED, scores, std="group", clip=5.0)
    assert found.kept.tolist() == [False, True, False, True, True]
    assert (found.failed, found.constant) == (1, 1)
    assert found.values[0].eq(0).all()
    assert torch.allclose(found.values[1], 0.2 * group_advantages(REWARDS[1:2]).values[0])


def test_a_group_whose_scorers_cancel_out_carries_no_preference():
    mixed = RewardsConfig.model_validate({"dina": {}, "pickscore": {}, "normalise": "advantage"})
    scores = {"dina": REWARDS, "pickscore": REWARDS.clone()}
    scores["pickscore"][1] *= -1
    found = relative_advantages(mixed, scores, std="group", clip=5.0)
    assert found.kept.tolist() == [True, False, True, True, True]
    assert (found.failed, found.constant) == (0, 1)
