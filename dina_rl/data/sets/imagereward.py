"""ImageReward (THUDM/ImageReward): `test.json` (and `train.json`, `validation.json`) and the .webp files it names.

{id, prompt, generations: [path, ...], ranking: [int, ...]}: rank 1 is best and ties are allowed. test_images.zip may be
unpacked into the directory itself or into a folder `<split>_images` of it.
"""

from collections.abc import Iterator
from pathlib import Path

from dina_rl.data.buckets import Size
from dina_rl.data.sets.fields import Raw, integers, json_array, parsed, text, texts
from dina_rl.data.sets.records import AnyRecord, PreferenceRecord
from dina_rl.data.sets.root import DataRoot


class ImageReward:
    """`PreferenceSet`; splits are the JSON files in `directory`.

    Raises:
        ValueError: no such directory.
    """

    def __init__(self, directory: Path) -> None:
        self._root = DataRoot(directory)

    def records(self, split: str) -> Iterator[AnyRecord]:
        file = self._root.directory / f"{split}.json"
        folder = f"{split}_images/" if (self._root.directory / f"{split}_images").is_dir() else ""

        def record(index: int, raw: Raw) -> PreferenceRecord:
            names = texts(raw, "generations")
            if len(names) < 2:
                raise ValueError(f"a comparison needs two or more images, got {len(names)}")
            return PreferenceRecord(
                index=index,
                prompt=text(raw, "prompt"),
                images=tuple(folder + name for name in names),
                ranks=integers(raw, "ranking", len(names)),
            )

        return parsed(json_array(file), file.name, record)

    def files(self, split: str) -> list[Path]:
        return [self._root.directory / f"{split}.json"]

    def image(self, key: str) -> bytes:
        return self._root.read(key)

    def size(self, key: str) -> Size:
        return self._root.size(key)
