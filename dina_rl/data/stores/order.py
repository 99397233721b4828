"""Which pairs every step of a fit sees: one bucket per step, whoever runs the fit and wherever it was interrupted.

A step's batch is one tensor, so its latents have one shape: all its units (`units.py`: pairs, or groups of them) come
from one bucket, and all ranks share it. Shapes: N units, S steps.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from dina_rl.config import FitConfig
from dina_rl.data.stores.units import Units
from dina_rl.seeding import generator


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingOrder:
    """The batches of a whole fit."""

    bucket: tuple[int, ...]  # S of them, the bucket of every step
    batches: tuple[torch.Tensor, ...]  # S times [units of the step] int64

    def __len__(self) -> int:
        return len(self.batches)

    def runs(self, first_step: int) -> list[range]:
        """The steps from `first_step` on, cut where the bucket changes."""
        starts = [s for s in range(first_step, len(self)) if s == first_step or self.bucket[s] != self.bucket[s - 1]]
        return [range(start, stop) for start, stop in zip(starts, [*starts[1:], len(self)], strict=True)]

    def left_out(self, buckets: torch.Tensor) -> dict[int, int]:
        """bucket -> pairs, of the buckets that make too few batches to be allotted a step; no pair of them is seen.

        Args:
            buckets: the bucket of every pair.
        """
        counts = {bucket: int((buckets == bucket).sum()) for bucket in buckets.unique().tolist()}
        return {bucket: count for bucket, count in counts.items() if bucket not in set(self.bucket)}


def fit_order(
    units: Units, latent_shapes: Sequence[tuple[int, int, int]], config: FitConfig, *, seed: int
) -> TrainingOrder:
    """The batches of a fit.

    Args:
        latent_shapes: (C, h, w) of every bucket.
    """
    multiples = None
    if config.bucket_batch == "tokens":
        shapes = {bucket: latent_shapes[bucket] for bucket in units.bucket.unique().tolist()}
        multiples = token_multiples({bucket: height * width for bucket, (_, height, width) in shapes.items()})
    return training_order(
        units.bucket, steps=config.steps, batch_size=config.batch_size, seed=seed, multiples=multiples
    )


def training_order(
    buckets: torch.Tensor, *, steps: int, batch_size: int, seed: int, multiples: Mapping[int, int] | None = None
) -> TrainingOrder:
    """Every step's batch: a function of these arguments alone.

    Each bucket has its own shuffled epochs, one after the other, cut into batches. Steps are allotted to buckets in
    proportion to the batches that one epoch of them makes (largest remainder), and then shuffled.

    Args:
        buckets: the bucket of every unit [N] int64, N > 0.
        batch_size: units per step over all ranks.
        multiples: bucket -> how many times `batch_size` its steps hold (`token_multiples`); 1 for every bucket if None.
    """
    present = buckets.unique().tolist()  # ascending
    sizes = [batch_size * (multiples[bucket] if multiples else 1) for bucket in present]
    counts = [int((buckets == bucket).sum()) for bucket in present]
    allotted = _largest_remainder([count / size for count, size in zip(counts, sizes, strict=True)], steps)
    needed = [share * size for share, size in zip(allotted, sizes, strict=True)]
    epochs = max(-(-units // count) for units, count in zip(needed, counts, strict=True))
    # One permutation of all units per epoch; a bucket's epoch is its units in that order.
    shuffled = [torch.randperm(len(buckets), generator=generator(seed, "epoch", epoch)) for epoch in range(epochs)]
    queues = {}
    for bucket, units, size in zip(present, needed, sizes, strict=True):
        epochs_of_bucket = torch.cat([order[buckets[order] == bucket] for order in shuffled])
        queues[bucket] = iter(epochs_of_bucket[:units].split(size))
    in_order = torch.tensor(present).repeat_interleave(torch.tensor(allotted))
    schedule = in_order[torch.randperm(steps, generator=generator(seed, "bucket-of-step"))].tolist()
    return TrainingOrder(bucket=tuple(schedule), batches=tuple(next(queues[bucket]) for bucket in schedule))


def token_multiples(areas: Mapping[int, int]) -> dict[int, int]:
    """How many times more units of a bucket fit into a step than units of the largest one, rounded down.

    Args:
        areas: bucket -> latent pixels of one of its images, of the buckets that occur.
    """
    largest = max(areas.values())
    return {bucket: largest // area for bucket, area in areas.items()}


def evaluation_batches(
    buckets: torch.Tensor, *, batch_size: int, rank: int = 0, world_size: int = 1
) -> list[torch.Tensor]:
    """One rank's share of a table's positions, each once, in batches of at most `batch_size` of one bucket each.

    Args:
        buckets: the bucket of every pair [N] int64.
    """
    batches: list[torch.Tensor] = []
    for bucket in buckets.unique().tolist():
        positions = (buckets == bucket).nonzero().flatten()[rank::world_size]
        batches.extend(positions.split(batch_size) if len(positions) else ())
    return batches


def _largest_remainder(weights: list[float], total: int) -> list[int]:
    """`total` shared out in proportion to `weights`: the integer parts first, the rest to the largest fractions."""
    quotas = [total * weight / sum(weights) for weight in weights]
    shares = [int(quota) for quota in quotas]
    by_fraction = sorted(range(len(weights)), key=lambda i: quotas[i] - shares[i], reverse=True)
    for i in by_fraction[: total - sum(shares)]:
        shares[i] += 1
    return shares
