"""Files that are written piece by piece and appear whole or not at all."""

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import pyarrow
from pyarrow import parquet


def write_table(path: Path, batches: Iterable[pyarrow.RecordBatch], schema: pyarrow.Schema, **options: object) -> None:
    """Write `batches`, one row group each, to a file that appears when it is complete.

    Args:
        options: of `pyarrow.parquet.ParquetWriter`.
    """
    with (
        replacing(path) as temporary,
        parquet.ParquetWriter(temporary, schema, compression="zstd", **options) as writer,
    ):
        for batch in batches:
            writer.write_batch(batch)


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write text line by line to a file that appears when it is complete."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file that becomes `path` when the block ends, and vanishes if it fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    os.close(handle)
    try:
        yield Path(name)
        os.chmod(name, 0o644)  # mkstemp's are private; a run directory is there to be shared
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def chunked(items: Iterable, size: int) -> Iterator[list]:
    """Lists of up to `size` consecutive items."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk
