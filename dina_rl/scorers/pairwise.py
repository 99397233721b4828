"""Numbers from a judge's verdicts: every pair is shown in both orders, so that a liking for a place cancels out.

n pictures of one prompt have verdicts V [n, n]: V[a, b] is the probability that a is better, shown first, and b second;
NaN on the diagonal, and where there is no verdict. What lacks one of its two verdicts has no number: a failure is no
tie.
"""

from collections.abc import Sequence

import torch

from dina_rl.scorers.base import Judge, Pair

BIAS = "position_bias"


def ask(judge: Judge, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    """Verdicts [P, n, n] on groups of pictures [P, n, 3, h, w] in [0, 1] of P prompts, by P n (n - 1) questions."""
    groups, size = images.shape[:2]
    places = [(g, a, b) for g in range(groups) for a in range(size) for b in range(size) if a != b]
    pairs = [Pair(prompt=prompts[g], first=g * size + a, second=g * size + b) for g, a, b in places]
    verdicts = torch.full((groups, size, size), torch.nan)
    if places:
        verdicts[tuple(torch.tensor(places).T)] = judge(images.flatten(0, 1), pairs)
    return verdicts


def wins_over(
    judge: Judge, images: torch.Tensor, opponents: torch.Tensor | None, prompts: Sequence[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(win rates [B], position bias [B]) of images [B, 3, h, w] in [0, 1] over one opponent each, uint8 of that shape.

    None: each is its own opponent, over which it wins half the time without being asked, and no bias is known.
    """
    if opponents is None:
        return torch.full((len(images),), 0.5), torch.full((len(images),), torch.nan)
    both = torch.stack([images.cpu(), opponents.float() / 255], 1)
    verdicts = ask(judge, both, prompts)
    return win_rates(verdicts)[:, 0], position_bias(verdicts)[:, 0]


def win_rates(verdicts: torch.Tensor) -> torch.Tensor:
    """Mean probability [..., n] that a picture is better than another of its group, of verdicts [..., n, n].

    Pref-GRPO's reward (arXiv 2508.20751), here with both orders of a pair.
    """
    return _over_others((verdicts + 1 - verdicts.mT) / 2)


def position_bias(verdicts: torch.Tensor) -> torch.Tensor:
    """Share [..., n] of a picture's comparisons [..., n, n] whose verdict follows the position.

    Both orders name the place that is shown first, or both the second. A tie in one of them follows nothing.
    """
    follows = (verdicts - 0.5) * (verdicts.mT - 0.5)
    return _over_others(torch.where(follows.isnan(), torch.nan, (follows > 0).float()))


def _over_others(values: torch.Tensor) -> torch.Tensor:
    """Mean [..., n] of each row [..., n, n] but for the diagonal."""
    size = values.shape[-1]
    return values.masked_fill(torch.eye(size, dtype=torch.bool), 0).sum(-1) / (size - 1)
