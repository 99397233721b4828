"""The training pairs as a Ray Dataset in the fit's own order: every rank gets its share of step 0, then of step 1...

A row is a unit (a pair, or a group of pairs), with the latents of its images. A block holds consecutive units of one
rank, all of one bucket, and blocks alternate between ranks: one of every rank, equally long, then the next of every
rank. With `preserve_order` Ray's splitter hands a block to the rank that has had the fewest rows, the lowest rank
first: exactly this alternation. So the batches are those of `training_order`, whatever the number of workers.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy
import pyarrow
import ray.data
import torch
from ray.data import DataIterator, Dataset, ExecutionOptions
from ray.train import DataConfig

from dina_rl.config import FitRun
from dina_rl.data.stores.latents import PairStore, PairTable
from dina_rl.data.stores.open import open_store
from dina_rl.data.stores.order import TrainingOrder, fit_order
from dina_rl.data.stores.units import GROUP_IMAGES, TrainingBatch, Unit, Units, fit_units, layout, training_batch
from jobs.told import FATAL, NOTHING, check_told, told

BLOCK_BYTES = 32 * 2**20  # well below the 128 MiB at which Ray splits a block
BLOCK_UNITS = 512
_PLACES = pyarrow.list_(pyarrow.int64())
_PLAN = pyarrow.schema(
    [
        ("step", pyarrow.int64()),
        ("share", pyarrow.int64()),
        ("step_pairs", pyarrow.int64()),
        ("key", pyarrow.int64()),
        ("prompt", pyarrow.int64()),
        ("rows", _PLACES),
        ("chosen", _PLACES),
        ("rejected", _PLACES),
        ("probability", pyarrow.list_(pyarrow.float64())),
    ]
)


def pair_dataset(run: FitRun, directory: Path, *, first_step: int) -> Dataset:
    """Rows {step, share, step_pairs, key, prompt, latents, shape, chosen, rejected, probability}, from `first_step` on.

    `share` is how many rows of its step a rank gets, `step_pairs` how many pairs all ranks get. Where a row's latents
    cannot be read it says so (`told`).

    Args:
        directory: of the encoded pairs.
    """
    store = open_store(directory)
    pairs = store.pairs("train")
    units = fit_units(pairs, run.fit.batch_of)
    order = fit_order(units, store.latent_shapes, run.fit, seed=run.seed)
    tables = blocks(order, units, pairs, store.latent_shapes, world_size=run.fit.num_workers, first_step=first_step)
    # Not from_arrow, which starts a task for every table to look at it; a real fit has 100,000 of them.
    references = ray.data.from_blocks(list(tables))
    dataset: Dataset = references.map_batches(
        load_latents, batch_size=None, batch_format="pyarrow", fn_kwargs={"directory": directory}
    )
    return dataset


def blocks(
    order: TrainingOrder,
    units: Units,
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
    sizes = units.sizes()
    for steps in order.runs(first_step):
        shares = [order.batches[step].view(world_size, -1) for step in steps]
        numbers = torch.cat(shares, dim=1)  # [world_size, units of a rank]
        share = torch.tensor([each.shape[1] for each in shares])
        of_step = {
            "step": torch.tensor(steps).repeat_interleave(share),
            "share": share.repeat_interleave(share),
            "step_pairs": torch.tensor([int(sizes[each].sum()) for each in shares]).repeat_interleave(share),
        }
        latent_bytes = 4 * math.prod(latent_shapes[order.bucket[steps.start]])
        images = min(2 * int(sizes[numbers].max()), GROUP_IMAGES)  # of a unit at most
        length = max(1, min(BLOCK_UNITS, BLOCK_BYTES // (images * latent_bytes)))
        for start in range(0, numbers.shape[1], length):
            part = slice(start, start + length)
            for of_rank in numbers[:, part]:
                layouts = [asdict(layout(pairs, units, unit)) for unit in of_rank.tolist()]
                columns = {name: column[part].tolist() for name, column in of_step.items()}
                columns |= {name: [each[name] for each in layouts] for name in _PLAN.names if name not in columns}
                yield pyarrow.table(columns, schema=_PLAN)


def ordered() -> DataConfig:
    """Splits `pair_dataset` as the module's docstring says."""
    return DataConfig(execution_options=ExecutionOptions(preserve_order=True))


def load_latents(block: pyarrow.Table, *, directory: Path) -> pyarrow.Table:
    """Ray Data task: replace row numbers by the bytes of fp32 latents, and the shape [n, C, h, w] of a unit's."""
    rows = block.column("rows").to_pylist()
    shapes: list[list[int] | None] = [None] * len(rows)
    content: list[bytes | None] = [None] * len(rows)
    trouble = NOTHING
    try:
        latents = _reader(directory).latents(torch.tensor([row for unit in rows for row in unit]))
    except FATAL as error:
        trouble = told(error)
    else:
        parts = latents.split([len(unit) for unit in rows])
        shapes = [list(part.shape) for part in parts]
        content = [part.numpy().tobytes() for part in parts]
    columns = {
        "shape": pyarrow.array(shapes, _PLACES),
        "latents": pyarrow.array(content, pyarrow.large_binary()),
        "failed": pyarrow.array([trouble["failed"]] * len(rows), pyarrow.string()),
        "number": pyarrow.array([trouble["number"]] * len(rows), pyarrow.int64()),
    }
    block = block.drop_columns(["rows"])
    for name, column in columns.items():
        block = block.append_column(name, column)
    return block


@lru_cache(maxsize=1)
def _reader(directory: Path) -> PairStore:
    """One reader per process: it keeps what it read last, and a small store whole."""
    return open_store(directory)


def pair_batches(shard: DataIterator, prompts: Sequence[str], *, first_step: int) -> Iterator[TrainingBatch]:
    """One rank's share of every step's batch, from `first_step` on. Raises as `steps_of`."""
    # Whole blocks; Ray's annotation forgets None, its documentation does not.
    tables = shard.iter_batches(batch_size=None, prefetch_batches=2, batch_format="pyarrow")  # type: ignore[arg-type]
    return steps_of(tables, prompts, first_step=first_step)


def steps_of(
    rank_blocks: Iterable[pyarrow.Table], prompts: Sequence[str], *, first_step: int
) -> Iterator[TrainingBatch]:
    """A rank's blocks cut and joined into its shares of step after step.

    Raises:
        BadInput: latents are broken, or not there any more.
        StorageFailed: they cannot be read now.
    """
    step, held = first_step, []
    for block in rank_blocks:
        for row in block.to_pylist():
            check_told(row)
            assert row["step"] == step, f"step {step} got a row of step {row['step']}"
            held.append(_unit(row, prompts))
            if len(held) == row["share"]:
                yield training_batch(held, step_pairs=row["step_pairs"])
                step, held = step + 1, []


def _unit(row: dict[str, Any], prompts: Sequence[str]) -> Unit:
    latents = numpy.frombuffer(row["latents"], numpy.float32).reshape(row["shape"])
    return Unit(
        key=row["key"],
        prompt=prompts[row["prompt"]],
        latents=torch.from_numpy(latents.copy()),
        chosen=tuple(row["chosen"]),
        rejected=tuple(row["rejected"]),
        probability=None if row["probability"] is None else tuple(row["probability"]),
    )
