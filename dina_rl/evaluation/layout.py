"""At which size a latent scorer sees each image of a set, and where its latent lies in the store.

The images of a pair share a bucket, as in training. Larger groups have no size that fits all of them: there every image
has its own bucket.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dina_rl.data.buckets import Bucketing, Size
from dina_rl.data.records import PreferenceRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The rows of a set's latent store. R records."""

    images: tuple[tuple[str, ...], ...]  # per bucket, its distinct images: the store's rows in order
    rows: Mapping[int, tuple[int | None, ...]]  # `PreferenceRecord.index` -> row of each image; None: it has none
    problems: Mapping[int, str]  # `PreferenceRecord.index` -> why (some of) its images have no row


def lay_out(records: Sequence[PreferenceRecord], bucketing: Bucketing, size_of: Callable[[str], Size | str]) -> Layout:
    """Rows for every image of `records`, each once per bucket that it is needed in.

    Args:
        size_of: (height, width) of an image, or why it has none; not asked where all images are stretched to one size.
    """
    places: list[dict[str, int]] = [{} for _ in bucketing.buckets]
    wanted: dict[int, list[tuple[int, int] | None]] = {}  # (bucket, number in it)
    problems: dict[int, str] = {}
    for record in records:
        buckets = _buckets(record, bucketing, size_of)
        reasons = [bucket for bucket in buckets if isinstance(bucket, str)]
        if reasons:
            problems[record.index] = reasons[0]
        wanted[record.index] = [
            None if isinstance(bucket, str) else (bucket, places[bucket].setdefault(image, len(places[bucket])))
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


def _buckets(record: PreferenceRecord, bucketing: Bucketing, size_of: Callable[[str], Size | str]) -> list[int | str]:
    """The bucket of each image, or why it has none."""
    if bucketing.stretch and not bucketing.min_area:
        return [0] * len(record.images)
    sizes = [size_of(image) for image in record.images]
    if len(sizes) == 2:
        broken = [size for size in sizes if isinstance(size, str)]
        return [broken[0] if broken else bucketing.of_pair(*sizes)] * 2
    return [size if isinstance(size, str) else bucketing.of_pair(size, size) for size in sizes]
