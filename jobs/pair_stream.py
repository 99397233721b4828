"""The training pairs as a Ray Dataset in the fit's own order: every rank gets its share of step 0, then of step 1...

A block holds one rank's share of several consecutive steps, and blocks alternate between ranks. With `preserve_order`
Ray's splitter hands a block to the rank that has had the fewest rows, the lowest rank first: exactly this alternation.
So the batches are those of `training_order`, whatever the number of workers.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy
import pyarrow
import ray.data
import torch
from ray.data import DataIterator, Dataset, ExecutionOptions
from ray.train import DataConfig

from dina_rl.data.latents import LatentStore, training_order
from dina_rl.data.pairs import PairBatch

BLOCK_BYTES = 32 * 2**20  # well below the 128 MiB at which Ray splits a block
BLOCK_STEPS = 16


def pair_dataset(directory: Path, *, first_step: int, steps: int, batch_size: int, ranks: int, seed: int) -> Dataset:
    """Rows {step, pair_id, prompt, chosen, rejected} of the steps from `first_step` on.

    Args:
        directory: the latent store.
        steps: of the whole fit.
        batch_size: pairs per step over all `ranks`.
    """
    store = LatentStore(directory)
    pairs = store.pairs("train")
    order = training_order(len(pairs), steps=steps, batch_size=batch_size, seed=seed)
    share = batch_size // ranks
    pair_bytes = 2 * 4 * int(numpy.prod(store.latent_shapes[0]))
    block_steps = max(1, min(BLOCK_STEPS, BLOCK_BYTES // (share * pair_bytes)))
    tables = []
    for start in range(first_step, steps, block_steps):
        for rank in range(ranks):
            index = order[start : start + block_steps, rank * share : (rank + 1) * share]
            step = torch.arange(start, start + len(index)).repeat_interleave(share)
            index = index.flatten()
            columns = {
                "step": step,
                "pair_id": pairs.pair_ids[index],
                "prompt": pairs.prompt[index],
                "chosen": pairs.chosen[index],
                "rejected": pairs.rejected[index],
            }
            tables.append(pyarrow.table({name: column.numpy() for name, column in columns.items()}))
    references = ray.data.from_arrow(tables)
    return references.map_batches(load_latents, batch_size=None, fn_kwargs={"directory": directory})


def ordered() -> DataConfig:
    """Splits `pair_dataset` as the module's docstring says."""
    return DataConfig(execution_options=ExecutionOptions(preserve_order=True))


def load_latents(block: dict[str, numpy.ndarray], *, directory: Path) -> dict[str, numpy.ndarray]:
    """Ray Data task: replace row numbers by latents [n, C, h, w]."""
    store = LatentStore(directory)
    latents = {side: store.latents(torch.tensor(block[side])).numpy() for side in ("chosen", "rejected")}
    return block | latents


def pair_batches(shard: DataIterator, prompts: tuple[str, ...], *, first_step: int, share: int) -> Iterator[PairBatch]:
    """One rank's share of every step's batch, from `first_step` on."""
    for step, rows in enumerate(shard.iter_torch_batches(batch_size=share, prefetch_batches=2), start=first_step):
        assert bool((rows["step"] == step).all()), f"expected rows of step {step}, got {rows['step'].unique().tolist()}"
        yield PairBatch(
            pair_ids=rows["pair_id"],
            chosen=rows["chosen"],
            rejected=rows["rejected"],
            prompts=tuple(prompts[number] for number in rows["prompt"].tolist()),
        )
