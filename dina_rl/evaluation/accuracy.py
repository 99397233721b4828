"""Agreement of scores with people's rankings, in the three conventions that published numbers use.

A set is judged as groups (`PreferenceRecord`): every pair of a group's images is one comparison. What each convention
does with a comparison:

                     people tie           scores tie    average
    micro            left out             wrong         over all comparisons (ImageReward, HPSv3; the primary number)
    ties_wrong       wrong                wrong         over all comparisons (the published DiNa-LRM evaluator)
    per_prompt       right                wrong         within each prompt, then over prompts (HPSv2's rank accuracy)

A judge is asked in both orders, and each verdict is half of a comparison: one that follows the position is half right.

Comparisons of one prompt share images and annotators, so intervals come from resampling whole prompts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import torch

from dina_rl.data.sets.records import PreferenceRecord
from dina_rl.seeding import generator

Convention = Literal["micro", "ties_wrong", "per_prompt"]
CONVENTIONS: tuple[Convention, ...] = ("micro", "ties_wrong", "per_prompt")
UNNAMED = "(unnamed)"  # model or category of a record without, in a set that names those of others
RESAMPLES_AT_ONCE = 64  # bounds the bootstrap's memory: 64 x prompts


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparisons:
    """Every pair of images of every group of a set, judged by people and by one scorer. N comparisons."""

    margins: torch.Tensor  # [N] float64, score of the image that people prefer minus the other's; NaN: a failed score;
    # of a judge its mean probability minus .5, NaN without a verdict in both orders
    tied: torch.Tensor  # [N] bool, people rank both alike (the margin's sign then means nothing)
    prompts: torch.Tensor  # [N] int64, which prompt: groups of equal prompts are one
    records: torch.Tensor  # [N] int64, `PreferenceRecord.index`
    models: tuple[tuple[str, str], ...] | None  # generators of the two images, sorted; None: the set does not say
    categories: tuple[str, ...] | None
    verdicts: torch.Tensor | None = None
    """[N, 2] float64, a judge's probabilities that the image that people prefer is better, shown first and second"""

    def __len__(self) -> int:
        return len(self.margins)

    def select(self, rows: torch.Tensor) -> "Comparisons":
        """The comparisons at `rows`, int64 [M]."""
        chosen = rows.tolist()
        return Comparisons(
            margins=self.margins[rows],
            tied=self.tied[rows],
            prompts=self.prompts[rows],
            records=self.records[rows],
            models=None if self.models is None else tuple(self.models[row] for row in chosen),
            categories=None if self.categories is None else tuple(self.categories[row] for row in chosen),
            verdicts=None if self.verdicts is None else self.verdicts[rows],
        )

    @property
    def agreement(self) -> torch.Tensor:
        """[N] float64, how far scorer and people agree: 1, 0, or .5 where a judge does in one order of two."""
        if self.verdicts is None:
            return (self.margins > 0).double()  # NaN and 0 are not: they are wrong
        return (self.verdicts > 0.5).double().mean(1) * ~self.margins.isnan()

    @property
    def position_bias(self) -> float | None:
        """Share of a judge's whole verdicts that name one place in both orders; None: no judge, or none is whole."""
        if self.verdicts is None or self.margins.isnan().all():
            return None
        whole = self.verdicts[~self.margins.isnan()] - 0.5
        return (whole.prod(1) < 0).double().mean().item()

    def untied(self) -> "Comparisons":
        """Those that people decide."""
        return self.select((~self.tied).nonzero().flatten())


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """One scorer's agreement with one set. Shares in [0, 1]; see the module for the conventions."""

    micro: float
    ties_wrong: float
    per_prompt: float
    pairs: int  # comparisons that people decide: micro's denominator
    ties: int  # comparisons that people leave undecided
    predicted_ties: int  # of `pairs`, those with equal scores; of a judge, whose two orders say tie or contradict
    failed: int  # of `pairs`, those with a score that is not a number: wrong in every convention
    prompts: int
    position_bias: float | None = None  # of a judge, the share of `pairs` whose verdict follows the position


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A percentile bootstrap confidence interval."""

    low: float
    high: float


def compare(records: Sequence[PreferenceRecord], scores: Mapping[int, torch.Tensor]) -> Comparisons:
    """All comparisons of the records that have scores.

    Args:
        scores: `PreferenceRecord.index` -> scores of its images [images], or a judge's verdicts [images, images] as
            `scorers.pairwise` has them.

    Raises:
        ValueError: another number of scores than images.
    """
    numbers: dict[str, int] = {}
    margins, tied, prompts, indices, models, categories = [], [], [], [], [], []
    verdicts: list[tuple[float, float]] = []
    for record in records:
        if record.index not in scores:
            continue
        values = scores[record.index].double()
        if len(values) != len(record.images):
            raise ValueError(f"record {record.index} has {len(record.images)} images and {len(values)} scores")
        number = numbers.setdefault(record.prompt, len(numbers))
        for a, b in combinations(range(len(values)), 2):
            better, worse = (a, b) if record.ranks[a] <= record.ranks[b] else (b, a)
            if values.dim() == 2:
                verdicts.append((values[better, worse].item(), 1 - values[worse, better].item()))
            else:
                margins.append((values[better] - values[worse]).item())
            tied.append(record.ranks[a] == record.ranks[b])
            prompts.append(number)
            indices.append(record.index)
            models.append(_model_pair(record, a, b))
            categories.append(record.category)
    judged = torch.tensor(verdicts, dtype=torch.float64) if verdicts else None
    return Comparisons(
        margins=torch.tensor(margins, dtype=torch.float64) if judged is None else judged.mean(1) - 0.5,
        tied=torch.tensor(tied, dtype=torch.bool),
        prompts=torch.tensor(prompts, dtype=torch.int64),
        records=torch.tensor(indices, dtype=torch.int64),
        models=tuple(pair or (UNNAMED, UNNAMED) for pair in models) if any(models) else None,
        categories=tuple(category or UNNAMED for category in categories) if any(categories) else None,
        verdicts=judged,
    )


def _model_pair(record: PreferenceRecord, a: int, b: int) -> tuple[str, str] | None:
    """The generators of two of a record's images, in the order of their names."""
    if record.models is None:
        return None
    first, second = sorted((record.models[a], record.models[b]))
    return first, second


def measure(comparisons: Comparisons) -> Accuracy:
    """Accuracy in all conventions.

    Raises:
        ValueError: people decide none of the comparisons.
    """
    counts = _Counts.of(comparisons)
    pairs = int(counts.untied.sum())
    if not pairs:
        raise ValueError(f"nothing to measure: people decide none of {len(comparisons)} comparisons")
    values = counts.values(torch.arange(counts.prompts)[None])
    untied = comparisons.margins[~comparisons.tied]
    return Accuracy(
        **{name: values[name].item() for name in CONVENTIONS},
        pairs=pairs,
        ties=len(comparisons) - pairs,
        predicted_ties=int((untied == 0).sum()),
        failed=int(untied.isnan().sum()),
        prompts=counts.prompts,
        position_bias=comparisons.untied().position_bias,
    )


def bootstrap(comparisons: Comparisons, *, resamples: int, confidence: float, seed: int) -> dict[Convention, Interval]:
    """Percentile intervals of all conventions from `resamples` draws of the set's prompts with replacement.

    A resample in which people decide nothing has no micro accuracy and is left out of that interval.
    """
    counts = _Counts.of(comparisons)
    draws = generator(seed, "bootstrap")
    parts: dict[Convention, list[torch.Tensor]] = {name: [] for name in CONVENTIONS}
    for first in range(0, resamples, RESAMPLES_AT_ONCE):
        size = min(RESAMPLES_AT_ONCE, resamples - first), counts.prompts
        values = counts.values(torch.randint(counts.prompts, size, generator=draws))
        for name in CONVENTIONS:
            parts[name].append(values[name])
    tail = (1 - confidence) / 2
    levels = torch.tensor([tail, 1 - tail], dtype=torch.float64)
    ends = {name: torch.nanquantile(torch.cat(parts[name]), levels).tolist() for name in CONVENTIONS}
    return {name: Interval(low=low, high=high) for name, (low, high) in ends.items()}


def by_models(comparisons: Comparisons) -> dict[str, Comparisons]:
    """Comparisons of each pair of generators, `a vs b` -> its own; empty where the set does not name them."""
    return {} if comparisons.models is None else _split(comparisons, [" vs ".join(pair) for pair in comparisons.models])


def by_category(comparisons: Comparisons) -> dict[str, Comparisons]:
    """Comparisons of each category; empty where the set has none."""
    return {} if comparisons.categories is None else _split(comparisons, comparisons.categories)


def _split(comparisons: Comparisons, labels: Sequence[str]) -> dict[str, Comparisons]:
    rows: dict[str, list[int]] = {}
    for row, label in enumerate(labels):
        rows.setdefault(label, []).append(row)
    return {label: comparisons.select(torch.tensor(rows[label])) for label in sorted(rows)}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Counts:
    """Comparisons counted per prompt, which is all that the conventions need. P prompts."""

    right: torch.Tensor  # [P] float64, decided by people and ranked alike by the scores, halves of a judge's included
    untied: torch.Tensor  # [P] float64
    total: torch.Tensor  # [P] float64

    @property
    def prompts(self) -> int:
        return len(self.total)

    @staticmethod
    def of(comparisons: Comparisons) -> "_Counts":
        _, number = comparisons.prompts.unique(return_inverse=True)
        prompts = int(number.max()) + 1 if len(number) else 0
        decided = ~comparisons.tied

        def count(which: torch.Tensor) -> torch.Tensor:
            return torch.zeros(prompts, dtype=torch.float64).index_add_(0, number, which.double())

        return _Counts(
            right=count(decided * comparisons.agreement),
            untied=count(decided),
            total=count(torch.ones_like(decided)),
        )

    def values(self, sample: torch.Tensor) -> dict[Convention, torch.Tensor]:
        """Accuracies [R] of samples of prompts [R, P]."""
        right, untied, total = self.right[sample], self.untied[sample], self.total[sample]
        return {
            "micro": right.sum(1) / untied.sum(1),
            "ties_wrong": right.sum(1) / total.sum(1),
            "per_prompt": ((right + total - untied) / total).mean(1),
        }
