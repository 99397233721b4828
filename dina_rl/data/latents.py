"""The latent store: every distinct image of a preference set encoded once, and the pairs as references to its rows.

    store.json                    StoreInfo: what was encoded, and how rows map to shards
    images.json                   image path of every row
    shard-00000.safetensors       `latents` [n, C, h, w] fp32, normalised; metadata `unreadable`: offset -> reason
    pairs-train.json, -test.json  PairTable; written last, so their presence means that the store is complete

Every file appears whole or not at all. A row whose image could not be read holds zeros, and no pair refers to it.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save

from dina_rl.checkpoint import write_bytes, write_json
from dina_rl.data.hpdv3 import SPLITS, Split
from dina_rl.data.pairs import PairBatch, PreferenceRecord
from dina_rl.seeding import generator

STORE_FILE = "store.json"
IMAGES_FILE = "images.json"
UNREADABLE = "unreadable"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreInfo:
    """What a store holds; two stores with the same info and dataset files hold the same latents."""

    dataset: str
    pipeline: str
    height: int  # pixels
    width: int
    latent_shape: tuple[int, int, int]  # C, h, w
    num_images: int
    images_per_shard: int

    @property
    def num_shards(self) -> int:
        return -(-self.num_images // self.images_per_shard)

    def rows_of(self, shard: int) -> range:
        """The rows that a shard holds."""
        start = shard * self.images_per_shard
        return range(start, min(start + self.images_per_shard, self.num_images))


@dataclass(frozen=True, slots=True, kw_only=True)
class PairTable:
    """The usable pairs of a split. N pairs."""

    pair_ids: torch.Tensor  # [N] int64, `PreferenceRecord.index`
    chosen: torch.Tensor  # [N] int64, row of the preferred image
    rejected: torch.Tensor  # [N] int64
    prompt: torch.Tensor  # [N] int64, index into `prompts`
    prompts: tuple[str, ...]  # distinct

    def __len__(self) -> int:
        return len(self.pair_ids)


class LatentStore:
    """Reads a store. Shards are memory-mapped: a row costs its own bytes, not its shard's.

    Raises:
        ValueError: `directory` is not a latent store.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        file = directory / STORE_FILE
        if not file.is_file():
            raise ValueError(f"latent store {directory} does not exist (no {STORE_FILE}); make it with jobs.encode")
        raw = json.loads(file.read_text())
        self.info = StoreInfo(**raw | {"latent_shape": tuple(raw["latent_shape"])})

    @staticmethod
    def create(directory: Path, info: StoreInfo, images: Sequence[str]) -> "LatentStore":
        """Begin a store, or take up an unfinished one of the same images.

        Raises:
            ValueError: `directory` holds latents of something else.
        """
        directory.mkdir(parents=True, exist_ok=True)
        if (directory / STORE_FILE).exists():
            store = LatentStore(directory)
            if store.info != info or store.images != list(images):
                raise ValueError(
                    f"{directory} holds latents of other images or of another encoder ({store.info.num_images} images "
                    f"of {store.info.dataset}, {store.info.pipeline}); choose a new run_dir"
                )
            return store
        write_json(directory / IMAGES_FILE, list(images))
        write_json(directory / STORE_FILE, asdict(info))
        return LatentStore(directory)

    @cached_property
    def images(self) -> list[str]:
        """Image path of every row, relative to the dataset directory."""
        return json.loads((self.directory / IMAGES_FILE).read_text())

    def missing_shards(self) -> list[int]:
        """Shards that are not encoded yet."""
        return [shard for shard in range(self.info.num_shards) if not self._shard(shard).exists()]

    def write_shard(self, shard: int, latents: torch.Tensor, unreadable: dict[int, str]) -> None:
        """Store the latents [n, C, h, w] of a shard's rows.

        Args:
            unreadable: row -> reason, for rows without an image.
        """
        rows = self.info.rows_of(shard)
        assert latents.shape == (len(rows), *self.info.latent_shape)
        offsets = {row - rows.start: reason for row, reason in unreadable.items()}
        metadata = {UNREADABLE: json.dumps(offsets)}
        write_bytes(self._shard(shard), save({"latents": latents.float().cpu().contiguous()}, metadata))

    def unreadable(self) -> dict[int, str]:
        """Row -> reason of every image that could not be read; needs all shards."""
        reasons = {}
        for shard in range(self.info.num_shards):
            with safe_open(self._shard(shard), "pt") as file:
                offsets = json.loads(file.metadata()[UNREADABLE])
            start = self.info.rows_of(shard).start
            reasons |= {start + int(offset): reason for offset, reason in offsets.items()}
        return reasons

    def latents(self, rows: torch.Tensor) -> torch.Tensor:
        """Latents [N, C, h, w] of int64 rows [N]."""
        result = torch.empty(len(rows), *self.info.latent_shape)
        shards = rows // self.info.images_per_shard
        for shard in shards.unique().tolist():
            with safe_open(self._shard(shard), "pt") as file:
                stored = file.get_slice("latents")
                for position in (shards == shard).nonzero().flatten().tolist():
                    result[position] = stored[int(rows[position]) % self.info.images_per_shard]
        return result

    def write_pairs(self, split: Split, records: Sequence[PreferenceRecord]) -> None:
        """Store a split's usable pairs; every image they name is a row."""
        rows = {path: row for row, path in enumerate(self.images)}
        prompts = {prompt: None for prompt in (record.prompt for record in records)}  # an ordered set
        number = {prompt: index for index, prompt in enumerate(prompts)}
        table = {
            "pair_ids": [record.index for record in records],
            "chosen": [rows[record.chosen] for record in records],
            "rejected": [rows[record.rejected] for record in records],
            "prompt": [number[record.prompt] for record in records],
            "prompts": list(prompts),
        }
        write_bytes(self._pairs(split), json.dumps(table).encode())

    def pairs(self, split: Split) -> PairTable:
        """A split's usable pairs."""
        raw = json.loads(self._pairs(split).read_text())
        prompts = tuple(raw.pop("prompts"))
        return PairTable(prompts=prompts, **{name: torch.tensor(column) for name, column in raw.items()})

    def complete(self) -> bool:
        """Whether all images and pairs are stored."""
        return all(self._pairs(split).exists() for split in SPLITS)

    def batch(self, table: PairTable, index: torch.Tensor) -> PairBatch:
        """The pairs at positions `index` [B] of `table`."""
        return PairBatch(
            pair_ids=table.pair_ids[index],
            chosen=self.latents(table.chosen[index]),
            rejected=self.latents(table.rejected[index]),
            prompts=tuple(table.prompts[number] for number in table.prompt[index].tolist()),
        )

    def _shard(self, shard: int) -> Path:
        return self.directory / f"shard-{shard:05d}.safetensors"

    def _pairs(self, split: Split) -> Path:
        return self.directory / f"pairs-{split}.json"


def training_order(num_pairs: int, *, steps: int, batch_size: int, seed: int) -> torch.Tensor:
    """Positions in the pair table of every step's batch [steps, batch_size] int64.

    Epoch after epoch, each shuffled by its own seed, cut into batches: a function of these numbers alone, so that any
    worker count and any restart sees the same batches.
    """
    needed = steps * batch_size
    epochs = -(-needed // num_pairs)
    order = [torch.randperm(num_pairs, generator=generator(seed, "epoch", epoch)) for epoch in range(epochs)]
    return torch.cat(order)[:needed].view(steps, batch_size)


def distinct_images(records: Sequence[PreferenceRecord]) -> list[str]:
    """The images that the records name, each once, in order of appearance."""
    return list(dict.fromkeys(path for record in records for path in (record.chosen, record.rejected)))
