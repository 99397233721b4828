"""Pick-a-Pic v1 and v2 (yuvalkirstain/pickapic_v2): parquet with JPEGs in `jpg_0`, `jpg_1`, or `_no_images` without.

label_0 and label_1 are 1 and 0 for a decision and 0.5 for a tie; a row whose has_label is false is unlabelled.
Without images a record is its prompt alone. An image that several rows hold is several images here: the rows repeat
its bytes.
"""

from collections.abc import Iterator
from pathlib import Path

from dina_rl.data.buckets import Size
from dina_rl.data.sets.fields import Raw, pair_of_names, text
from dina_rl.data.sets.parquet_set import KEY, ParquetSet
from dina_rl.data.sets.records import AnyRecord, PreferenceRecord, UnlabelledRecord
from dina_rl.errors import shown

RANKS: dict[tuple[object, object], tuple[int, int]] = {(1.0, 0.0): (0, 1), (0.0, 1.0): (1, 0), (0.5, 0.5): (0, 0)}
IMAGES = ("jpg_0", "jpg_1")
OPTIONAL = ("has_label", "model_0", "model_1")


class PickAPic:
    """`PreferenceSet`.

    Raises:
        ValueError: no such directory.
    """

    def __init__(self, directory: Path) -> None:
        self._files = ParquetSet(directory, folders=("", "data"))

    def records(self, split: str) -> Iterator[AnyRecord]:
        columns = self._files.columns(split)
        read = ["caption", "label_0", "label_1"] + [name for name in OPTIONAL if name in columns]
        if set(IMAGES) <= set(columns):
            return self._files.records(split, read, _compared, images=IMAGES)
        return self._files.records(split, read, _prompt)

    def files(self, split: str) -> list[Path]:
        return self._files.files(split)

    def image(self, key: str) -> bytes:
        return self._files.image(key)

    def size(self, key: str) -> Size:
        return self._files.size(key)


def _compared(index: int, raw: Raw) -> PreferenceRecord | UnlabelledRecord:
    if not raw.get("has_label", True):
        return UnlabelledRecord(index=index, prompt=text(raw, "caption"))
    labels = raw["label_0"], raw["label_1"]
    if not all(isinstance(label, float | int) for label in labels) or labels not in RANKS:
        raise ValueError(f"label_0 and label_1 must be 1 and 0, or 0.5 both, got {shown(labels)}")
    return PreferenceRecord(
        index=index,
        prompt=text(raw, "caption"),
        images=tuple(f"{raw[KEY]}/{side}" for side in IMAGES),
        ranks=RANKS[labels],
        models=pair_of_names(raw, "model_0", "model_1"),
    )


def _prompt(index: int, raw: Raw) -> PreferenceRecord:
    return PreferenceRecord(index=index, prompt=text(raw, "caption"), images=(), ranks=())
