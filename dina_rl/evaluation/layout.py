"""At which size a latent scorer sees each image of a set, and where its latent lies in the store.

The images of a pair share a bucket, as in training. Larger groups have no size that fits all of them: there every image
has its own bucket.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dina_rl.data.buckets import Bucketing, Dropped, Size
from dina_rl.data.sets.records import PreferenceRecord
from dina_rl.evaluation.requests import Problem


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The rows of a set's latent store. R records."""

    images: tuple[tuple[str, ...], ...]  # per bucket, its distinct images: the store's rows in order
    rows: Mapping[int, tuple[int | None, ...]]  # `PreferenceRecord.index` -> row of each image; None: it has none
    problems: Mapping[int, tuple[Problem | None, ...]]  # `PreferenceRecord.index` -> why images of it have none


def needs_sizes(bucketing: Bucketing) -> bool:
    """Whether images' own sizes decide anything."""
    return not bucketing.stretch or bucketing.min_area > 0


def lay_out(records: Sequence[PreferenceRecord], bucketing: Bucketing, size_of: Callable[[str], Size | str]) -> Layout:
    """Rows for every image of `records`, each once per bucket that it is needed in.

    Args:
        size_of: (height, width) of an image, or why it has none; asked only where `needs_sizes`.
    """
    places: list[dict[str, int]] = [{} for _ in bucketing.buckets]
    wanted: dict[int, list[tuple[int, int] | None]] = {}  # (bucket, number in it)
    problems: dict[int, tuple[Problem | None, ...]] = {}
    for record in records:
        buckets = _buckets(record, bucketing, size_of)
        if any(isinstance(bucket, Problem) for bucket in buckets):
            problems[record.index] = tuple(bucket if isinstance(bucket, Problem) else None for bucket in buckets)
        wanted[record.index] = [
            None if isinstance(bucket, Problem) else (bucket, places[bucket].setdefault(image, len(places[bucket])))
            for image, bucket in zip(record.images, buckets, strict=True)
        ]
    starts = [sum(map(len, places[:bucket])) for bucket in range(len(places))]
    return Layout(
        images=tuple(tuple(place) for place in places),
        rows={
            index: tuple(None if place is None else starts[place[0]] + place[1] for place in row)
            for index, row in wanted.items()
        },
        problems=problems,
    )


def _buckets(
    record: PreferenceRecord, bucketing: Bucketing, size_of: Callable[[str], Size | str]
) -> list[int | Problem]:
    """The bucket of each image, or why it has none."""
    if not needs_sizes(bucketing):
        return [0] * len(record.images)
    sizes = [size_of(image) for image in record.images]
    if len(sizes) == 2:
        first, second = sizes
        if not isinstance(first, str) and not isinstance(second, str):
            return [_shared(bucketing, first, second)] * 2
    # Beside an unreadable image the other one of a pair has nothing wrong with it.
    return [
        Problem(reason=size, broken=True) if isinstance(size, str) else _shared(bucketing, size, size) for size in sizes
    ]


def _shared(bucketing: Bucketing, first: Size, second: Size) -> int | Problem:
    bucket = bucketing.of_pair(first, second)
    return Problem(reason=bucket.reason, broken=False) if isinstance(bucket, Dropped) else bucket
