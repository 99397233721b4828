"""Files that are written piece by piece and appear whole or not at all; tables with a checksum of every page."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy
import pyarrow
from pyarrow import parquet

from dina_rl.checkpoint import replaced_file
from dina_rl.storage import check_there, reading
from dina_rl.textfiles import regular

Item = TypeVar("Item")


def write_table(path: Path, batches: Iterable[pyarrow.RecordBatch], schema: pyarrow.Schema, **options: object) -> None:
    """Write `batches`, one row group each, to a file that appears when it is complete.

    Args:
        options: of `pyarrow.parquet.ParquetWriter`.
    """
    with (
        replaced_file(path, lasting=True) as temporary,
        parquet.ParquetWriter(temporary, schema, compression="zstd", write_page_checksum=True, **options) as writer,
    ):
        for batch in batches:
            writer.write_batch(batch)


def fixed_bytes(column: pyarrow.ChunkedArray, width: int, count: int) -> numpy.ndarray:
    """The content of a column of values of one width, [count * width] uint8, a copy.

    Raises:
        ValueError: another type, another number of values, or values that are null.
    """
    if column.type != pyarrow.binary(width) or len(column) != count or column.null_count:
        raise ValueError(f"a column of {len(column)} {column.type}, it should be {count} of {width} bytes")
    values = column.combine_chunks()
    begin = values.offset * width
    return numpy.frombuffer(values.buffers()[1], numpy.uint8)[begin : begin + count * width].copy()


def texts(file: parquet.ParquetFile, name: str) -> Iterator[str]:
    """The values of a column of strings. Raises ValueError where it holds others."""
    for batch in file.iter_batches(columns=[name]):
        column = batch.column(name)
        if column.type != pyarrow.string() or column.null_count:
            raise ValueError(f"its column {name} is of {column.type}, {column.null_count} of them null")
        yield from column.to_pylist()


@contextmanager
def open_table(path: Path) -> Iterator[parquet.ParquetFile]:
    """A table of `write_table` for the time of a block that reads of it.

    Raises:
        ValueError: what is read is not what was written, or not there.
        StorageFailed: storage is away.
    """
    try:
        with reading(path), parquet.ParquetFile(regular(path), page_checksum_verification=True) as file:
            yield file
    except FileNotFoundError as error:
        check_there(path.parent)
        raise ValueError(f"{path} does not exist any more; jobs.encode --resume makes it again") from error
    except (OSError, pyarrow.ArrowException, ValueError, LookupError) as error:
        why = " ".join(str(error).split())
        raise ValueError(f"{path} is broken ({why}); delete it, and jobs.encode --resume makes it again") from error


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write text line by line to a file that appears when it is complete."""
    with replaced_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)


def chunked(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of up to `size` consecutive items."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk
