"""Prompts without images: plain text, one prompt a line."""

from collections.abc import Iterator
from pathlib import Path

from dina_rl.data.buckets import Size
from dina_rl.data.sets.fields import Raw, parsed, text
from dina_rl.data.sets.records import AnyRecord, PreferenceRecord


class PromptFiles:
    """`PreferenceSet` of records without images: a text file (of any split), or a directory of `<split>.txt`.

    Empty lines are no records.

    Raises:
        ValueError: no such file or directory.
    """

    def __init__(self, path: Path) -> None:
        if not path.exists():
            raise ValueError(f"prompt file {path} does not exist")
        self._path = path

    def records(self, split: str) -> Iterator[AnyRecord]:
        file = self._path / f"{split}.txt" if self._path.is_dir() else self._path
        if not file.is_file():
            raise ValueError(f"dataset {self._path} has no {file.name}")
        return parsed(_lines(file), file.name, _record)

    def image(self, key: str) -> bytes:
        raise ValueError(f"{self._path} holds prompts without images")

    def size(self, key: str) -> Size:
        raise ValueError(f"{self._path} holds prompts without images")


def _lines(file: Path) -> Iterator[Raw]:
    with file.open(encoding="utf-8") as stream:
        try:
            yield from ({"line": line.strip()} for line in stream if line.strip())
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8 text: {error}") from error


def _record(index: int, raw: Raw) -> PreferenceRecord:
    return PreferenceRecord(index=index, prompt=text(raw, "line"), images=(), ranks=())
