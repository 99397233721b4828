"""Numbers from a judge's verdicts: every pair is shown in both orders, so that a liking for a place cancels out.

n pictures of one prompt have verdicts V [n, n]: V[a, b] is the probability that a is better, shown first, and b second;
NaN on the diagonal, and where there is no verdict. A comparison that lacks one of its two verdicts has no number: a
failure is no tie, and one order alone would have the liking in it.

A win rate is the mean over the comparisons that a picture has. Of those that failed for reasons of their own (a server
that did not answer, an answer that breaks off) this is an unbiased estimate of the mean over all: which are there was
drawn by chance. It is no longer one where failing goes with the outcome: a judge who does not answer where two pictures
are alike leaves out halves, and so moves rates away from a half; who never answers about a picture gives it none. Hence
a least share that a picture must have, below which it has no win rate, and the share that is missing beside it, to be
looked at. To demand all instead costs a group of n for one verdict of n (n - 1): where one request in a hundred fails,
43 of 100 groups of 8.
"""

from collections.abc import Sequence

import torch

from dina_rl.scorers.base import Judge, Pair

BIAS = "position_bias"
MISSING = "missing"
ROUNDING = 1e-6
"""Of a share in fp32."""


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


def win_rates(verdicts: torch.Tensor, *, least: float = 1.0) -> torch.Tensor:
    """Mean probability [..., n] that a picture is better than another of its group, of verdicts [..., n, n].

    Pref-GRPO's reward (arXiv 2508.20751), here with both orders of a pair.

    Args:
        least: share of its comparisons that a picture must have both verdicts of; below it its rate is NaN.
    """
    compared = 1 - missing(verdicts)
    rates = _over_compared((verdicts + 1 - verdicts.mT) / 2)
    return rates.masked_fill(compared < least - ROUNDING, torch.nan)


def missing(verdicts: torch.Tensor) -> torch.Tensor:
    """Share [..., n] of a picture's comparisons [..., n, n] that lack a verdict; none is missing of a group of one."""
    others = verdicts.shape[-1] - 1
    return 1 - _compared(verdicts).sum(-1) / others if others else torch.zeros(verdicts.shape[:-1])


def position_bias(verdicts: torch.Tensor) -> torch.Tensor:
    """Share [..., n] of a picture's comparisons [..., n, n] whose verdict follows the position.

    Both orders name the place that is shown first, or both the second. A tie in one of them follows nothing. It is of
    the comparisons that have both verdicts; NaN where none has.
    """
    follows = (verdicts - 0.5) * (verdicts.mT - 0.5)
    return _over_compared(torch.where(follows.isnan(), torch.nan, (follows > 0).float()))


def _compared(values: torch.Tensor) -> torch.Tensor:
    """Which entries [..., n, n] are numbers of two pictures."""
    return values.isfinite() & values.mT.isfinite() & ~torch.eye(values.shape[-1], dtype=torch.bool)


def _over_compared(values: torch.Tensor) -> torch.Tensor:
    """Mean [..., n] of the numbers of two pictures in each row [..., n, n]; NaN where there is none."""
    there = _compared(values)
    return torch.where(there, values, 0.0).sum(-1) / there.sum(-1)
