"""What every preference set is read into, whatever its files look like.

A set is a Protocol, one file per published set beside `hpdv3.py`, and one line in `registry.py`. Records stream: no
reader holds its whole file, so that a million comparisons cost no more memory than a thousand.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Protocol

from dina_rl.data.buckets import Size

_RANKED = 32  # bits of a pair id below the record's number, where a record holds more than one pair


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferenceRecord:
    """One prompt, two or more images of it (none where a set has prompts alone), and how people rank them."""

    index: int  # position in the split, unusable records included: the key of everything drawn for it
    prompt: str
    images: tuple[str, ...]  # keys of the images inside the set
    ranks: tuple[int, ...]  # one per image: lower is better, equal is a tie
    votes: tuple[int, int] | None = None  # of a pair: people for images[0], for images[1]
    confidence: float | None = None  # the annotators', in [0, 1]
    models: tuple[str, ...] | None = None  # the generator of each image
    probability: float | None = None  # of a pair: that images[0] is the better one, as a teacher says (`jobs.label`)
    category: str | None = None
    file: str = ""  # that holds it, for what is said about it

    def ordered_pairs(self) -> list[tuple[int, int]]:
        """(better, worse) positions of every pair of images that is not tied."""
        pairs = combinations(range(len(self.images)), 2)
        return [(a, b) if self.ranks[a] < self.ranks[b] else (b, a) for a, b in pairs if self.ranks[a] != self.ranks[b]]

    @property
    def ties(self) -> int:
        """Pairs of images that people rank alike."""
        return len(self.images) * (len(self.images) - 1) // 2 - len(self.ordered_pairs())


@dataclass(frozen=True, slots=True, kw_only=True)
class SkippedRecord:
    """A record that cannot be used, and why."""

    file: str
    index: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class UnlabelledRecord:
    """A pair of images that nobody compared: nothing is wrong with it, it only says nothing."""

    index: int
    prompt: str
    file: str = ""


AnyRecord = PreferenceRecord | UnlabelledRecord | SkippedRecord


class PreferenceSet(Protocol):
    """A preference set on disk."""

    def records(self, split: str) -> Iterator[AnyRecord]:
        """The split's records in the order of its files; what is malformed comes as `SkippedRecord`.

        Raises:
            ValueError: no such split, or a file that is not what it should be.
        """
        ...

    def files(self, split: str) -> list[Path]:
        """The files that hold the split's records.

        Raises:
            ValueError: there are none, where their names are not given by the split's alone.
        """
        ...

    def image(self, key: str) -> bytes:
        """The encoded image behind a record's key.

        Raises:
            ValueError: it is missing, or its path leaves the set's directory.
        """
        ...

    def size(self, key: str) -> Size:
        """(height, width) of the image behind a key; where it is a file, only its header is read.

        Raises:
            ValueError: as `image`, or it is not an image.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferencePair:
    """One human comparison of two images."""

    index: int  # the pair's id, unique in its split: of a pair set the record's index
    prompt: str
    chosen: str  # key of the preferred image inside the set
    rejected: str
    votes: tuple[int, int] | None  # for chosen, for rejected
    confidence: float | None  # the annotators', in [0, 1]
    probability: float | None = None  # a teacher's, that chosen is the better one; None: there is none


def pair_id(record: int, position: int, num_images: int) -> int:
    """Id of a record's `position`-th ordered pair: the record's index if it holds no other, else a number beyond those.

    A function of the record alone, so that records can stream.
    """
    return record if num_images == 2 else ((record + 1) << _RANKED) + position


def pairs_of(record: PreferenceRecord) -> Iterator[PreferencePair]:
    """Every pair of images that people do not rank alike, the better one as `chosen`."""
    for position, (better, worse) in enumerate(record.ordered_pairs()):
        yield PreferencePair(
            index=pair_id(record.index, position, len(record.images)),
            prompt=record.prompt,
            chosen=record.images[better],
            rejected=record.images[worse],
            votes=None if record.votes is None else (record.votes[better], record.votes[worse]),
            confidence=record.confidence,
            probability=record.probability if better == 0 or record.probability is None else 1 - record.probability,
        )
