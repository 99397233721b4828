"""Verdicts of a judge on the pairs of a set's records.

The numbers of a record with n images are n^2, its matrix [n, n] of `scorers.pairwise` row by row; those of several
records follow each other. A judge is asked about every pair that people decide, in both orders; the rest stays NaN.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch

from dina_rl.data.images import image_size, load_image
from dina_rl.data.sets.records import PreferenceRecord, PreferenceSet
from dina_rl.evaluation.requests import PLAIN, PartScores, Problem, ScoreRequest
from dina_rl.scorers.base import Judge, Pair


def judge_records(request: ScoreRequest, judge: Judge, source: PreferenceSet) -> PartScores:
    """Verdicts on a request's records but for those that are known; an image that cannot be read has a problem."""
    assert request.views == (PLAIN,)
    size = sum(width(record, pairwise=True) for record in request.records)
    verdicts = torch.full((1, size), torch.nan) if request.known is None else request.known.clone()
    problems: dict[int, Problem] = {}
    start, image = 0, 0
    for batch in _batches(request.records, request.batch_size):
        shown: list[torch.Tensor] = []
        places, pairs = [], []
        for record in batch:
            rows: dict[int, int] = {}  # position in the record -> among what is shown
            for position, key in enumerate(record.images):
                try:
                    picture = judge.reduce(_pixels(source.image(key), request.source.max_pixels))
                except ValueError as error:
                    problems[image + position] = Problem(reason=str(error), broken=True)
                else:
                    rows[position] = len(shown)
                    shown.append(picture)
            for first, second in _both_orders(record):
                place = start + first * len(record.images) + second
                if first in rows and second in rows and verdicts[0, place].isnan():
                    places.append(place)
                    pairs.append(Pair(prompt=record.prompt, first=rows[first], second=rows[second]))
            start, image = start + width(record, pairwise=True), image + len(record.images)
        if pairs:
            verdicts[0, places] = judge(torch.stack(shown), pairs)
    return PartScores(scores=(verdicts,), problems=problems)


def width(record: PreferenceRecord, *, pairwise: bool) -> int:
    """How many numbers a record has."""
    return len(record.images) ** 2 if pairwise else len(record.images)


def asked(records: Sequence[PreferenceRecord], problems: Mapping[int, Problem], *, pairwise: bool) -> list[int]:
    """Places among the records' numbers that must hold one.

    Args:
        problems: position among all their images -> why it has none.
    """
    places, start, image = [], 0, 0
    for record in records:
        count = len(record.images)
        good = [image + position not in problems for position in range(count)]
        if pairwise:
            places += [start + a * count + b for a, b in _both_orders(record) if good[a] and good[b]]
        else:
            places += [start + position for position in range(count) if good[position]]
        start, image = start + width(record, pairwise=pairwise), image + count
    return places


def _both_orders(record: PreferenceRecord) -> list[tuple[int, int]]:
    """(shown first, shown second) of every question about a record."""
    pairs = record.ordered_pairs()
    return [*pairs, *((worse, better) for better, worse in pairs)]


def _batches(records: Sequence[PreferenceRecord], size: int) -> Iterator[list[PreferenceRecord]]:
    """Records with up to `size` images together, or a single one with more."""
    batch: list[PreferenceRecord] = []
    for record in records:
        if batch and sum(len(each.images) for each in (*batch, record)) > size:
            yield batch
            batch = []
        batch.append(record)
    if batch:
        yield batch


def _pixels(content: bytes, max_pixels: int) -> torch.Tensor:
    """RGB [3, H, W] uint8 of an encoded picture at its own size; raises ValueError where it cannot be read."""
    height, width = image_size(content)
    return torch.tensor(load_image(content, height=height, width=width, max_pixels=max_pixels)).permute(2, 0, 1)
