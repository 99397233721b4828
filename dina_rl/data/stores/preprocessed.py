"""Encoded pairs as the paper's authors publish them, read as they are (`preprocessed_set.py` copies them).

Parquet files `part_rankNN.parquet` (liuhuohuo/DiNa-LRM-SD35m-HPSv3-Preprocess-Data), one row per pair: `prompt`,
`detailed_results` (the repr of a dict), and the normalised latents of the preferred and the other image, `latent1` and
`latent2` as .npy files of fp32 [C, h, w]. They lie in the directory itself, or in a folder of it for each split.
"""

import ast
import io
import math
import tokenize
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path

import numpy
import pyarrow
import torch
from pyarrow import parquet

from dina_rl.config.fitting import Split
from dina_rl.data.buckets import Size
from dina_rl.data.stores.latents import PairBatch, PairTable, read_batch
from dina_rl.errors import shown
from dina_rl.storage import reading
from dina_rl.textfiles import regular

NAME = "part_rank[0-9]*.parquet"
PIXELS_PER_LATENT = 8
SIDES = ("latent1", "latent2")
_NPY_HEADERS = {
    (1, 0): numpy.lib.format.read_array_header_1_0,
    (2, 0): numpy.lib.format.read_array_header_2_0,
}
CACHED_GROUPS = 2  # both sides of the row group that is being read


class PreprocessedStore:
    """`PairStore` over the published files. A pair's id is its position among the split's rows, sorted by file name.

    Row 2n is pair n's preferred image, row 2n + 1 the other, counted over the splits in turn.

    Raises:
        ValueError: no such files.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._files: dict[Split, list[Path]] = {
            "train": _parts(directory / "train") or _parts(directory),
            "test": _parts(directory / "test"),
        }
        if not any(self._files.values()):
            raise ValueError(f"{directory} holds no part_rankNN.parquet, nor do its folders train and test")
        self._column = lru_cache(maxsize=CACHED_GROUPS)(self._read_column)

    def __reduce__(self) -> tuple[type["PreprocessedStore"], tuple[Path]]:
        return PreprocessedStore, (self.directory,)

    @property
    def buckets(self) -> tuple[Size, ...]:
        """(height, width) in pixels of every shape that occurs."""
        return tuple((PIXELS_PER_LATENT * h, PIXELS_PER_LATENT * w) for _, h, w in self.latent_shapes)

    @property
    def latent_shapes(self) -> tuple[tuple[int, int, int], ...]:
        """(C, h, w) of every bucket, ascending."""
        return self._shapes[0]

    def pairs(self, split: Split) -> PairTable:
        """The pairs of a split; those whose latents differ in shape are left out, `left_out` counts them.

        Raises:
            ValueError: a file without the published columns.
        """
        before = sum(map(_rows, self._files["train"])) if split == "test" else 0
        prompts, bucket = [], self._shapes[1][split]
        for file in self._files[split]:
            prompts += _read(file, ["prompt"]).column("prompt").to_pylist()
        kept = (bucket >= 0).nonzero()[:, 0]
        numbers: dict[str, int] = {}
        indices = [numbers.setdefault(prompts[position], len(numbers)) for position in kept.tolist()]
        return PairTable(
            pair_ids=kept,
            chosen=2 * (kept + before),
            rejected=2 * (kept + before) + 1,
            bucket=bucket[kept],
            prompt=torch.tensor(indices, dtype=torch.int64),
            prompts=tuple(numbers),
        )

    def left_out(self, split: Split) -> int:
        """How many pairs of a split cannot be used: their latents differ in shape. Raises ValueError as `pairs`."""
        return int((self._shapes[1][split] < 0).sum())

    def latents(self, rows: torch.Tensor) -> torch.Tensor:
        """Latents [N, C, h, w] fp32 of int64 rows [N], which are of one bucket."""
        found: dict[int, torch.Tensor] = {}
        for row in sorted(rows.tolist(), key=lambda row: (self._place(row // 2), row % 2)):
            if row not in found:
                file, group, offset = self._place(row // 2)
                content = self._column(file, group, SIDES[row % 2])[offset].as_py()
                found[row] = read_latent(content, self.latent_shapes[int(self._bucket[row // 2])])
        return torch.stack([found[row] for row in rows.tolist()])

    def batch(self, table: PairTable, index: torch.Tensor) -> PairBatch:
        """The pairs at positions `index` [B] of `table`, which are of one bucket."""
        return read_batch(self, table, index)

    @cached_property
    def _shapes(self) -> tuple[tuple[tuple[int, int, int], ...], dict[Split, torch.Tensor]]:
        """(shapes ascending, split -> bucket of every row [N] int64, -1 where the two latents differ)."""
        rows: dict[Split, list[tuple[int, int, int] | None]] = {}
        for split, files in self._files.items():
            rows[split] = []
            for file in files:
                columns = [shape_column(side) for side in SIDES]
                first, second = (column.to_pylist() for column in _read(file, columns, needed=SIDES).columns)
                rows[split] += map(_common_shape, first, second)
        shapes = sorted({shape for part in rows.values() for shape in part if shape is not None})
        number = {shape: index for index, shape in enumerate(shapes)} | {None: -1}
        buckets = {
            split: torch.tensor([number[shape] for shape in part], dtype=torch.int64) for split, part in rows.items()
        }
        return tuple(shapes), buckets

    @cached_property
    def _bucket(self) -> torch.Tensor:
        """Bucket of every pair, over the splits in turn."""
        return torch.cat([self._shapes[1]["train"], self._shapes[1]["test"]])

    @cached_property
    def _groups(self) -> tuple[list[tuple[Path, int]], numpy.ndarray]:
        """((file, row group) of every row group, first pair of each and of the end)."""
        groups, sizes = [], []
        for file in [*self._files["train"], *self._files["test"]]:
            with parquet.ParquetFile(regular(file)) as opened:
                for group in range(opened.num_row_groups):
                    groups.append((file, group))
                    sizes.append(opened.metadata.row_group(group).num_rows)
        return groups, numpy.cumsum([0, *sizes])

    def _place(self, pair: int) -> tuple[Path, int, int]:
        groups, starts = self._groups
        number = int(numpy.searchsorted(starts, pair, side="right")) - 1
        return *groups[number], pair - int(starts[number])

    def _read_column(self, file: Path, group: int, side: str) -> pyarrow.ChunkedArray:
        try:
            with reading(file), parquet.ParquetFile(regular(file)) as opened:
                return opened.read_row_group(group, columns=[side]).column(0)
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{file} is broken: {' '.join(str(error).split())}") from error


def _parts(directory: Path) -> list[Path]:
    return sorted(directory.glob(NAME))


def _rows(file: Path) -> int:
    with parquet.ParquetFile(regular(file)) as opened:
        rows: int = opened.metadata.num_rows
    return rows


def _read(file: Path, columns: list[str], *, needed: Sequence[str] = ()) -> pyarrow.Table:
    """Columns of a file. Raises ValueError if it is not parquet, or lacks one of them or of those `needed` later."""
    try:
        with reading(file):
            return _columns(file, columns, needed)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file} is not one of the published files: {' '.join(str(error).split())}") from error


def _columns(file: Path, columns: list[str], needed: Sequence[str]) -> pyarrow.Table:
    missing = sorted({*columns, *needed} - set(parquet.read_schema(regular(file)).names))
    if missing:
        raise ValueError(f"{file} is not one of the published files: it has no column {', '.join(missing)}")
    return parquet.read_table(file, columns=columns)


def _common_shape(first: object, second: object) -> tuple[int, int, int] | None:
    """The shape of both latents of a pair; None if they differ, or one has none."""
    try:
        return latent_shape(first) if latent_shape(first) == latent_shape(second) else None
    except ValueError:
        return None


def shape_column(side: str) -> str:
    """The column that holds the shape of the latents in column `side`."""
    return f"{side}_shape"


def latent_shape(value: object) -> tuple[int, int, int]:
    """(C, h, w) as a cell records it. Raises ValueError if it is no shape."""
    if not isinstance(value, list) or len(value) != 3 or any(type(size) is not int or size <= 0 for size in value):
        raise ValueError(f"the shape of a latent must be [C, h, w], got {shown(value)}")
    return tuple(value)


def read_latent(content: object, shape: tuple[int, int, int]) -> torch.Tensor:
    """The latent [C, h, w] fp32 of a .npy file. Raises ValueError if it is none, or of another shape."""
    if not isinstance(content, bytes):
        raise ValueError(f"unreadable latent: the cell holds {shown(content)}")
    stream = io.BytesIO(content)
    try:
        found, dtype = _npy_header(stream)
        if found != shape or dtype.kind != "f":
            raise ValueError(f"{dtype} of shape {found}, not floats of shape {shape}")
        if len(content) - stream.tell() < math.prod(found) * dtype.itemsize:
            raise ValueError(f"{len(content)} bytes are too few for {dtype} of shape {found}")
        stream.seek(0)
        array = numpy.load(stream, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"unreadable latent: {error}") from error
    return torch.from_numpy(numpy.ascontiguousarray(array, dtype=numpy.float32))


def _npy_header(stream: io.BytesIO) -> tuple[tuple[int, ...], numpy.dtype]:
    """(shape, dtype) that a .npy file claims to hold: believed before they are checked, they cost any memory."""
    version = numpy.lib.format.read_magic(stream)
    if version not in _NPY_HEADERS:
        raise ValueError(f".npy format {version} is not one of {', '.join(map(str, _NPY_HEADERS))}")
    try:
        shape, _, dtype = _NPY_HEADERS[version](stream)
    except (tokenize.TokenError, SyntaxError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError(f"its .npy header is broken: {error}") from error
    return shape, dtype


def read_details(text: object) -> Mapping[str, object]:
    """What the authors recorded of a pair. Raises ValueError if it is not the repr of a dict; nothing is executed."""
    try:
        details = ast.literal_eval(text) if isinstance(text, str) else None
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"detailed_results is not a literal: {error}") from error
    if not isinstance(details, dict):
        raise ValueError(f"detailed_results must be the repr of a dict, got {type(text).__name__}")
    return details
