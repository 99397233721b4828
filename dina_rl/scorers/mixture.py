"""From several scorers' opinions to one reward."""

from collections.abc import Mapping
from typing import Literal

import torch

from dina_rl.config import RewardsConfig, ScorerConfig

EPSILON = 1e-4  # as in flow_grpo: keeps nearly constant groups from exploding


def weighted_sum(rewards: RewardsConfig, scores: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """sum_i weight_i (score_i - mean_i) / std_i of equally shaped scores, with the constants of the configuration.

    A score that is not finite makes its sum not finite, never 0.

    Raises:
        ValueError: anything but a tensor per configured scorer; held-out metrics have a type of their own.
    """
    _check(rewards, scores)
    return normalised_sum(rewards.scorers, scores)


def normalised_sum(parts: Mapping[str, ScorerConfig], scores: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The sum itself: `scores` has one tensor of every part."""
    terms = (each.weight * (scores[name] - each.mean) / each.std for name, each in parts.items())
    return sum(terms, torch.zeros(()))


def group_weighted_sum(rewards: RewardsConfig, scores: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The same for scores [P, G], each centred and divided by its standard deviation within the group beforehand."""
    _check(rewards, scores)
    terms = (each.weight * standardised(scores[name], "group") for name, each in rewards.scorers.items())
    return sum(terms, torch.zeros(()))


def standardised(scores: torch.Tensor, over: Literal["group", "global"]) -> torch.Tensor:
    """Scores [P, G] minus their group's mean, over (population) standard deviation of the group, or of all, + 1e-4."""
    spread = scores.std(1, keepdim=True, correction=0) if over == "group" else scores.std(correction=0)
    return (scores - scores.mean(1, keepdim=True)) / (spread + EPSILON)


def _check(rewards: RewardsConfig, scores: Mapping[str, torch.Tensor]) -> None:
    if not isinstance(scores, Mapping) or not all(isinstance(score, torch.Tensor) for score in scores.values()):
        raise ValueError("a reward is made of tensors, one per scorer")
    if set(scores) != set(rewards.scorers):
        raise ValueError(f"scores of {sorted(scores)} where {sorted(rewards.scorers)} are configured")
