"""Prompts without images, in the files that people have them in.

.jsonl           a line each: a JSON object with `prompt`, or a string
.json            an array of these
.csv             the column `prompt`
any other name   plain text, one prompt a line
"""

import csv
import io
from collections.abc import Iterator
from pathlib import Path

from dina_rl.data.buckets import Size
from dina_rl.data.sets.fields import Raw, json_array, parsed, text
from dina_rl.data.sets.records import AnyRecord, PreferenceRecord
from dina_rl.errors import shown
from dina_rl.textfiles import BOM, parse_json, read_text

SUFFIXES = (".txt", ".jsonl", ".json", ".csv")


class PromptFiles:
    """`PreferenceSet` of records without images: a file (of any split), or a directory of `<split>.txt` and the like.

    Empty lines are no records.

    Raises:
        ValueError: no such file or directory.
    """

    def __init__(self, path: Path) -> None:
        if not path.exists():
            raise ValueError(f"prompt file {path} does not exist")
        self._path = path

    def records(self, split: str) -> Iterator[AnyRecord]:
        (file,) = self.files(split)
        if file.suffix.lower() == ".jsonl":
            return parsed(({"line": line} for line in _lines(file)), file.name, _json_record)
        raws = {".json": _json_rows, ".csv": _csv_rows}.get(file.suffix.lower(), _text_rows)
        return parsed(raws(file), file.name, _record)

    def files(self, split: str) -> list[Path]:
        if not self._path.is_dir():
            return [self._path]
        found = [file for suffix in SUFFIXES if (file := self._path / f"{split}{suffix}").is_file()]
        if not found:
            raise ValueError(f"dataset {self._path} has no {split}.txt ({', '.join(SUFFIXES[1:])} would do)")
        if len(found) > 1:
            raise ValueError(f"dataset {self._path} has {' and '.join(file.name for file in found)}; name the file")
        return found

    def image(self, key: str) -> bytes:
        raise ValueError(f"{self._path} holds prompts without images")

    def size(self, key: str) -> Size:
        raise ValueError(f"{self._path} holds prompts without images")


def without_bom(prompt: str) -> str:
    """A prompt without space around it and without byte order marks, which joined files have in their middle."""
    return prompt.replace(BOM, "").strip()


def _lines(file: Path) -> Iterator[str]:
    lines = map(without_bom, read_text(file).split("\n"))  # not splitlines: a prompt may hold its other ends of line
    return (line for line in lines if line)


def _text_rows(file: Path) -> Iterator[object]:
    return ({"prompt": line} for line in _lines(file))


def _json_rows(file: Path) -> Iterator[object]:
    return (_row(entry) for entry in json_array(file))


def _csv_rows(file: Path) -> Iterator[object]:
    reader = csv.DictReader(io.StringIO(read_text(file), newline=""))
    try:
        if "prompt" not in (reader.fieldnames or ()):
            raise ValueError(f"{file} has no column `prompt`, but {shown(reader.fieldnames)}; is it split by commas?")
        yield from reader
    except csv.Error as error:
        raise ValueError(f"{file} is not valid CSV at line {reader.line_num}: {error}") from error


def _row(entry: object) -> object:
    return {"prompt": entry} if isinstance(entry, str) else entry


def _json_record(index: int, raw: Raw) -> PreferenceRecord:
    try:
        row = _row(parse_json(text(raw, "line")))
    except ValueError as error:
        raise ValueError(f"not valid JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"neither an object nor a string: {shown(row)}")
    return _record(index, row)


def _record(index: int, raw: Raw) -> PreferenceRecord:
    prompt = without_bom(text(raw, "prompt"))
    return PreferenceRecord(index=index, prompt=text({"prompt": prompt}, "prompt"), images=(), ranks=())
