"""Which samples of an iteration's groups the learner trains on: a sample that is left out costs no forward."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Samples of the groups of one minibatch, which stand one after another."""

    rows: torch.Tensor  # [R], ascending: those that go through the model
    count: int  # samples that the loss is a mean over; those of them that are in no row would have added 0


def select(advantages: Sequence[torch.Tensor], keep: int | None, *, zeros: bool) -> Selection:
    """The samples of each group that `extremes` names.

    Args:
        advantages: [G] of each group.
        keep: samples of each group; None: all.
        zeros: whether a sample of advantage 0 adds to the gradient.
    """
    kept = torch.cat([extremes(each, keep) for each in advantages])
    chosen = kept if zeros else kept & (torch.cat(list(advantages)) != 0)
    return Selection(rows=chosen.nonzero().flatten(), count=int(kept.sum()))


def extremes(advantages: torch.Tensor, keep: int | None) -> torch.Tensor:
    """Mask [G] of the keep / 2 highest and the keep / 2 lowest of a group's `advantages`; all of them if None.

    As many from either end, and not the largest in size: what is better is still contrasted with what is worse where a
    group's rewards are skewed. (DanceGRPO's best-of-n, arXiv 2505.07818, chooses so too. The subset of the greatest
    variance, which PODS takes, arXiv 2504.13818, is some of the highest and the rest from the lowest: these, where the
    rewards are about symmetric.) Of equal ones the earlier counts as the lower.
    """
    if keep is None:
        return torch.ones(len(advantages), dtype=torch.bool)
    order = advantages.argsort(stable=True)
    mask = torch.zeros(len(advantages), dtype=torch.bool)
    mask[order[: keep // 2]] = True
    mask[order[-(keep // 2) :]] = True
    return mask
