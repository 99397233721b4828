"""Group-relative advantages (GRPO)."""

from dataclasses import dataclass
from typing import Literal

import torch

from dina_rl.scorers.mixture import standardised


@dataclass(frozen=True, slots=True, kw_only=True)
class Advantages:
    values: torch.Tensor  # [P, G]; rows of groups that are not kept are zero
    kept: torch.Tensor  # [P] bool
    failed: int  # groups with a reward that is not finite
    constant: int  # groups whose rewards are all equal: they carry no preference


def equal_weights(rewards: torch.Tensor) -> Advantages:
    """Weight 1 for every sample [P, G] of the groups whose rewards are finite: ReFL's, which compares nothing."""
    kept = rewards.isfinite().all(1)
    return Advantages(values=torch.ones_like(rewards), kept=kept, failed=int((~kept).sum()), constant=0)


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
