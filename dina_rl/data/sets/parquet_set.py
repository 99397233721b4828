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
from dina_rl.data.sets.records import AnyRecord
from dina_rl.errors import shown
from dina_rl.storage import reading
from dina_rl.textfiles import regular

ROWS = 256  # read at once
CELLS = 8  # images read at once: all of a row group may be more than the 2 GiB that Arrow reads, or the memory
BUFFER = 2**20  # bytes of a file read at once, instead of whole columns
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
        self._column = lru_cache(maxsize=2)(self._open_column)  # both sides of the pairs that lie together
        self._broken: dict[tuple[str, int, str], tuple[int, str]] = {}  # column -> from which row on it is, and why

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
    ) -> Iterator[AnyRecord]:
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
            with parquet.ParquetFile(regular(file)) as opened:
                first += opened.metadata.num_rows

    def cell(self, key: str) -> object:
        """The value at `file#row_group/row/column`. Raises ValueError if it cannot be read."""
        place, _, cell = key.rpartition("#")
        group, row, column = cell.split("/")
        where = place, int(group), column
        first, reason = self._broken.get(where, (None, ""))
        if first is not None and int(row) >= first:
            raise ValueError(reason)
        opened = self._column(*where)
        try:
            with reading(self._known[place]):
                return opened.cell(int(row))
        except (pyarrow.ArrowException, OSError) as error:
            reason = f"unreadable image: {' '.join(str(error).split())}"
            self._broken[where] = opened.following, reason
            raise ValueError(reason) from error

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

    def _open_column(self, place: str, group: int, column: str) -> "_Column":
        if place not in self._known:
            raise ValueError(f"refused: {place!r} is no file of dataset {self._directory}")
        return _Column(self._known[place], group, column)


class _Column:
    """One column of a row group, of which a few cells are in memory: those around the last one that was asked for.

    Cells are asked for in order, mostly; going back starts the column again.
    """

    def __init__(self, file: Path, group: int, column: str) -> None:
        self._file, self._group, self._column = file, group, column
        self._batches = self._read()
        self._first: int = 0
        self._cells: pyarrow.Array = pyarrow.array([])

    @property
    def following(self) -> int:
        """The row behind those in memory."""
        return self._first + len(self._cells)

    def cell(self, row: int) -> object:
        """The value in a row. Raises pyarrow's errors and OSError."""
        if row < self._first:
            self._batches = self._read()
            self._first, self._cells = 0, pyarrow.array([])
        while row >= self.following:
            batch = next(self._batches, None)
            if batch is None:
                raise pyarrow.ArrowInvalid(f"{self._file} has no row {row} in group {self._group}")
            self._first, self._cells = self.following, batch.column(0)
        return self._cells[row - self._first].as_py()

    def _read(self) -> Iterator[pyarrow.RecordBatch]:
        with parquet.ParquetFile(regular(self._file), buffer_size=BUFFER) as opened:
            yield from opened.iter_batches(batch_size=CELLS, row_groups=[self._group], columns=[self._column])


def _rows(file: Path, name: str, columns: list[str]) -> Iterator[Raw]:
    try:
        with parquet.ParquetFile(regular(file)) as opened:
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
        return parquet.read_schema(regular(file))
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file} is not a parquet file: {' '.join(str(error).split())}") from error
