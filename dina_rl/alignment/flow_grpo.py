"""The Flow-GRPO objective: a clipped policy gradient per denoising step (arXiv 2505.05470, Eq. 5-7)."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyLoss:
    """Per-sample terms of one step's objective, all [B]."""

    loss: torch.Tensor
    ratio: torch.Tensor
    clipped_low: torch.Tensor  # bool: ratio below 1 - clip and the clip is what counts
    clipped_high: torch.Tensor  # bool: ratio above 1 + clip and the clip is what counts


def clipped_policy_loss(
    log_prob: torch.Tensor, old_log_prob: torch.Tensor, advantages: torch.Tensor, clip_range: float
) -> PolicyLoss:
    """-min(A r, A clip(r, 1 - c, 1 + c)) with r = exp(log_prob - old_log_prob); all arguments [B]."""
    ratio = torch.exp(log_prob - old_log_prob)
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = torch.maximum(-advantages * ratio, -advantages * clipped)
    return PolicyLoss(
        loss=loss,
        ratio=ratio.detach(),
        clipped_low=(ratio < 1 - clip_range) & (advantages < 0),
        clipped_high=(ratio > 1 + clip_range) & (advantages > 0),
    )
