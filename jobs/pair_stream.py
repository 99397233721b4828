"""The training pairs as a Ray Dataset in the fit's own order: every rank gets its share of step 0, then of step 1...

A block holds consecutive pairs of one rank, all of one bucket, and blocks alternate between ranks: one of every rank,
equally long, then the next of every rank. With `preserve_order` Ray's splitter hands a block to the rank that has had
the fewest rows, the lowest rank first: exactly this alternation. So the batches are those of `training_order`, whatever
the number of workers.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import numpy
import pyarrow
import ray.data
import torch
from ray.data import DataIterator, Dataset, ExecutionOptions
from ray.train import DataConfig

from dina_rl.config import FitRun
from dina_rl.data.stores.latents import PairBatch, PairStore, PairTable
from dina_rl.data.stores.open import open_store
from dina_rl.data.stores.order import TrainingOrder, fit_order

BLOCK_BYTES = 32 * 2**20  # well below the 128 MiB at which Ray splits a block
BLOCK_PAIRS = 512


def pair_dataset(run: FitRun, directory: Path, *, first_step: int) -> Dataset:
    """Rows {step, share, pair_id, prompt, chosen, rejected} of the steps from `first_step` on; latents as tensors.

    `share` is how many rows of its step a rank gets.

    Args:
        directory: of the encoded pairs.
    """
    store = open_store(directory)
    order = fit_order(store, run.fit, seed=run.seed)
    tables = blocks(
        order, store.pairs("train"), store.latent_shapes, world_size=run.fit.num_workers, first_step=first_step
    )
    # Not from_arrow, which starts a task for every table to look at it; a real fit has 100,000 of them.
    references = ray.data.from_blocks(list(tables))
    dataset: Dataset = references.map_batches(load_latents, batch_size=None, fn_kwargs={"directory": directory})
    return dataset


def blocks(
    order: TrainingOrder,
    pairs: PairTable,
    latent_shapes: Sequence[tuple[int, int, int]],
    *,
    world_size: int,
    first_step: int,
) -> Iterator[pyarrow.Table]:
    """The rows of `pair_dataset`, latents as row numbers, in blocks as the module's docstring says.

    Args:
        latent_shapes: (C, h, w) of every bucket.
    """
    for steps in order.runs(first_step):
        shares = [order.batches[step].view(world_size, -1) for step in steps]
        index = torch.cat(shares, dim=1)  # [world_size, pairs of a rank]
        sizes = torch.tensor([share.shape[1] for share in shares])
        step = torch.tensor(steps).repeat_interleave(sizes)
        share = sizes.repeat_interleave(sizes)
        pair_bytes = 2 * 4 * math.prod(latent_shapes[order.bucket[steps.start]])
        length = max(1, min(BLOCK_PAIRS, BLOCK_BYTES // pair_bytes))
        for start in range(0, index.shape[1], length):
            part = slice(start, start + length)
            for rows in index[:, part]:
                columns = {
                    "step": step[part],
                    "share": share[part],
                    "pair_id": pairs.pair_ids[rows],
                    "prompt": pairs.prompt[rows],
                    "chosen": pairs.chosen[rows],
                    "rejected": pairs.rejected[rows],
                }
                yield pyarrow.table({name: column.numpy() for name, column in columns.items()})


def ordered() -> DataConfig:
    """Splits `pair_dataset` as the module's docstring says."""
    return DataConfig(execution_options=ExecutionOptions(preserve_order=True))


def load_latents(block: dict[str, numpy.ndarray], *, directory: Path) -> dict[str, numpy.ndarray]:
    """Ray Data task: replace row numbers by latents [n, C, h, w]."""
    store = _reader(directory)
    latents = {side: store.latents(torch.tensor(block[side])).numpy() for side in ("chosen", "rejected")}
    return block | latents


@lru_cache(maxsize=1)
def _reader(directory: Path) -> PairStore:
    """One reader per process: it keeps what it read last, and a small store whole."""
    return open_store(directory)


def pair_batches(shard: DataIterator, prompts: Sequence[str], *, first_step: int) -> Iterator[PairBatch]:
    """One rank's share of every step's batch, from `first_step` on."""
    return steps_of(shard.iter_torch_batches(batch_size=None, prefetch_batches=2), prompts, first_step=first_step)


def steps_of(
    rank_blocks: Iterable[Mapping[str, torch.Tensor]], prompts: Sequence[str], *, first_step: int
) -> Iterator[PairBatch]:
    """A rank's blocks cut and joined into its shares of step after step."""
    step, held, missing = first_step, [], 0
    for block in rank_blocks:
        start = 0
        while start < len(block["step"]):
            missing = missing or int(block["share"][start])
            part = {name: column[start : start + missing] for name, column in block.items()}
            held.append(part)
            start, missing = start + len(part["step"]), missing - len(part["step"])
            if missing:
                continue  # the rest of this share is in the next block
            rows = {name: torch.cat([part[name] for part in held]) for name in block}
            assert bool((rows["step"] == step).all()), f"step {step} got rows of {rows['step'].unique().tolist()}"
            yield PairBatch(
                pair_ids=rows["pair_id"],
                chosen=rows["chosen"],
                rejected=rows["rejected"],
                prompts=tuple(prompts[number] for number in rows["prompt"].tolist()),
            )
            step, held = step + 1, []
