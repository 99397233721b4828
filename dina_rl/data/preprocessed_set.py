"""The authors' preprocessed files as a preference set: filters, cap and report apply, and a latent store is the copy.

The files' row groups hold 100 pairs of mixed sizes, some 100 MB a side: a random pair costs all of that. The copy costs
one pass over the files, and then a row costs little to read.
"""

import heapq
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from dina_rl.data.buckets import Size
from dina_rl.data.fields import pair_of_names, share, text
from dina_rl.data.latents import LatentStore
from dina_rl.data.parquet_set import KEY, ParquetSet
from dina_rl.data.preprocessed import (
    NAME,
    PIXELS_PER_LATENT,
    SIDES,
    latent_shape,
    read_details,
    read_latent,
    shape_column,
)
from dina_rl.data.records import PreferenceRecord, SkippedRecord

COLUMNS = ("prompt", "model1", "model2", "detailed_results")


class PreprocessedSet:
    """`PreferenceSet` whose images are latents: `image` gives the .npy file.

    Raises:
        ValueError: no such directory.
    """

    def __init__(self, directory: Path) -> None:
        self._folders = ParquetSet(directory, folders=("{split}",), names=(NAME,))
        self._plain = ParquetSet(directory, folders=("",), names=(NAME,))  # all of it is for training
        self._is_plain = not (directory / "train").is_dir()

    def records(self, split: str) -> Iterator[PreferenceRecord | SkippedRecord]:
        files = self._plain if split == "train" and self._is_plain else self._folders
        return files.records(split, COLUMNS, _record, images=[*SIDES, *map(shape_column, SIDES)])

    def image(self, key: str) -> bytes:
        return self._files_of(key).image(key)

    def size(self, key: str) -> Size:
        _, h, w = latent_shape(self._files_of(key).cell(shape_column(key)))
        return PIXELS_PER_LATENT * h, PIXELS_PER_LATENT * w

    def _files_of(self, key: str) -> ParquetSet:
        return self._folders if "/" in key.partition("#")[0] else self._plain


def copy_latents(source: PreprocessedSet, store: LatentStore, shards: Sequence[int]) -> None:
    """Write shards of the store from the published latents, in one pass over the files.

    Every bucket has one shard under way, so memory holds a shard for each.
    """
    bucket_rows: dict[int, list[int]] = {}
    for shard in shards:
        bucket_rows.setdefault(store.info.shard(shard)[0], []).append(shard)
    passes = [_rows_of(store, own) for own in bucket_rows.values()]
    latents: dict[int, list[torch.Tensor]] = {}
    unreadable: dict[int, dict[int, str]] = {}
    total = sum(len(store.info.shard(shard)[1]) for shard in shards)
    for _, shard, row, key in tqdm(heapq.merge(*passes), total=total, desc="copy", unit="img"):
        bucket, rows = store.info.shard(shard)
        try:
            latent = read_latent(source.image(key), store.latent_shapes[bucket])
        except ValueError as error:
            latent = torch.zeros(store.latent_shapes[bucket])
            unreadable.setdefault(shard, {})[row] = str(error)
        latents.setdefault(shard, []).append(latent)
        if row == rows[-1]:
            store.write_shard(shard, torch.stack(latents.pop(shard)), unreadable.pop(shard, {}))


def _rows_of(store: LatentStore, shards: Sequence[int]) -> Iterator[tuple[tuple, int, int, str]]:
    """(place in the files, shard, row, key) of the rows of shards of one bucket."""
    for shard in shards:
        _, rows = store.info.shard(shard)
        for row, key in zip(rows, store.images_of(rows), strict=True):
            file, _, cell = key.rpartition("#")
            group, position, _ = cell.split("/")
            yield (file, int(group), int(position)), shard, row, key


def _record(index: int, raw: dict) -> PreferenceRecord:
    details = read_details(raw["detailed_results"])
    votes = details.get("votes_chosen"), details.get("votes_rejected")
    if not all(type(count) is int and count >= 0 for count in votes):
        raise ValueError(f"votes_chosen and votes_rejected must be vote counts, got {votes}")
    return PreferenceRecord(
        index=index,
        prompt=text(raw, "prompt"),
        images=tuple(f"{raw[KEY]}/{side}" for side in SIDES),
        ranks=(0, 1),
        votes=votes if any(votes) else None,  # nulls were stored as zeros
        confidence=share(details, "confidence") or None,
        models=pair_of_names(raw, "model1", "model2"),
    )
