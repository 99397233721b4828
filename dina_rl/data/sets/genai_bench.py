"""GenAI-Bench's image generation split (TIGER-Lab/GenAI-Bench): parquet with images, `test` and `test_v1`.

{prompt, left_model, left_image, right_model, right_image, vote_type}. A vote for both or for neither is a tie here.
"""

from collections.abc import Iterator
from pathlib import Path

from dina_rl.data.buckets import Size
from dina_rl.data.sets.fields import Raw, pair_of_names, text
from dina_rl.data.sets.parquet_set import KEY, ParquetSet
from dina_rl.data.sets.records import AnyRecord, PreferenceRecord
from dina_rl.errors import shown

RANKS = {"leftvote": (0, 1), "rightvote": (1, 0), "tievote": (0, 0), "bothbad_vote": (0, 0)}

COLUMNS = ("prompt", "left_model", "right_model", "vote_type")
IMAGES = ("left_image", "right_image")


class GenAIBench:
    """`PreferenceSet`.

    Raises:
        ValueError: no such directory.
    """

    def __init__(self, directory: Path) -> None:
        self._files = ParquetSet(directory, folders=("", "image_generation", "data"))

    def records(self, split: str) -> Iterator[AnyRecord]:
        return self._files.records(split, COLUMNS, _record, images=IMAGES)

    def files(self, split: str) -> list[Path]:
        return self._files.files(split)

    def image(self, key: str) -> bytes:
        return self._files.image(key)

    def size(self, key: str) -> Size:
        return self._files.size(key)


def _record(index: int, raw: Raw) -> PreferenceRecord:
    vote = raw["vote_type"]
    if not isinstance(vote, str) or vote not in RANKS:
        raise ValueError(f"vote_type must be one of {', '.join(RANKS)}, got {shown(vote)}")
    return PreferenceRecord(
        index=index,
        prompt=text(raw, "prompt"),
        images=tuple(f"{raw[KEY]}/{side}" for side in IMAGES),
        ranks=RANKS[vote],
        models=pair_of_names(raw, "left_model", "right_model"),
    )
