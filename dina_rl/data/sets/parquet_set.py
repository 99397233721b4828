"""What sets in Hugging Face's parquet layout share: files of a split, rows as a stream, images inside cells.

Files are `<split>-00000-of-00004.parquet` (or `<split>.parquet`) in the directory, or in a folder of it. An image cell
is bytes, or a struct {bytes, path}. The key of an image is `file#row_group/row/column`. A file may be a symlink to
anywhere, as all are in Hugging Face's cache: which ones are opened is the layout's choice, not the records'.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from pathlib import Path

import pyarrow
from pyarrow import parquet

from dina_rl.data.buckets import Size
from dina_rl.data.images import image_size
from dina_rl.data.sets.fields import Parse, Raw, parsed
from dina_rl.data.sets.records import PreferenceRecord, SkippedRecord
from dina_rl.errors import shown

ROWS = 256  # read at once
KEY = "_key"
"""Field of a raw record: the key of its row without the column."""


class ParquetSet:
    """Rows and images of parquet files.

    Args:
        folders: where a split's files may lie, relative to `directory`; `{split}` is the split's name.
        names: patterns of the names of a split's files.

    Raises:
        ValueError: no such directory.
    """

    def __init__(
        self,
        directory: Path,
        *,
        folders: tuple[str, ...],
        names: tuple[str, ...] = ("{split}-[0-9]*.parquet", "{split}.parquet"),
    ) -> None:
        if not directory.is_dir():
            raise ValueError(f"dataset directory {directory} does not exist")
        self._directory = directory
        self._folders = folders
        self._names = names
        self._column = lru_cache(maxsize=2)(self._read_column)  # both sides of the pairs that lie together

    def files(self, split: str) -> list[Path]:
        """The split's files in order.

        Raises:
            ValueError: there are none.
        """
        for folder in self._folders:
            found = sorted(file for name in self._names for file in self._glob(folder, name, split))
            if found:
                return found
        raise ValueError(f"dataset {self._directory} has no {self._names[0].format(split=split)}")

    def columns(self, split: str) -> list[str]:
        """Columns of the split's first file. Raises ValueError if it is not parquet."""
        names: list[str] = _schema(self.files(split)[0]).names
        return names

    def records(
        self, split: str, columns: Sequence[str], parse: Parse, *, images: Sequence[str] = ()
    ) -> Iterator[PreferenceRecord | SkippedRecord]:
        """Every row as `parse` makes it of {column: value} and `KEY`.

        Args:
            images: columns that are not read now, but must be there.

        Raises:
            ValueError: a file that is not parquet or lacks a column.
        """
        first = 0
        for file in self.files(split):
            missing = sorted({*columns, *images} - set(_schema(file).names))
            if missing:
                raise ValueError(f"{file} has no column {', '.join(missing)}")
            name = file.relative_to(self._directory).as_posix()
            yield from parsed(_rows(file, name, list(columns)), name, parse, first=first)
            with parquet.ParquetFile(file) as opened:
                first += opened.metadata.num_rows

    def cell(self, key: str) -> object:
        """The value at `file#row_group/row/column`. Raises ValueError if it cannot be read."""
        place, _, cell = key.rpartition("#")
        group, row, column = cell.split("/")
        return self._column(place, int(group), column)[int(row)].as_py()

    def image(self, key: str) -> bytes:
        """The image in a cell. Raises ValueError if it holds none or cannot be read."""
        value = self.cell(key)
        content = value.get("bytes") if isinstance(value, dict) else value
        if content is None or content == b"":
            raise ValueError("unreadable image: the cell is empty")
        if not isinstance(content, bytes):
            raise ValueError(f"unreadable image: the cell holds no bytes, but {shown(content)}")
        return content

    def size(self, key: str) -> Size:
        return image_size(self.image(key))

    @cached_property
    def _known(self) -> dict[str, Path]:
        """Every split's files by their path inside the directory, the only ones that a key may name."""
        found = (file for folder in self._folders for name in self._names for file in self._glob(folder, name, "*"))
        return {file.relative_to(self._directory).as_posix(): file for file in found}

    def _glob(self, folder: str, name: str, split: str) -> Iterator[Path]:
        return self._directory.glob(str(Path(folder.format(split=split)) / name.format(split=split)))

    def _read_column(self, place: str, group: int, column: str) -> pyarrow.ChunkedArray:
        if place not in self._known:
            raise ValueError(f"refused: {place!r} is no file of dataset {self._directory}")
        try:
            with parquet.ParquetFile(self._known[place]) as file:
                return file.read_row_group(group, columns=[column]).column(0)
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"unreadable image: {' '.join(str(error).split())}") from error


def _rows(file: Path, name: str, columns: list[str]) -> Iterator[Raw]:
    try:
        with parquet.ParquetFile(file) as opened:
            for group in range(opened.num_row_groups):
                row = 0
                for batch in opened.iter_batches(batch_size=ROWS, row_groups=[group], columns=columns):
                    for values in batch.to_pylist():
                        yield values | {KEY: f"{name}#{group}/{row}"}
                        row += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file} is broken: {' '.join(str(error).split())}") from error


def _schema(file: Path) -> pyarrow.Schema:
    try:
        return parquet.read_schema(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file} is not a parquet file: {' '.join(str(error).split())}") from error
