"""The authors' preprocessed files as a preference set: filters, cap and report apply, and a latent store is the copy.

The files' row groups hold 100 pairs of mixed sizes, some 100 MB a side: a random pair costs all of that. The copy costs
one pass over the files, and then a row costs little to read.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TypeGuard

from dina_rl.data.buckets import Size
from dina_rl.data.sets.fields import Raw, pair_of_names, share, text
from dina_rl.data.sets.parquet_set import KEY, ParquetSet
from dina_rl.data.sets.records import AnyRecord, PreferenceRecord
from dina_rl.data.stores.preprocessed import NAME, PIXELS_PER_LATENT, SIDES, latent_shape, read_details, shape_column

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

    def records(self, split: str) -> Iterator[AnyRecord]:
        return self._of_split(split).records(split, COLUMNS, _record, images=[*SIDES, *map(shape_column, SIDES)])

    def files(self, split: str) -> list[Path]:
        return self._of_split(split).files(split)

    def image(self, key: str) -> bytes:
        return self._files_of(key).image(key)

    def size(self, key: str) -> Size:
        _, h, w = latent_shape(self._files_of(key).cell(shape_column(key)))
        return PIXELS_PER_LATENT * h, PIXELS_PER_LATENT * w

    def _of_split(self, split: str) -> ParquetSet:
        return self._plain if split == "train" and self._is_plain else self._folders

    def _files_of(self, key: str) -> ParquetSet:
        return self._folders if "/" in key.partition("#")[0] else self._plain


def _record(index: int, raw: Raw) -> PreferenceRecord:
    details = read_details(raw["detailed_results"])
    return PreferenceRecord(
        index=index,
        prompt=text(raw, "prompt"),
        images=tuple(f"{raw[KEY]}/{side}" for side in SIDES),
        ranks=(0, 1),
        votes=_votes(details.get("votes_chosen"), details.get("votes_rejected")),
        confidence=share(details, "confidence") or None,
        models=pair_of_names(raw, "model1", "model2"),
    )


def _votes(chosen: object, rejected: object) -> tuple[int, int] | None:
    if not _is_count(chosen) or not _is_count(rejected):
        raise ValueError(f"votes_chosen and votes_rejected must be vote counts, got {(chosen, rejected)}")
    return (chosen, rejected) if chosen or rejected else None  # nulls were stored as zeros


def _is_count(value: object) -> TypeGuard[int]:
    return type(value) is int and value >= 0
