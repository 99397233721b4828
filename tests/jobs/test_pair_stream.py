"""The pair stream's blocks, handed to ranks by Ray's rule and joined again, are the plain loop's batches."""

import pytest
import torch

from dina_rl.config import FitConfig
from dina_rl.data.stores.latents import LatentStore
from dina_rl.data.stores.order import fit_order
from jobs import pair_stream
from tests.tiny_reward import write_store

SEED = 0


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> LatentStore:
    return write_store(tmp_path_factory.mktemp("store") / "train", "shapes", train=(12, 20), test=(1, 1))


def split(tables: list, ranks: int) -> list[list[dict[str, torch.Tensor]]]:
    """Ray's splitter under `preserve_order`: a block goes to the rank with the fewest rows so far, the lowest first."""
    shards: list[list[dict[str, torch.Tensor]]] = [[] for _ in range(ranks)]
    given = [0] * ranks
    for table in tables:
        rank = given.index(min(given))
        given[rank] += len(table)
        shards[rank].append({name: torch.tensor(table.column(name).to_numpy()) for name in table.column_names})
    return shards


@pytest.mark.parametrize("block_pairs", [1, 3, 512])
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("first_step", [0, 7])
def test_ranks_together_see_every_steps_batch(
    store: LatentStore, monkeypatch: pytest.MonkeyPatch, block_pairs: int, ranks: int, first_step: int
) -> None:
    monkeypatch.setattr(pair_stream, "BLOCK_PAIRS", block_pairs)
    config = FitConfig(steps=20, batch_size=4, num_workers=ranks, bucket_batch="tokens")
    order, pairs = fit_order(store, config, seed=SEED), store.pairs("train")
    tables = list(pair_stream.blocks(order, pairs, store.latent_shapes, world_size=ranks, first_step=first_step))
    assert all(len(table) <= block_pairs for table in tables)
    loaded = [
        [block | {side: store.latents(block[side]) for side in ("chosen", "rejected")} for block in shard]
        for shard in split(tables, ranks)
    ]
    steps = [list(pair_stream.steps_of(shard, pairs.prompts, first_step=first_step)) for shard in loaded]
    assert [len(batches) for batches in steps] == [20 - first_step] * ranks
    sizes = set()
    for number, parts in enumerate(zip(*steps, strict=True), start=first_step):
        expected = store.batch(pairs, order.batches[number])
        assert torch.equal(torch.cat([part.pair_ids for part in parts]), expected.pair_ids)
        assert torch.equal(torch.cat([part.chosen for part in parts]), expected.chosen)
        assert torch.equal(torch.cat([part.rejected for part in parts]), expected.rejected)
        assert sum((part.prompts for part in parts), ()) == expected.prompts
        sizes.add(len(expected))
    assert sizes == {4, 8}


def test_rows_of_another_step_are_noticed(store: LatentStore) -> None:
    config = FitConfig(steps=4, batch_size=4, num_workers=1)
    order, pairs = fit_order(store, config, seed=SEED), store.pairs("train")
    tables = list(pair_stream.blocks(order, pairs, store.latent_shapes, world_size=1, first_step=1))
    with pytest.raises(AssertionError, match="step 0 got rows of"):
        list(pair_stream.steps_of(split(tables, 1)[0], pairs.prompts, first_step=0))
