"""The pair stream's blocks, handed to ranks by Ray's rule and joined again, are the plain loop's batches."""

import pyarrow
import pytest
import torch

from dina_rl.config import FitConfig
from dina_rl.data.stores.latents import LatentStore, StoredPair
from dina_rl.data.stores.order import fit_order
from dina_rl.data.stores.units import fit_units, read_units
from dina_rl.errors import BadInput
from jobs import pair_stream
from tests.tiny_reward import PROMPTS, write_store

SEED = 0
COMPARED = ((0, 1), (1, 2), (2, 0), (3, 0))  # 4 images of a prompt


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> LatentStore:
    """Rows in fours, of which `COMPARED` are pairs: 5 groups of the first size, 10 of the second."""
    store = write_store(tmp_path_factory.mktemp("store") / "train", "shapes", train=(10, 20), test=(1, 1))
    firsts = [*range(0, 20, 4), *range(22, 62, 4)]
    pairs = [(first + a, first + b, PROMPTS[number % 3]) for number, first in enumerate(firsts) for a, b in COMPARED]
    store.write_pairs(
        "train",
        (StoredPair(pair_id=7 * n, chosen=a, rejected=b, prompt=prompt) for n, (a, b, prompt) in enumerate(pairs)),
    )
    return store


def split(tables: list[pyarrow.Table], ranks: int) -> list[list[pyarrow.Table]]:
    """Ray's splitter under `preserve_order`: a block goes to the rank with the fewest rows so far, the lowest first."""
    shards: list[list[pyarrow.Table]] = [[] for _ in range(ranks)]
    given = [0] * ranks
    for table in tables:
        rank = given.index(min(given))
        given[rank] += len(table)
        shards[rank].append(table)
    return shards


@pytest.mark.parametrize("batch_of", ["pairs", "groups"])
@pytest.mark.parametrize("block_units", [1, 3, 512])
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("first_step", [0, 7])
def test_ranks_together_see_every_steps_batch(
    store: LatentStore, monkeypatch: pytest.MonkeyPatch, batch_of: str, block_units: int, ranks: int, first_step: int
) -> None:
    monkeypatch.setattr(pair_stream, "BLOCK_UNITS", block_units)
    config = FitConfig(steps=20, batch_size=4, num_workers=ranks, bucket_batch="tokens", batch_of=batch_of)
    pairs = store.pairs("train")
    units = fit_units(pairs, batch_of)
    order = fit_order(units, store.latent_shapes, config, seed=SEED)
    tables = list(pair_stream.blocks(order, units, pairs, store.latent_shapes, world_size=ranks, first_step=first_step))
    assert all(len(table) <= block_units for table in tables)
    loaded = [
        [pair_stream.load_latents(block, directory=store.directory) for block in shard]
        for shard in split(tables, ranks)
    ]
    steps = [list(pair_stream.steps_of(shard, pairs.prompts, first_step=first_step)) for shard in loaded]
    assert [len(batches) for batches in steps] == [20 - first_step] * ranks
    sizes = set()
    for number, parts in enumerate(zip(*steps, strict=True), start=first_step):
        expected = read_units(store, pairs, units, order.batches[number])
        assert sum((part.keys for part in parts), ()) == expected.keys
        assert sum((part.prompts for part in parts), ()) == expected.prompts
        for side in ("chosen", "rejected"):
            seen = torch.cat([part.latents[getattr(part, side)] for part in parts])
            assert torch.equal(seen, expected.latents[getattr(expected, side)])
        assert sum(len(part.latents) for part in parts) == len(expected.latents)
        assert {part.step_pairs for part in parts} == {len(expected)}
        sizes.add(len(expected))
    assert sizes == ({4, 8} if batch_of == "pairs" else {16, 32})


@pytest.mark.parametrize("gone", [False, True])
def test_a_broken_shard_is_told_in_the_rows(tmp_path, gone: bool) -> None:
    """A task that raised it would end the fit in Ray Data's traceback."""
    store = write_store(tmp_path / "store", "shapes", train=(10, 20), test=(1, 1))
    shard = store.directory / "shard-00000.parquet"
    if gone:
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:-5])
    config = FitConfig(steps=20, batch_size=4, num_workers=1)
    pairs = store.pairs("train")
    units = fit_units(pairs, "pairs")
    order = fit_order(units, store.latent_shapes, config, seed=SEED)
    tables = pair_stream.blocks(order, units, pairs, store.latent_shapes, world_size=1, first_step=0)
    loaded = [pair_stream.load_latents(block, directory=store.directory) for block in tables]
    assert all(block.schema == loaded[0].schema for block in loaded)
    told = [block for block in loaded if block.column("failed")[0].as_py()]
    assert 0 < len(told) < len(loaded), "only of those that read it"
    assert all(block.column("latents").null_count == len(block) for block in told)
    with pytest.raises(BadInput, match=rf"{shard} .*jobs.encode --resume makes it again"):
        list(pair_stream.steps_of(loaded, pairs.prompts, first_step=0))


def test_rows_of_another_step_are_noticed(store: LatentStore) -> None:
    config = FitConfig(steps=4, batch_size=4, num_workers=1)
    pairs = store.pairs("train")
    units = fit_units(pairs, "pairs")
    order = fit_order(units, store.latent_shapes, config, seed=SEED)
    tables = list(pair_stream.blocks(order, units, pairs, store.latent_shapes, world_size=1, first_step=1))
    loaded = [pair_stream.load_latents(table, directory=store.directory) for table in tables]
    with pytest.raises(AssertionError, match="step 0 got a row of"):
        list(pair_stream.steps_of(loaded, pairs.prompts, first_step=0))
