"""HPDv3 (MizzenAI/HPDv3): `train.json`, `test.json` and the images they name.

A file is a JSON array of {prompt, path1, path2, choice_dist, confidence, model1, model2}; paths are relative to the
directory and path1 is always the preferred image. choice_dist and confidence are null for pairs without annotators.
`jobs.label` adds {probability}, a teacher's for path1 being the better one; published files have none.
"""

from collections.abc import Iterator
from pathlib import Path

from dina_rl.data.buckets import Size
from dina_rl.data.sets.fields import Raw, json_array, pair_of_names, parsed, share, text
from dina_rl.data.sets.records import AnyRecord, PreferenceRecord
from dina_rl.data.sets.root import DataRoot
from dina_rl.errors import shown


class HPDv3:
    """`PreferenceSet`; splits are the JSON files in `directory`.

    Raises:
        ValueError: no such directory.
    """

    def __init__(self, directory: Path) -> None:
        self._root = DataRoot(directory)

    def records(self, split: str) -> Iterator[AnyRecord]:
        file = self._root.directory / f"{split}.json"
        return parsed(json_array(file), file.name, _record)

    def files(self, split: str) -> list[Path]:
        return [self._root.directory / f"{split}.json"]

    def image(self, key: str) -> bytes:
        return self._root.read(key)

    def size(self, key: str) -> Size:
        return self._root.size(key)


def _record(index: int, raw: Raw) -> PreferenceRecord:
    return PreferenceRecord(
        index=index,
        prompt=text(raw, "prompt"),
        images=(text(raw, "path1"), text(raw, "path2")),
        ranks=(0, 1),
        votes=_votes(raw.get("choice_dist")),
        confidence=share(raw, "confidence"),
        models=pair_of_names(raw, "model1", "model2"),
        probability=share(raw, "probability"),
    )


def _votes(value: object) -> tuple[int, int] | None:
    # Null, [] and [null, null] all occur for pairs without annotators; the order of path1 and path2 still holds.
    if value is None or (isinstance(value, list) and (len(value) < 2 or value == [None, None])):
        return None
    if isinstance(value, list) and len(value) == 2 and all(type(v) is int and v >= 0 for v in value):
        return value[0], value[1]
    raise ValueError(f"choice_dist must be two vote counts or null, got {shown(value)}")
