"""The latent store: every distinct (image, bucket) of a preference set encoded once, and pairs as references to rows.

    store.json                      StoreInfo: what is encoded at which sizes, and how rows map to shards
    rows.parquet                    {image}: the image of every row, the index of the store
    shard-00000.parquet             {latent, problem}: normalised latents of rows of one bucket, as bytes
    pairs-train.parquet, -test      {pair_id, chosen, rejected, prompt, probability}; written last: with
                                    them the store is complete
    prompts/                        embeddings of the pairs' prompts, where they were asked for (`prompt_store.py`)

Rows are ordered by bucket. Every file is zstd-compressed, has a checksum of every page, and appears whole or not at
all. Row groups of a shard are small, so that a row costs little to read. A row whose image could not be read holds
zeros, and no pair refers to it.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from itertools import zip_longest
from pathlib import Path
from typing import Literal, Protocol, get_args

import numpy
import pyarrow
import torch

from dina_rl.checkpoint import write_json
from dina_rl.config.fitting import Split
from dina_rl.data.buckets import Size
from dina_rl.data.stores.files import chunked, fixed_bytes, open_table, texts, write_table
from dina_rl.errors import shown
from dina_rl.fingerprint import same_part
from dina_rl.textfiles import read_record

SPLITS: tuple[Split, ...] = get_args(Split)
LatentDtype = Literal["float32", "bfloat16"]

STORE_FILE = "store.json"
ROWS_FILE = "rows.parquet"
ROW_GROUP_BYTES = 2**20
CACHE_BYTES = 64 * 2**20  # of row groups that a reader keeps: all of a miniature store, nothing of a real one's
INDEX_GROUP = 4096  # rows of the index, or pairs, in one row group
LARGEST_EDGE = 2**16  # of an image or a latent: more is a mistake, or made to be one
NOT_FINITE = "the latent is not finite"
_BYTES = {"float32": 4, "bfloat16": 2}
_ROWS_SCHEMA = pyarrow.schema([("image", pyarrow.string())])
_PAIRS_SCHEMA = pyarrow.schema(
    [
        ("pair_id", pyarrow.int64()),
        ("chosen", pyarrow.int64()),
        ("rejected", pyarrow.int64()),
        ("prompt", pyarrow.string()),
        ("probability", pyarrow.float64()),  # older stores have none
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreInfo:
    """What a store holds; two stores with the same info and dataset files hold the same latents."""

    dataset: str
    pipeline: str
    buckets: tuple[Size, ...]  # (height, width), pixels
    latent_shapes: tuple[tuple[int, int, int], ...]  # (C, h, w) of every bucket
    rows: tuple[int, ...]  # in every bucket; the first bucket's rows come first
    rows_per_shard: int
    dtype: LatentDtype = "float32"  # as stored; they are read as fp32
    vae: str | None = None  # its fingerprint; None: unknown, the pipeline's name stands for it
    pictures: str | None = None  # how they were read, `images.READING` when it was begun; None: unknown

    def same_latents(self, other: "StoreInfo") -> bool:
        """Whether the two are alike but for where pipeline and images lie, and for what an older store does not say."""
        alike = asdict(self) | {"dataset": other.dataset, "pipeline": other.pipeline, "vae": other.vae}
        if self.pictures is None:
            alike["pictures"] = other.pictures
        same = same_part(self.vae, other.vae, called_alike=self.pipeline == other.pipeline)
        return same and alike == asdict(other)

    @property
    def num_rows(self) -> int:
        return sum(self.rows)

    @property
    def latent_bytes(self) -> int:
        """Of all latents, before they are compressed."""
        shapes = zip(self.rows, self.latent_shapes, strict=True)
        return _BYTES[self.dtype] * sum(rows * math.prod(shape) for rows, shape in shapes)

    @property
    def num_shards(self) -> int:
        return sum(self._shards())

    def shard(self, number: int) -> tuple[int, range]:
        """(bucket, rows) of a shard."""
        first = 0
        for bucket, (rows, shards) in enumerate(zip(self.rows, self._shards(), strict=True)):
            if number < shards:
                start = first + number * self.rows_per_shard
                return bucket, range(start, min(start + self.rows_per_shard, first + rows))
            number, first = number - shards, first + rows
        raise AssertionError(f"the store has {self.num_shards} shards")

    def bucket_of(self, rows: torch.Tensor) -> torch.Tensor:
        """Buckets [N] int64 of rows [N]."""
        ends = torch.tensor(self.rows, dtype=torch.int64).cumsum(0)
        return torch.bucketize(rows, ends, right=True)

    def shard_of(self, row: int) -> tuple[int, int]:
        """(shard, offset in it) of a row."""
        shards = 0
        for rows, count in zip(self.rows, self._shards(), strict=True):
            if row < rows:
                return shards + row // self.rows_per_shard, row % self.rows_per_shard
            row, shards = row - rows, shards + count
        raise AssertionError(f"the store has {self.num_rows} rows")

    def _shards(self) -> list[int]:
        return [-(-rows // self.rows_per_shard) for rows in self.rows]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredPair:
    """A usable pair as references to rows, which are of one bucket."""

    pair_id: int
    chosen: int
    rejected: int
    prompt: str
    probability: float | None = None  # y of Eq. 9, that chosen is the better one; None: nobody says so


@dataclass(frozen=True, slots=True, kw_only=True)
class PairTable:
    """The usable pairs of a split. N pairs."""

    pair_ids: torch.Tensor  # [N] int64, `PreferencePair.index`
    chosen: torch.Tensor  # [N] int64, row of the preferred image
    rejected: torch.Tensor  # [N] int64
    bucket: torch.Tensor  # [N] int64, index into the store's `buckets`
    prompt: torch.Tensor  # [N] int64, index into `prompts`
    prompts: tuple[str, ...]  # distinct
    probability: torch.Tensor | None = None  # [N] float64, that chosen is the better one, NaN where nobody says so;
    # None: it is said of no pair

    def __len__(self) -> int:
        return len(self.pair_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class PairBatch:
    """Pairs as the reward model takes them."""

    pair_ids: torch.Tensor  # [B] int64, `PreferencePair.index`: keys of the pair's random draws
    chosen: torch.Tensor  # [B, C, H, W] clean latents
    rejected: torch.Tensor  # [B, C, H, W]
    prompts: tuple[str, ...]  # B of them

    def __len__(self) -> int:
        return len(self.pair_ids)


class PairStore(Protocol):
    """Encoded pairs, whoever wrote them."""

    @property
    def buckets(self) -> tuple[Size, ...]:
        """(height, width) in pixels."""
        ...

    @property
    def latent_shapes(self) -> tuple[tuple[int, int, int], ...]:
        """(C, h, w) of every bucket."""
        ...

    def pairs(self, split: Split) -> PairTable: ...

    def latents(self, rows: torch.Tensor) -> torch.Tensor:
        """Latents [N, C, h, w] fp32 of int64 rows [N], which are of one bucket."""
        ...

    def batch(self, table: PairTable, index: torch.Tensor) -> PairBatch:
        """The pairs at positions `index` [B] of `table`, which are of one bucket."""
        ...


def read_batch(store: PairStore, table: PairTable, index: torch.Tensor) -> PairBatch:
    """`PairStore.batch`."""
    buckets = table.bucket[index].unique().tolist()
    assert len(buckets) == 1, f"a batch is of one bucket, not of {buckets}"
    return PairBatch(
        pair_ids=table.pair_ids[index],
        chosen=store.latents(table.chosen[index]),
        rejected=store.latents(table.rejected[index]),
        prompts=tuple(table.prompts[number] for number in table.prompt[index].tolist()),
    )


class LatentStore:
    """Reads and writes a store.

    Raises:
        ValueError: `directory` is not a latent store.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        file = directory / STORE_FILE
        if not file.is_file():
            raise ValueError(f"latent store {directory} does not exist (no {STORE_FILE}); make it with jobs.encode")
        try:
            self.info = read_record(StoreInfo, file)
            self._check_info()
        except ValueError as error:
            raise ValueError(f"{file} does not describe a latent store of this format: {error}") from error
        largest = max(min(self.info.rows_per_shard * self._width(b), ROW_GROUP_BYTES) for b in range(len(self.buckets)))
        self._group = lru_cache(maxsize=max(1, CACHE_BYTES // largest))(self._read_group)

    def _check_info(self) -> None:
        """Raises ValueError where numbers mean nothing, or are not those of the store's own index."""
        info = self.info
        if not len(info.rows) == len(info.buckets) == len(info.latent_shapes) > 0:
            raise ValueError("as many buckets, shapes and numbers of rows are needed")
        sizes = [edge for shape in (*info.buckets, *info.latent_shapes) for edge in shape]
        if min(info.rows_per_shard, *sizes) < 1 or max(sizes) > LARGEST_EDGE or min(info.rows) < 0:
            raise ValueError("sizes that no image has")
        with open_table(self.directory / ROWS_FILE) as index:
            if index.metadata.num_rows != info.num_rows:
                raise ValueError(f"{info.num_rows} rows, its {ROWS_FILE} has {index.metadata.num_rows}")

    def __reduce__(self) -> tuple[type["LatentStore"], tuple[Path]]:
        return LatentStore, (self.directory,)  # another process opens it anew: what was read here does not travel

    @staticmethod
    def create(directory: Path, info: StoreInfo, images: Iterable[str]) -> "LatentStore":
        """Begin a store, or take up an unfinished one of the same images.

        Args:
            images: of every row.

        Raises:
            ValueError: `directory` holds latents of something else.
        """
        directory.mkdir(parents=True, exist_ok=True)
        if (directory / STORE_FILE).exists():
            store = LatentStore(directory)
            same_images = all(ours == other for ours, other in zip_longest(store.iter_images(), images))
            if not (same_images and store.info.same_latents(info)):
                raise ValueError(
                    f"{directory} holds latents of other images or of another encoder ({store.info.num_rows} images "
                    f"of {store.info.dataset}, {store.info.pipeline}); choose a new run_dir"
                )
            return store
        batches = (
            pyarrow.record_batch({"image": chunk}, schema=_ROWS_SCHEMA) for chunk in chunked(images, INDEX_GROUP)
        )
        write_table(directory / ROWS_FILE, batches, _ROWS_SCHEMA)
        write_json(directory / STORE_FILE, asdict(info))
        return LatentStore(directory)

    @property
    def buckets(self) -> tuple[Size, ...]:
        """(height, width) in pixels."""
        return self.info.buckets

    @property
    def latent_shapes(self) -> tuple[tuple[int, int, int], ...]:
        """(C, h, w) of every bucket."""
        return self.info.latent_shapes

    @cached_property
    def images(self) -> list[str]:
        """Image of every row: its key inside the set. All of them in memory; see `iter_images`, `images_of`."""
        return list(self.iter_images())

    def iter_images(self) -> Iterator[str]:
        """Image of every row, read as they are asked for."""
        with open_table(self.directory / ROWS_FILE) as file:
            yield from texts(file, "image")

    def images_of(self, rows: range) -> list[str]:
        """Images of consecutive rows."""
        groups = range(rows.start // INDEX_GROUP, (rows.stop - 1) // INDEX_GROUP + 1)
        with open_table(self.directory / ROWS_FILE) as file:
            column = file.read_row_groups(list(groups), columns=["image"]).column(0)
        images: list[str] = column.slice(rows.start - groups.start * INDEX_GROUP, len(rows)).to_pylist()
        return images

    def missing_shards(self) -> list[int]:
        """Shards that are not encoded yet."""
        return [number for number in range(self.info.num_shards) if not self._shard(number).exists()]

    def write_shard(self, number: int, latents: torch.Tensor, unreadable: Mapping[int, str]) -> None:
        """Store the latents [n, C, h, w] of a shard's rows. One that is not finite is stored as zeros and unreadable.

        Args:
            unreadable: row -> reason, for rows without an image.
        """
        bucket, rows = self.info.shard(number)
        assert latents.shape == (len(rows), *self.latent_shapes[bucket])
        width = self._width(bucket)
        schema = pyarrow.schema([("latent", pyarrow.binary(width)), ("problem", pyarrow.string())])
        stored = latents.cpu().to(getattr(torch, self.info.dtype), copy=True).contiguous()
        broken = (~stored.isfinite().flatten(1).all(1)).nonzero()[:, 0]  # in the store's precision: rounding overflows
        stored[broken] = 0
        problems = {rows[offset]: NOT_FINITE for offset in broken.tolist()} | dict(unreadable)
        per_group = self._rows_per_group(bucket)

        def batches() -> Iterator[pyarrow.RecordBatch]:
            for offset in range(0, len(rows), per_group):
                part = stored[offset : offset + per_group]
                content = pyarrow.py_buffer(part.view(torch.uint8).numpy().tobytes())
                column = pyarrow.FixedSizeBinaryArray.from_buffers(pyarrow.binary(width), len(part), [None, content])
                reasons = [problems.get(row) for row in rows[offset : offset + per_group]]
                yield pyarrow.record_batch([column, pyarrow.array(reasons, pyarrow.string())], schema=schema)

        write_table(self._shard(number), batches(), schema, use_dictionary=False, write_statistics=False)

    def unreadable(self) -> dict[int, str]:
        """Row -> reason of every image that could not be read; needs all shards."""
        reasons: dict[int, str] = {}
        for number in range(self.info.num_shards):
            rows = self.info.shard(number)[1]
            with open_table(self._shard(number)) as file:
                problems = file.read(columns=["problem"]).column("problem").to_pylist()
                if len(problems) != len(rows):
                    raise ValueError(f"it has {len(problems)} rows, not {len(rows)}")
            reasons |= {row: problem for row, problem in zip(rows, problems, strict=True) if problem is not None}
        return reasons

    def latents(self, rows: torch.Tensor) -> torch.Tensor:
        """Latents [N, C, h, w] fp32 of int64 rows [N], which are of one bucket."""
        buckets = self.info.bucket_of(rows).unique().tolist()
        assert len(buckets) == 1, f"rows are of one bucket, not of {buckets}"
        result = torch.empty(len(rows), *self.latent_shapes[buckets[0]])
        per_group = self._rows_per_group(buckets[0])
        order = rows.argsort().tolist()  # row groups are read once each, also where they do not fit the cache
        for position in order:
            shard, offset = self.info.shard_of(int(rows[position]))
            result[position] = self._group(shard, offset // per_group)[offset % per_group]
        return result

    def write_pairs(self, split: Split, pairs: Iterable[StoredPair]) -> None:
        """Store a split's usable pairs."""

        def batches() -> Iterator[pyarrow.RecordBatch]:
            for chunk in chunked(pairs, INDEX_GROUP):
                columns = {name: [getattr(pair, name) for pair in chunk] for name in _PAIRS_SCHEMA.names}
                yield pyarrow.record_batch(columns, schema=_PAIRS_SCHEMA)

        write_table(self._pairs(split), batches(), _PAIRS_SCHEMA)

    def pairs(self, split: Split) -> PairTable:
        """A split's usable pairs."""
        with open_table(self._pairs(split)) as file:
            table = file.read()
            self._check_pairs(table)
        prompts = table.column("prompt").dictionary_encode().combine_chunks()
        numbers = {name: torch.tensor(table.column(name).to_numpy()) for name in ("pair_id", "chosen", "rejected")}
        soft = table.column("probability") if "probability" in table.column_names else None
        return PairTable(
            pair_ids=numbers["pair_id"],
            chosen=numbers["chosen"],
            rejected=numbers["rejected"],
            bucket=self.info.bucket_of(numbers["chosen"]),
            prompt=torch.tensor(prompts.indices.to_numpy(), dtype=torch.int64),
            prompts=tuple(prompts.dictionary.to_pylist()),
            probability=None
            if soft is None or soft.null_count == len(soft)
            else torch.tensor(soft.to_numpy(), dtype=torch.float64),
        )

    def _check_pairs(self, table: pyarrow.Table) -> None:
        """Raises ValueError where a table is not what `write_pairs` writes, or its pairs are of other rows."""
        needed = {field.name: field.type for field in _PAIRS_SCHEMA if field.name != "probability"}
        found = dict(zip(table.schema.names, table.schema.types, strict=True))
        nulls = any(column.null_count for name, column in zip(found, table.columns, strict=False) if name in needed)
        if len(found) < table.num_columns or nulls or {name: found.get(name) for name in needed} != needed:
            raise ValueError(f"its columns are {shown(', '.join(f'{name} {kind}' for name, kind in found.items()))}")
        if found.get("probability", pyarrow.float64()) not in (pyarrow.float64(), pyarrow.null()):
            raise ValueError(f"its probability is {found['probability']}")
        rows = torch.stack([torch.tensor(table.column(name).to_numpy()) for name in ("chosen", "rejected")])
        if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < self.info.num_rows:
            raise ValueError(f"it names rows {int(rows.min())} to {int(rows.max())} of {self.info.num_rows}")
        if not torch.equal(*self.info.bucket_of(rows)):
            raise ValueError("the images of a pair are of two sizes")

    def complete(self) -> bool:
        """Whether all images and pairs are stored."""
        return all(self._pairs(split).exists() for split in SPLITS)

    def batch(self, table: PairTable, index: torch.Tensor) -> PairBatch:
        """The pairs at positions `index` [B] of `table`, which are of one bucket."""
        return read_batch(self, table, index)

    def _width(self, bucket: int) -> int:
        """Bytes of one stored latent."""
        return int(numpy.prod(self.latent_shapes[bucket])) * _BYTES[self.info.dtype]

    def _rows_per_group(self, bucket: int) -> int:
        return max(1, ROW_GROUP_BYTES // self._width(bucket))

    def _read_group(self, shard: int, group: int) -> torch.Tensor:
        """Latents [n, C, h, w] of one row group, as stored."""
        bucket, rows = self.info.shard(shard)
        per_group = self._rows_per_group(bucket)
        count = min(per_group, len(rows) - group * per_group)
        with open_table(self._shard(shard)) as file:
            column = file.read_row_group(group, columns=["latent"]).column("latent")
            flat = torch.from_numpy(fixed_bytes(column, self._width(bucket), count))
        return flat.view(getattr(torch, self.info.dtype)).view(count, *self.latent_shapes[bucket])

    def _shard(self, number: int) -> Path:
        return self.directory / f"shard-{number:05d}.parquet"

    def _pairs(self, split: Split) -> Path:
        return self.directory / f"pairs-{split}.parquet"
