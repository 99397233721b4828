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


def clipped_policy_loss(log_ratio: torch.Tensor, advantages: torch.Tensor, clip_range: float) -> PolicyLoss:
    """-min(A r, A clip(r, 1 - c, 1 + c)) with r = exp(log_ratio); all arguments [B]."""
    ratio = torch.exp(log_ratio)
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = torch.maximum(-advantages * ratio, -advantages * clipped)
    return PolicyLoss(
        loss=loss,
        ratio=ratio.detach(),
        clipped_low=(ratio < 1 - clip_range) & (advantages < 0),
        clipped_high=(ratio > 1 + clip_range) & (advantages > 0),
    )


def regulated_log_ratio(
    log_ratio: torch.Tensor, mean: torch.Tensor, old_mean: torch.Tensor, std: float
) -> torch.Tensor:
    """GRPO-Guard's log-ratio [B] (arXiv 2510.22319): free of its bias and of equal scale at every step.

    With x = old_mean + std eps and d = mean - old_mean, the log-ratio is E_dims[eps d] / std - E_dims[d^2] / (2 std^2):
    its second term pushes every ratio below 1, so that the upper clip is hardly ever met, and its first one grows as
    std shrinks. Adding the second term, per sample, and multiplying by std leaves E_dims[eps d].

    Args:
        log_ratio: [B], difference of two `flow.sde.log_prob`.
        mean: of the step's law under the policy [B, C, H, W].
        old_mean: the same under the policy that sampled.
        std: of the step's law.
    """
    bias = ((mean - old_mean) ** 2).flatten(1).mean(1) / (2 * std**2)
    return (log_ratio + bias) * std


def ratio_gate(clip_range: float, gap: float, floor: float) -> str | None:
    """What is wrong if |ratio - 1| before the first update, which is only noise, exceeds the clip range.

    Args:
        gap: largest |ratio - 1| of the first minibatch, before any update.
        floor: largest |replayed - sampled log-probability|.
    """
    if gap <= clip_range:
        return None
    return (
        f"before any update |ratio - 1| is up to {gap:.1e}, beyond grpo.clip_range {clip_range:.1e}: clipping sees "
        f"noise (replayed and sampled log-probabilities differ by up to {floor:.1e}); set grpo.old_log_probs to "
        "recompute, pipeline.dtype to float32, or a wider clip range"
    )
