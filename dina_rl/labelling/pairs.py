"""Which pairs are labelled, and which pictures are scored for it: each once, beside those that it is compared with."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

from dina_rl.data.sets.records import PreferenceRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two pictures of a prompt."""

    group: int  # `PreferenceRecord.index` of the record in which they are scored
    prompt: str
    images: tuple[str, str]  # keys inside the set
    models: tuple[str, str] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ToLabel:
    """What a teacher looks at."""

    pairs: tuple[Pair, ...]
    records: tuple[PreferenceRecord, ...]  # the pictures to score; their ranks say nothing
    repeats: int  # comparisons left out: of a pair that is there already, or of a picture with itself

    @property
    def images(self) -> int:
        """Pictures to score."""
        return sum(len(record.images) for record in self.records)


def to_label(records: Sequence[PreferenceRecord], *, connect: bool) -> ToLabel:
    """All pairs of the records' pictures, each once, whatever people thought of them.

    Args:
        connect: score the pictures of a prompt that pairs connect together, each once; else pair by pair, for scorers
            whose pictures take their size from the pair.
    """
    seen: dict[tuple[str, frozenset[str]], tuple[tuple[str, str], tuple[str, str] | None]] = {}
    repeats = 0
    for record in records:
        for one, other in combinations(range(len(record.images)), 2):
            images = record.images[one], record.images[other]
            key = record.prompt, frozenset(images)
            if len(key[1]) < 2 or key in seen:
                repeats += 1
                continue
            seen[key] = images, None if record.models is None else (record.models[one], record.models[other])
    keys = [(prompt, images) for (prompt, _), (images, _) in seen.items()]
    groups = _connected(keys) if connect else list(range(len(keys)))
    pairs, pictures = [], dict[int, dict[str, None]]()
    prompts: dict[int, str] = {}
    for ((prompt, _), (images, models)), group in zip(seen.items(), groups, strict=True):
        pairs.append(Pair(group=group, prompt=prompt, images=images, models=models))
        pictures.setdefault(group, {}).update(dict.fromkeys(images))
        prompts[group] = prompt
    scored = (
        PreferenceRecord(index=group, prompt=prompts[group], images=tuple(images), ranks=tuple(range(len(images))))
        for group, images in pictures.items()
    )
    return ToLabel(pairs=tuple(pairs), records=tuple(scored), repeats=repeats)


def _connected(pairs: Iterable[tuple[str, tuple[str, str]]]) -> list[int]:
    """Of every pair the number of its group: pairs of a prompt are in one if pictures that they share connect them."""
    parent: dict[tuple[str, str], tuple[str, str]] = {}

    def root(node: tuple[str, str]) -> tuple[str, str]:
        while parent.setdefault(node, node) != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    firsts = []
    for prompt, (one, other) in pairs:
        firsts.append((prompt, one))
        parent[root((prompt, other))] = root((prompt, one))
    numbers: dict[tuple[str, str], int] = {}
    return [numbers.setdefault(root(first), len(numbers)) for first in firsts]
