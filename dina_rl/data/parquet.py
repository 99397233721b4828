"""Parquet files that are written row by row and appear whole or not at all."""

import os
import tempfile
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import pyarrow
from pyarrow import parquet


def write_table(path: Path, batches: Iterable[pyarrow.RecordBatch], schema: pyarrow.Schema, **options: object) -> None:
    """Write `batches`, one row group each, under a temporary name, and rename the file when it is complete.

    Args:
        options: of `pyarrow.parquet.ParquetWriter`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    os.close(handle)
    try:
        with parquet.ParquetWriter(temporary, schema, compression="zstd", **options) as writer:
            for batch in batches:
                writer.write_batch(batch)
        os.chmod(temporary, 0o644)  # mkstemp's are private; a run directory is there to be shared
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def chunked(items: Iterable, size: int) -> Iterator[list]:
    """Lists of up to `size` consecutive items."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk
