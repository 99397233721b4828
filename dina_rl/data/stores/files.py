"""Files that are written piece by piece and appear whole or not at all; tables with a checksum of every page."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TypeVar

import pyarrow
from pyarrow import parquet

from dina_rl.checkpoint import replaced_file
from dina_rl.storage import check_there, reading

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


@contextmanager
def open_table(path: Path) -> Iterator[parquet.ParquetFile]:
    """A table of `write_table` for the time of a block that reads of it.

    Raises:
        ValueError: what is read is not what was written, or not there.
        StorageFailed: storage is away.
    """
    try:
        with reading(path), parquet.ParquetFile(path, page_checksum_verification=True) as file:
            yield file
    except FileNotFoundError as error:
        check_there(path.parent)
        raise ValueError(f"{path} does not exist any more; jobs.encode --resume makes it again") from error
    except (OSError, pyarrow.ArrowInvalid) as error:
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
