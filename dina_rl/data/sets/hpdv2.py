"""HPDv2 (ymhao/HPDv2): `train.json` with pairs, `test.json` with rankings, images in directories of the splits' names.

train: {prompt, file_path: [a, b], human_preference: [1, 0]}, 1 marks the preferred image;
test:  {prompt, image_path: [...], rank: [...], raw_annotations}, the lower rank is better.
"""

from collections.abc import Iterator
from pathlib import Path

from dina_rl.data.buckets import Size
from dina_rl.data.sets.fields import Raw, integers, json_array, parsed, text, texts
from dina_rl.data.sets.records import AnyRecord, PreferenceRecord
from dina_rl.data.sets.root import DataRoot
from dina_rl.errors import shown


class HPDv2:
    """`PreferenceSet`; splits are the JSON files in `directory`, of either kind of record.

    Raises:
        ValueError: no such directory.
    """

    def __init__(self, directory: Path) -> None:
        self._root = DataRoot(directory)

    def records(self, split: str) -> Iterator[AnyRecord]:
        file = self._root.directory / f"{split}.json"
        folder = f"{split}/" if (self._root.directory / split).is_dir() else ""

        def record(index: int, raw: Raw) -> PreferenceRecord:
            pair = "human_preference" in raw
            names = texts(raw, "file_path" if pair else "image_path")
            if len(names) < 2:
                raise ValueError(f"a comparison needs two or more images, got {len(names)}")
            return PreferenceRecord(
                index=index,
                prompt=text(raw, "prompt"),
                images=tuple(name if name.startswith(folder) else folder + name for name in names),
                ranks=_preference(raw, len(names)) if pair else integers(raw, "rank", len(names)),
            )

        return parsed(json_array(file), file.name, record)

    def files(self, split: str) -> list[Path]:
        return [self._root.directory / f"{split}.json"]

    def image(self, key: str) -> bytes:
        return self._root.read(key)

    def size(self, key: str) -> Size:
        return self._root.size(key)


def _preference(raw: Raw, count: int) -> tuple[int, ...]:
    marks = integers(raw, "human_preference", count)
    if sorted(marks) != [0] * (count - 1) + [1]:
        raise ValueError(f"human_preference must mark one image with 1, got {shown(list(marks))}")
    return tuple(1 - mark for mark in marks)
