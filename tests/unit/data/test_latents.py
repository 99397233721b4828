from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dina_rl.data.latents import LatentStore, StoreInfo, distinct_images, training_order
from dina_rl.data.pairs import PreferenceRecord
from dina_rl.seeding import normal

SHAPE = (2, 3, 3)
IMAGES = [f"{name}.png" for name in "abcde"]
INFO = StoreInfo(
    dataset="/data", pipeline="shapes", height=12, width=12, latent_shape=SHAPE, num_images=5, images_per_shard=2
)


def record(index: int, chosen: str, rejected: str, prompt: str = "p") -> PreferenceRecord:
    return PreferenceRecord(
        index=index, prompt=prompt, chosen=f"{chosen}.png", rejected=f"{rejected}.png", votes=None, confidence=None
    )


@pytest.fixture
def filled(tmp_path: Path) -> tuple[LatentStore, torch.Tensor]:
    latents = normal((5, *SHAPE), "store")
    latents[3] = 0
    store = LatentStore.create(tmp_path / "latents", INFO, IMAGES)
    for shard in store.missing_shards():
        rows = store.info.rows_of(shard)
        store.write_shard(shard, latents[rows.start : rows.stop], {3: "broken"} if 3 in rows else {})
    return store, latents


def test_an_image_named_twice_is_one_row() -> None:
    records = [record(0, "b", "a"), record(1, "b", "c"), record(2, "a", "c")]
    assert distinct_images(records) == ["b.png", "a.png", "c.png"]


def test_rows_come_back_in_any_order_and_repeated(filled) -> None:
    store, latents = filled
    rows = torch.tensor([4, 0, 0, 2, 1])
    assert torch.equal(store.latents(rows), latents[rows])
    assert torch.equal(LatentStore(store.directory).latents(rows), latents[rows])


def test_shards_that_are_written_are_not_missing(tmp_path: Path) -> None:
    store = LatentStore.create(tmp_path, INFO, IMAGES)
    assert store.missing_shards() == [0, 1, 2]
    store.write_shard(1, torch.zeros(2, *SHAPE), {})
    assert LatentStore.create(tmp_path, INFO, IMAGES).missing_shards() == [0, 2]


def test_unreadable_rows_keep_their_reason(filled) -> None:
    assert filled[0].unreadable() == {3: "broken"}


def test_pairs_refer_to_rows(filled) -> None:
    store, latents = filled
    assert not store.complete()
    store.write_pairs("train", [record(7, "b", "a", "x"), record(9, "c", "e", "y"), record(11, "e", "b", "x")])
    store.write_pairs("test", [record(0, "a", "c")])
    assert store.complete()
    table = LatentStore(store.directory).pairs("train")
    assert (len(table), table.prompts) == (3, ("x", "y"))
    batch = store.batch(table, torch.tensor([2, 0]))
    assert batch.pair_ids.tolist() == [11, 7]
    assert batch.prompts == ("x", "x")
    assert torch.equal(batch.chosen, latents[[4, 1]])
    assert torch.equal(batch.rejected, latents[[1, 0]])


@pytest.mark.parametrize(
    ("info", "images"),
    [(replace(INFO, height=24), IMAGES), (INFO, IMAGES[::-1]), (replace(INFO, pipeline="x"), IMAGES)],
)
def test_latents_of_something_else_are_refused(filled, info: StoreInfo, images: list[str]) -> None:
    with pytest.raises(ValueError, match="other images"):
        LatentStore.create(filled[0].directory, info, images)


def test_no_store(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        LatentStore(tmp_path)


def test_every_epoch_visits_every_pair_once_in_another_order() -> None:
    order = training_order(12, steps=6, batch_size=4, seed=0)
    assert order.shape == (6, 4)
    first, second = order.flatten().split(12)
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(12))
    assert first.tolist() != second.tolist()
    assert torch.equal(order, training_order(12, steps=6, batch_size=4, seed=0))
    assert not torch.equal(order, training_order(12, steps=6, batch_size=4, seed=1))


def test_order_is_a_prefix_of_a_longer_one_and_serves_small_sets() -> None:
    assert torch.equal(
        training_order(10, steps=3, batch_size=4, seed=0), training_order(10, steps=9, batch_size=4, seed=0)[:3]
    )
    assert training_order(3, steps=2, batch_size=8, seed=0).shape == (2, 8)
