"""What a training step is made of: pairs, or groups of pairs that share images.

A published set compares the images of a prompt with each other, so that an image stands in several pairs (HPDv3: 1.08 M
images in 1.17 M pairs). Taken pair by pair each of them goes through the backbone once for each of its pairs; a group
goes through once with all pairs between its images.

U units, P pairs of a table, N images and B pairs of a batch.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from dina_rl.config.fitting import BatchOf
from dina_rl.data.stores.latents import PairStore, PairTable

GROUP_IMAGES = 8
"""Images of a group at most: what a forward must hold at least. The pairs of a prompt with more are several groups."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Units:
    """The pairs of a table, each in one unit. The pairs of a unit are of one prompt and one bucket."""

    pairs: torch.Tensor  # [P] int64, positions in the table, unit by unit
    starts: torch.Tensor  # [U + 1] int64, where each unit begins in `pairs`
    bucket: torch.Tensor  # [U] int64

    def __len__(self) -> int:
        return len(self.bucket)

    def sizes(self) -> torch.Tensor:
        """Pairs of every unit [U] int64."""
        return self.starts.diff()

    def pairs_of(self, unit: int) -> torch.Tensor:
        """Positions in the table of a unit's pairs."""
        return self.pairs[self.starts[unit] : self.starts[unit + 1]]


def fit_units(table: PairTable, batch_of: BatchOf) -> Units:
    """The units that a fit draws from, in the order of their first pairs."""
    if batch_of == "pairs":
        positions = torch.arange(len(table))
        return Units(pairs=positions, starts=torch.arange(len(table) + 1), bucket=table.bucket)
    members = sorted(_groups(table))
    pairs = torch.tensor([position for group in members for position in group], dtype=torch.int64)
    sizes = torch.tensor([0, *map(len, members)], dtype=torch.int64)
    first = torch.tensor([group[0] for group in members], dtype=torch.int64)
    return Units(pairs=pairs, starts=sizes.cumsum(0), bucket=table.bucket[first])


def _groups(table: PairTable) -> list[list[int]]:
    """Positions of the pairs of every group."""
    of_prompt: dict[tuple[int, int], list[tuple[int, int, int]]] = defaultdict(list)
    columns = (table.prompt, table.bucket, table.chosen, table.rejected)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    for position, (prompt, bucket, chosen, rejected) in enumerate(rows):
        of_prompt[prompt, bucket].append((position, chosen, rejected))
    return [group for pairs in of_prompt.values() for group in _connected(pairs)]


def _connected(pairs: Sequence[tuple[int, int, int]]) -> list[list[int]]:
    """The pairs (position, image, image) of a prompt in groups of at most `GROUP_IMAGES` connected images."""
    of_image: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
    for pair in pairs:
        for image in {*pair[1:]}:
            of_image[image].append(pair)
    groups: list[list[int]] = []
    taken: set[int] = set()
    for first, *sides in pairs:
        if first in taken:
            continue
        images = list(dict.fromkeys(sides))
        group: list[int] = []
        for image in images:  # grows meanwhile
            for position, *others in of_image[image]:
                new = [other for other in others if other not in images]
                if position not in taken and len(images) + len(new) <= GROUP_IMAGES:
                    images += new
                    taken.add(position)
                    group.append(position)
        groups.append(sorted(group))
    return groups


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """One unit as it is trained on."""

    key: int  # of the draws that its images share: the id of its first pair
    prompt: str
    latents: torch.Tensor  # [n, C, H, W], of its images, each once
    chosen: tuple[int, ...]  # of every pair, positions in `latents`
    rejected: tuple[int, ...]
    probability: tuple[float, ...] | None = None  # of every pair, as in the table


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """One unit before its latents are read."""

    key: int
    prompt: int  # index into the table's prompts
    rows: tuple[int, ...]  # of the store, each once
    chosen: tuple[int, ...]  # of every pair, positions in `rows`
    rejected: tuple[int, ...]
    probability: tuple[float, ...] | None = None  # of every pair, as in the table


def layout(table: PairTable, units: Units, unit: int) -> Layout:
    """Which rows of the store a unit needs, and how its pairs refer to them."""
    pairs = units.pairs_of(unit)
    chosen, rejected = table.chosen[pairs].tolist(), table.rejected[pairs].tolist()
    place: dict[int, int] = {}
    for side in zip(chosen, rejected, strict=True):
        for row in side:
            place.setdefault(row, len(place))
    return Layout(
        key=int(table.pair_ids[pairs[0]]),
        prompt=int(table.prompt[pairs[0]]),
        rows=tuple(place),
        chosen=tuple(place[row] for row in chosen),
        rejected=tuple(place[row] for row in rejected),
        probability=None if table.probability is None else tuple(table.probability[pairs].tolist()),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingBatch:
    """A rank's share of a step: images of one bucket, and pairs between them.

    Images lie by their place in their unit: the first ones of all units, then the second ones, and so on.
    """

    keys: tuple[int, ...]  # of every unit: an image's noise level and noise are its unit's
    prompts: tuple[str, ...]  # of every unit
    unit: torch.Tensor  # [N] int64, of every image
    latents: torch.Tensor  # [N, C, H, W], clean
    chosen: torch.Tensor  # [B] int64, of every pair, unit by unit: positions in `latents`
    rejected: torch.Tensor  # [B] int64
    step_pairs: int  # pairs of the step over all ranks
    probability: torch.Tensor | None = None  # [B] float64, that chosen is the better one; None: the table has none

    def __len__(self) -> int:
        return len(self.chosen)

    def part(self, first: int, stop: int) -> "TrainingBatch":
        """The units from `first` to before `stop`."""
        images = ((self.unit >= first) & (self.unit < stop)).nonzero()[:, 0]
        place = torch.full((len(self.unit),), -1)
        place[images] = torch.arange(len(images))
        pairs = (place[self.chosen] >= 0).nonzero()[:, 0]
        return replace(
            self,
            keys=self.keys[first:stop],
            prompts=self.prompts[first:stop],
            unit=self.unit[images] - first,
            latents=self.latents[images],
            chosen=place[self.chosen[pairs]],
            rejected=place[self.rejected[pairs]],
            probability=None if self.probability is None else self.probability[pairs],
        )


def training_batch(units: Sequence[Unit], *, step_pairs: int) -> TrainingBatch:
    """The batch of a rank's share of a step."""
    images = sorted((place, number) for number, unit in enumerate(units) for place in range(len(unit.latents)))
    position = {image: index for index, image in enumerate(images)}

    def positions(side: str) -> torch.Tensor:
        return torch.tensor(
            [
                position[place, number]
                for number, unit in enumerate(units)
                for place in (unit.chosen if side == "chosen" else unit.rejected)
            ]
        )

    soft = [probability for unit in units for probability in unit.probability or ()]
    return TrainingBatch(
        keys=tuple(unit.key for unit in units),
        prompts=tuple(unit.prompt for unit in units),
        unit=torch.tensor([number for _, number in images]),
        latents=torch.stack([units[number].latents[place] for place, number in images]),
        chosen=positions("chosen"),
        rejected=positions("rejected"),
        step_pairs=step_pairs,
        probability=torch.tensor(soft, dtype=torch.float64) if soft else None,
    )


def read_units(store: PairStore, table: PairTable, units: Units, index: torch.Tensor) -> TrainingBatch:
    """A whole step: the units at positions `index`, which are of one bucket."""
    buckets = units.bucket[index].unique().tolist()
    assert len(buckets) == 1, f"a batch is of one bucket, not of {buckets}"
    layouts = [layout(table, units, unit) for unit in index.tolist()]
    latents = store.latents(torch.tensor([row for each in layouts for row in each.rows]))
    parts = latents.split([len(each.rows) for each in layouts])
    return training_batch(
        [
            Unit(
                key=each.key,
                prompt=table.prompts[each.prompt],
                latents=part,
                chosen=each.chosen,
                rejected=each.rejected,
                probability=each.probability,
            )
            for each, part in zip(layouts, parts, strict=True)
        ],
        step_pairs=int(units.sizes()[index].sum()),
    )
