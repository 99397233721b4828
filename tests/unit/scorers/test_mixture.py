"""The weighted sum of several scorers, and the ways in which the golden metric cannot get into it."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from dina_rl.alignment.advantage import equal_weights, group_advantages
from dina_rl.alignment.algorithms.clipping import clipped_policy_loss
from dina_rl.alignment.algorithms.refl import reward_surrogate
from dina_rl.alignment.algorithms.registry import open_algorithm
from dina_rl.config import AlignRun, RewardsConfig
from dina_rl.scorers.mixture import group_weighted_sum, weighted_sum
from dina_rl.types import GoldenScores

TWO = {"dina": {"weight": 0.5, "mean": -2.0, "std": 4.0}, "pickscore": {"weight": 0.2, "mean": 20.0, "std": 1.5}}
GOLDEN = GoldenScores(values=(0.1, 0.9, 0.4), parts={})


def scores():
    draws = np.random.default_rng(0)
    return {"dina": draws.normal(-2, 4, (3, 5)), "pickscore": draws.normal(20, 1.5, (3, 5))}


def test_the_sum_matches_numpy():
    drawn = scores()
    expected = 0.5 * (drawn["dina"] + 2) / 4 + 0.2 * (drawn["pickscore"] - 20) / 1.5
    found = weighted_sum(RewardsConfig.model_validate(TWO), {n: torch.tensor(s) for n, s in drawn.items()})
    assert np.allclose(found.numpy(), expected)


def test_normalised_inside_the_group_it_matches_numpy():
    drawn = scores()
    parts = {n: (s - s.mean(1, keepdims=True)) / (s.std(1, keepdims=True) + 1e-4) for n, s in drawn.items()}
    found = group_weighted_sum(RewardsConfig.model_validate(TWO), {n: torch.tensor(s) for n, s in drawn.items()})
    assert np.allclose(found.numpy(), 0.5 * parts["dina"] + 0.2 * parts["pickscore"])


@pytest.mark.parametrize(("normalise", "best"), [("constant", 0), ("group", 2)])
def test_group_normalisation_lets_the_weights_decide_and_not_the_scales(normalise, best):
    """The heavier scorer likes the last sample, the one on a thousand times its scale the first."""
    scores = {"dina": torch.tensor([[0.0, 1.0, 2.0]]), "pickscore": torch.tensor([[2000.0, 1000.0, 0.0]])}
    rewards = {"dina": {"weight": 2.0}, "pickscore": {}, "normalise": normalise}
    run = AlignRun.model_validate({"rewards": rewards, "rollout": {"group_size": 36}})
    assert open_algorithm(run).weigh(scores).values[0].argmax() == best


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_one_failed_score_fails_its_group_alone(broken):
    run = AlignRun.model_validate({"rewards": TWO, "rollout": {"group_size": 36}})
    drawn = {name: torch.tensor(score) for name, score in scores().items()}
    drawn["pickscore"][1, 2] = broken
    advantages = open_algorithm(run).weigh(drawn)
    assert advantages.kept.tolist() == [True, False, True]
    assert advantages.failed == 1


WAYS_IN = {
    "as the scores": lambda: weighted_sum(RewardsConfig(), GOLDEN),
    "as a scorer's scores": lambda: weighted_sum(RewardsConfig(), {"dina": GOLDEN}),
    "as a scorer's scores in a group": lambda: group_weighted_sum(RewardsConfig(), {"dina": GOLDEN}),
    "as a further scorer": lambda: weighted_sum(
        RewardsConfig(), {"dina": torch.zeros(1, 3), "golden": torch.tensor([GOLDEN.values])}
    ),
    "as rewards": lambda: group_advantages(GOLDEN),
    "as ReFL's rewards": lambda: equal_weights(GOLDEN),
    "into the loop's weighing": lambda: open_algorithm(AlignRun()).weigh({"dina": GOLDEN}),
    "as advantages": lambda: clipped_policy_loss(torch.zeros(3), GOLDEN, 1e-4),
    "as a reward's gradient": lambda: reward_surrogate(torch.zeros(3, 1, 2, 2), GOLDEN),
}


@pytest.mark.parametrize("enter", WAYS_IN.values(), ids=WAYS_IN)
def test_the_golden_metric_cannot_enter(enter):
    with pytest.raises((ValueError, TypeError, AttributeError)):
        enter()


@pytest.mark.parametrize(
    "rewards",
    [
        {"pickscore": {}},
        {"dina": None, "clip_score": {"path": "yuvalkirstain/PickScore_v1"}},
    ],
    ids=["by its name", "by its model"],
)
def test_what_is_optimised_cannot_be_golden(rewards):
    with pytest.raises(ValidationError, match="cannot be the held-out metric"):
        AlignRun.model_validate({"rewards": rewards, "golden": {"scorer": "pickscore"}})


def test_no_scorer_at_all_is_refused():
    with pytest.raises(ValidationError, match="no scorer is switched on"):
        AlignRun.model_validate({"rewards": {"dina": None}})


def test_comparing_inside_groups_is_not_for_refl():
    with pytest.raises(ValidationError, match=r"rewards\.normalise group compares samples"):
        AlignRun.model_validate(
            {"algorithm": "refl", "rollout": {"num_steps": 40, "group_size": 36}, "rewards": {"normalise": "group"}}
        )
