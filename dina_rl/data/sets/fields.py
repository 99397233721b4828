"""What readers of published files share: records as a stream, and fields checked one by one."""

import codecs
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from dina_rl.data.sets.records import AnyRecord, PreferenceRecord, SkippedRecord, UnlabelledRecord
from dina_rl.errors import shown

Raw = Mapping[str, object]
"""A record as its file has it: nothing of it is trusted."""

Parse = Callable[[int, Raw], PreferenceRecord | UnlabelledRecord]
"""(index, raw record) to a record. Raises ValueError if it is malformed."""


DEEPEST = 1000  # levels of JSON; records have three
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)


def parsed(raws: Iterable[object], file: str, parse: Parse, *, first: int = 0) -> Iterator[AnyRecord]:
    """Records of `raws`, which count from `first`; a malformed one comes with its reason."""
    for index, raw in enumerate(raws, start=first):
        try:
            if not isinstance(raw, dict):
                raise ValueError(f"record is a {type(raw).__name__}, not an object")
            yield replace(parse(index, raw), file=file)
        except ValueError as error:
            yield SkippedRecord(file=file, index=index, reason=str(error))


def json_array(file: Path) -> Iterator[object]:
    """The elements of a JSON array, read as they are asked for: a file of gigabytes costs no memory.

    Raises:
        ValueError: no such file, invalid JSON (possibly only when the stream gets there), or not an array.
    """
    import ijson

    if not file.is_file():
        raise ValueError(f"dataset {file.parent} has no {file.name}")
    with file.open("rb") as stream:
        begin = len(codecs.BOM_UTF8) if stream.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8 else 0
        stream.seek(begin)
        start = stream.read(1)
        while start.isspace():
            start = stream.read(1)
        if start in (b"{", b'"'):
            raise ValueError(f"{file} must hold an array of records")
        stream.seek(begin)
        position = 0
        try:
            for element in ijson.items(_Nested(stream), "item", use_float=True):
                yield element
                position += 1
        except ValueError as error:
            raise ValueError(f"{file} is not valid JSON at record {position}, counted from 0: {error}") from error
        except ijson.JSONError as error:
            message = error.args[0].decode(errors="replace") if isinstance(error.args[0], bytes) else str(error)
            place = f"at record {position}, counted from 0"
            raise ValueError(f"{file} is not valid JSON {place}: {_say(message)}") from error


class _Nested:
    """A stream of JSON that refuses to be read where it nests deeper than any record.

    The parser keeps the path to where it is once for every level: 200,000 brackets would take 40 GB.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._depth = 0
        self._begun = b""  # a string that goes on in what follows, all but how it began and ends

    def read(self, size: int = -1) -> bytes:
        """Raises ValueError where it nests too deeply."""
        content = self._stream.read(size)
        structure, quote, rest = _STRING.sub(b"", self._begun + content).partition(b'"')
        escapes = len(rest) - len(rest.rstrip(b"\\"))
        self._begun = quote + b"\\" * (escapes % 2)
        opened = structure.count(b"[") + structure.count(b"{")
        if self._depth + opened > DEEPEST:
            self._check(structure)
        self._depth += opened - structure.count(b"]") - structure.count(b"}")
        return content

    def _check(self, structure: bytes) -> None:
        depth = self._depth
        for each in structure:
            depth += (each in b"[{") - (each in b"]}")
            if depth > DEEPEST:
                raise ValueError(f"it nests deeper than {DEEPEST} levels")


def _say(message: str) -> str:
    """What the parser found, and what to do. It says so in three lines, with what stands there and where in it."""
    what, *place = message.splitlines()
    if len(place) == 2:
        at = max(place[1].find("^"), 0)
        if re.match(r"-?(NaN|Inf)", place[0][max(at - 1, 0) :].lstrip(" :,[")):
            return "JSON has no NaN and no Infinity; write null in its place"
    if "UTF8" in what or "\ufffd" in message:
        return "it is not UTF-8 text; save it as UTF-8"
    return f"{what.strip()}; was the file cut short or edited? `python -m json.tool` finds the place"


def text(raw: Raw, key: str) -> str:
    """A string that is not blank, as it is."""
    value = raw.get(key)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{key} must be a non-empty string, got {shown(value)}")
    if not _encodes(value):
        raise ValueError(f"{key} is not valid Unicode: {shown(value)}")
    return value


def texts(raw: Raw, key: str) -> tuple[str, ...]:
    """A list of strings that are not blank."""
    value = raw.get(key)
    if not isinstance(value, list):
        raise ValueError(f"{key} must be a list, got {shown(value)}")
    return tuple(text({key: each}, key) for each in value)


def integers(raw: Raw, key: str, count: int) -> tuple[int, ...]:
    """A list of `count` whole numbers."""
    value = raw.get(key)
    if not isinstance(value, list) or len(value) != count or any(type(each) is not int for each in value):
        raise ValueError(f"{key} must be {count} whole numbers, got {shown(value)}")
    return tuple(value)


def share(raw: Raw, key: str) -> float | None:
    """A number in [0, 1], or none."""
    value = raw.get(key)
    if value is None:
        return None
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1:
        return value
    raise ValueError(f"{key} must be a number in [0, 1] or null, got {shown(value)}")


def pair_of_names(raw: Raw, first: str, second: str) -> tuple[str, str] | None:
    """Two optional names, both or none."""
    one, other = raw.get(first), raw.get(second)
    return (one, other) if isinstance(one, str) and isinstance(other, str) else None


def _encodes(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:  # half a surrogate pair: JSON can hold it, files and databases cannot
        return False
    return True
