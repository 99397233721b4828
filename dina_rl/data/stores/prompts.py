"""Embeddings of every prompt of a latent store, beside its latents, so that a fit needs no text encoders in memory.

    prompts/prompts.json            PromptsInfo: what decides an embedding, and how many share a file
    prompts/prompts.parquet         {prompt}: the prompt of every row, the index
    prompts/shard-00000.parquet     {embedding, length}: `embeds` and `pooled` of a row as bytes, one behind the other,
                                    in the pipeline's precision; length is null where the family reads all tokens

Every file is zstd-compressed and appears whole or not at all: with the last shard the embeddings are complete. Row
groups are small (one prompt of a large text encoder), both for reading and for what writing keeps in memory.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import zip_longest
from pathlib import Path
from typing import get_args

import pyarrow
import torch

from dina_rl.backbones.base import Backbone, TextEncoder
from dina_rl.checkpoint import write_json
from dina_rl.config import PipelineConfig
from dina_rl.data.stores.files import chunked, fixed_bytes, open_table, texts, write_table
from dina_rl.data.stores.latents import CACHE_BYTES, INDEX_GROUP, ROW_GROUP_BYTES, LatentDtype
from dina_rl.errors import shown
from dina_rl.fingerprint import pipeline_fingerprint, same_part
from dina_rl.textfiles import read_record
from dina_rl.types import PromptEmbeds

PROMPTS = "prompts"
INFO_FILE = "prompts.json"
INDEX_FILE = "prompts.parquet"
SHARD_BYTES = 256 * 2**20
SHARD_PROMPTS = 256  # of small embeddings: what a killed encode does again costs the encoder's time, not bytes
_INDEX_SCHEMA = pyarrow.schema([("prompt", pyarrow.string())])


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptsInfo:
    """What decides a prompt's embedding. L text tokens of width D, D_pooled of the pooled embedding."""

    pipeline: str
    max_sequence_length: int
    dtype: str
    shape: tuple[int, int, int]  # L, D, D_pooled
    prompts_per_shard: int
    text: str | None = None  # fingerprint of the text encoders; None: unknown, the pipeline's name stands for them

    def same_embeddings(self, other: "PromptsInfo") -> bool:
        """Whether the two are alike but for where the pipeline lies."""
        alike = replace(self, pipeline=other.pipeline, text=other.text) == other
        return alike and same_part(self.text, other.text, called_alike=self.pipeline == other.pipeline)

    @staticmethod
    def of(pipeline: PipelineConfig, backbone: Backbone) -> "PromptsInfo":
        """Of what the pipeline's text encoders make."""
        tokens, width, pooled = backbone.prompt_shape
        nbytes = (tokens * width + pooled) * getattr(torch, pipeline.dtype).itemsize
        return PromptsInfo(
            pipeline=pipeline.path,
            max_sequence_length=backbone.max_sequence_length,
            dtype=pipeline.dtype,
            shape=backbone.prompt_shape,
            prompts_per_shard=max(1, min(SHARD_PROMPTS, SHARD_BYTES // nbytes)),
            text=pipeline_fingerprint(*pipeline.place).text,
        )

    @property
    def values(self) -> int:
        """Numbers in one row."""
        tokens, width, pooled = self.shape
        return tokens * width + pooled


class PromptStore:
    """Reads and writes the embeddings beside the latents in `directory`, a latent store's.

    Raises:
        ValueError: the store has no embeddings.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory / PROMPTS
        file = self.directory / INFO_FILE
        if not file.is_file():
            raise ValueError(f"latent store {directory} has no prompt embeddings; make them with jobs.encode")
        self.info = read_record(PromptsInfo, file)
        if (
            self.info.dtype not in get_args(LatentDtype)
            or min(self.info.prompts_per_shard, *self.info.shape[:2], self.info.shape[2] + 1) < 1
        ):
            raise ValueError(f"{file} does not describe prompt embeddings: {shown(asdict(self.info))}")
        with open_table(self.directory / INDEX_FILE) as index:
            self.num_prompts = index.metadata.num_rows
        self._width: int = self.info.values * getattr(torch, self.info.dtype).itemsize  # bytes of a row
        self._per_group = max(1, ROW_GROUP_BYTES // self._width)
        largest = self._width * min(self._per_group, self.info.prompts_per_shard)
        self._group: Callable[[int, int], PromptEmbeds] = lru_cache(maxsize=max(1, CACHE_BYTES // largest))(
            self._read_group
        )

    def __reduce__(self) -> tuple[type["PromptStore"], tuple[Path]]:
        return PromptStore, (self.directory.parent,)  # another process opens it anew

    @staticmethod
    def create(directory: Path, info: PromptsInfo, prompts: Iterable[str]) -> "PromptStore":
        """Begin the embeddings of `prompts`, which are distinct, or take up unfinished ones of the same.

        Raises:
            ValueError: the store holds embeddings of something else.
        """
        ours = directory / PROMPTS
        if (ours / INFO_FILE).exists():
            store = PromptStore(directory)
            same_prompts = all(a == b for a, b in zip_longest(store.iter_prompts(), prompts))
            if not (same_prompts and store.info.same_embeddings(info)):
                raise ValueError(
                    f"{ours} holds embeddings of other prompts or of another text encoder (of {store.info.pipeline}, "
                    f"{store.info.dtype}, max_sequence_length {store.info.max_sequence_length}); delete it to make "
                    "them anew"
                )
            return store
        ours.mkdir(parents=True, exist_ok=True)
        batches = (
            pyarrow.record_batch({"prompt": chunk}, schema=_INDEX_SCHEMA) for chunk in chunked(prompts, INDEX_GROUP)
        )
        write_table(ours / INDEX_FILE, batches, _INDEX_SCHEMA)
        write_json(ours / INFO_FILE, asdict(info))
        return PromptStore(directory)

    def iter_prompts(self) -> Iterator[str]:
        """Prompt of every row, read as they are asked for."""
        with open_table(self.directory / INDEX_FILE) as file:
            yield from texts(file, "prompt")

    def rows(self, shard: int) -> range:
        """Rows of a shard."""
        start = shard * self.info.prompts_per_shard
        return range(start, min(start + self.info.prompts_per_shard, self.num_prompts))

    def missing_shards(self) -> list[int]:
        """Shards that are not encoded yet."""
        shards = math.ceil(self.num_prompts / self.info.prompts_per_shard)
        return [number for number in range(shards) if not self._shard(number).exists()]

    def write_shard(self, number: int, encoder: TextEncoder) -> int:
        """Encode a shard's prompts and write them, a row group in memory at a time; returns how many it holds."""
        rows = self.rows(number)
        schema = pyarrow.schema([("embedding", pyarrow.binary(self._width)), ("length", pyarrow.int64())])

        def batches() -> Iterator[pyarrow.RecordBatch]:
            for prompts in chunked(self._prompts_of(rows), self._per_group):
                encoded = encoder(prompts).to("cpu")
                flat = torch.cat([encoded.embeds.flatten(1), encoded.pooled], dim=1).contiguous()
                assert flat.shape == (len(prompts), self.info.values)
                assert flat.dtype == getattr(torch, self.info.dtype)
                content = pyarrow.py_buffer(flat.view(torch.uint8).numpy().tobytes())
                column = pyarrow.FixedSizeBinaryArray.from_buffers(schema.types[0], len(prompts), [None, content])
                lengths = [None] * len(prompts) if encoded.lengths is None else encoded.lengths.tolist()
                yield pyarrow.record_batch([column, pyarrow.array(lengths, pyarrow.int64())], schema=schema)

        write_table(self._shard(number), batches(), schema, use_dictionary=False, write_statistics=False)
        return len(rows)

    def read(self, row: int) -> PromptEmbeds:
        """The embeddings of one row, on the CPU and as the text encoder gave them."""
        shard, offset = divmod(row, self.info.prompts_per_shard)
        offset, group = offset % self._per_group, offset // self._per_group
        return self._group(shard, group).select(slice(offset, offset + 1))

    def _read_group(self, shard: int, group: int) -> PromptEmbeds:
        count = min(self._per_group, len(self.rows(shard)) - group * self._per_group)
        with open_table(self._shard(shard)) as file:
            table = file.read_row_group(group)
            content = torch.from_numpy(fixed_bytes(table.column("embedding"), self._width, count))
            lengths = table.column("length")
            if lengths.type not in (pyarrow.int64(), pyarrow.null()):
                raise ValueError(f"its lengths are {lengths.type}")
        flat = content.view(getattr(torch, self.info.dtype))
        tokens, width, pooled = self.info.shape
        embeds, pooled = flat.view(count, -1).split([tokens * width, pooled], dim=1)
        return PromptEmbeds(
            embeds=embeds.reshape(-1, tokens, width),
            pooled=pooled.contiguous(),
            lengths=None if lengths.null_count else torch.tensor(lengths.to_pylist()),
        )

    def _prompts_of(self, rows: range) -> list[str]:
        groups = range(rows.start // INDEX_GROUP, (rows.stop - 1) // INDEX_GROUP + 1)
        with open_table(self.directory / INDEX_FILE) as file:
            column = file.read_row_groups(list(groups)).column(0)
        prompts: list[str] = column.slice(rows.start - groups.start * INDEX_GROUP, len(rows)).to_pylist()
        return prompts

    def _shard(self, number: int) -> Path:
        return self.directory / f"shard-{number:05d}.parquet"


def find_prompts(directory: Path, pipeline: PipelineConfig) -> PromptStore | None:
    """The embeddings beside encoded pairs, for a run with that pipeline; None where there are none.

    Raises:
        ValueError: they are not complete, or were made with other settings of the pipeline.
    """
    if not (directory / PROMPTS / INFO_FILE).is_file():
        return None
    store = PromptStore(directory)
    ours, called_alike = pipeline_fingerprint(*pipeline.place).text, store.info.pipeline == pipeline.path
    same = same_part(store.info.text, ours, called_alike=called_alike)
    if called_alike and not same:
        raise ValueError(
            f"prompt embeddings {store.directory} were made by other text encoders than {pipeline.path} holds now; "
            "delete them to load the text encoders"
        )
    made_with = {
        "path": pipeline.path if same else store.info.pipeline,
        "dtype": store.info.dtype,
        "max_sequence_length": store.info.max_sequence_length,
    }
    for key, value in made_with.items():
        given = pipeline.model_dump()[key]
        if given != value:
            raise ValueError(
                f"prompt embeddings {store.directory} were made with pipeline.{key} {value}, this run's is {given}; "
                "set it likewise, or delete them to load the text encoders"
            )
    missing = len(store.missing_shards())
    if missing:
        raise ValueError(
            f"prompt embeddings {store.directory} are not complete ({missing} files missing); finish them with "
            "jobs.encode --resume, or delete them to load the text encoders"
        )
    return store


class StoredPrompts:
    """`TextEncoder` that reads what was encoded before, of one or more stores of the same pipeline.

    It holds the text of all prompts, as a fit's pairs do, and a few megabytes of embeddings.
    """

    def __init__(self, stores: Sequence[PromptStore]) -> None:
        self._stores = tuple(stores)
        self._places: dict[str, tuple[int, int]] = {}
        for number, store in enumerate(self._stores):
            for row, prompt in enumerate(store.iter_prompts()):
                self._places.setdefault(prompt, (number, row))

    def __call__(self, prompts: Sequence[str]) -> PromptEmbeds:
        """Embeddings of `prompts`, one row each, on the CPU.

        Raises:
            ValueError: a prompt that is in none of the stores.
        """
        return PromptEmbeds.cat([self._one(prompt) for prompt in prompts])

    def _one(self, prompt: str) -> PromptEmbeds:
        if prompt not in self._places:
            places = ", ".join(str(store.directory) for store in self._stores)
            raise ValueError(f"no embeddings are stored of the prompt {prompt!r} in {places}")
        number, row = self._places[prompt]
        return self._stores[number].read(row)
