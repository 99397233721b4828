"""Group-relative advantages (GRPO)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from dina_rl.config import RewardsConfig
from dina_rl.scorers.mixture import group_weighted_sum, standardised, weighted_sum


@dataclass(frozen=True, slots=True, kw_only=True)
class Advantages:
    values: torch.Tensor  # [P, G]; rows of groups that are not kept are zero
    kept: torch.Tensor  # [P] bool
    failed: int  # groups with a reward that is not finite
    constant: int  # groups whose rewards are all equal, or whose scorers cancel out: they carry no preference


def equal_weights(rewards: torch.Tensor) -> Advantages:
    """Weight 1 for every sample [P, G] of the groups whose rewards are finite: ReFL's, which compares nothing."""
    kept = rewards.isfinite().all(1)
    return Advantages(values=torch.ones_like(rewards), kept=kept, failed=int((~kept).sum()), constant=0)


def relative_advantages(
    rewards: RewardsConfig,
    scores: Mapping[str, torch.Tensor],
    *,
    std: Literal["group", "global"],
    clip: float,
) -> Advantages:
    """Group-relative advantages of the mixture of scores [P, G], by `rewards.normalise`."""
    if rewards.normalise == "advantage":
        return mixed_advantages(rewards, scores, std=std, clip=clip)
    combine = group_weighted_sum if rewards.normalise == "group" else weighted_sum
    return group_advantages(combine(rewards, scores), std=std, clip=clip)


def mixed_advantages(
    rewards: RewardsConfig,
    scores: Mapping[str, torch.Tensor],
    *,
    std: Literal["group", "global"],
    clip: float,
) -> Advantages:
    """sum_i weight_i A_i with each scorer's own advantage A_i [P, G], clipped, as the paper's released code mixes two.

    A group with a score that is not finite is dropped whole; one whose sums are all 0, most often because no scorer
    tells its samples apart, is constant.
    """
    finite = weighted_sum(rewards, scores).isfinite().all(1)
    parts = {}
    for name, score in scores.items():
        parts[name] = group_advantages(torch.where(finite[:, None], score, torch.nan), std=std, clip=clip)
    values = torch.stack([rewards.scorers[name].weight * part.values for name, part in parts.items()]).sum(0)
    varied = values.ne(0).any(1)
    return Advantages(values=values, kept=varied, failed=int((~finite).sum()), constant=int((finite & ~varied).sum()))


def group_advantages(
    rewards: torch.Tensor, *, std: Literal["group", "global"] = "group", clip: float = 5.0
) -> Advantages:
    """(reward - group mean) / (std + 1e-4), clipped to [-clip, clip].

    Args:
        rewards: [P, G], fp32. Nothing else: held-out metrics have a type of their own that does not fit here.
        std: `group` divides by each group's population standard deviation, `global` by that of all kept rewards.

    Groups with a non-finite reward or with zero variance are dropped and counted, never filled in.
    """
    if not isinstance(rewards, torch.Tensor) or rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError("rewards must be a [prompts, samples >= 2] tensor")
    finite = rewards.isfinite().all(1)
    varied = torch.where(finite[:, None], rewards, torch.zeros_like(rewards)).std(1, correction=0) > 0
    kept = finite & varied
    values = torch.zeros_like(rewards)
    if kept.any():
        values[kept] = standardised(rewards[kept], std).clamp(-clip, clip)
    return Advantages(values=values, kept=kept, failed=int((~finite).sum()), constant=int((finite & ~varied).sum()))
