import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pyarrow import parquet

from dina_rl.data.stores.latents import ROW_GROUP_BYTES, LatentStore, StoredPair, StoreInfo
from dina_rl.seeding import normal

SHAPES = ((2, 3, 3), (2, 2, 5))
IMAGES = [f"{name}.png" for name in "abcdefgh"]
INFO = StoreInfo(
    dataset="/data",
    pipeline="shapes",
    buckets=((12, 12), (8, 20)),
    latent_shapes=SHAPES,
    rows=(5, 3),
    rows_per_shard=2,
)


def pair(pair_id: int, chosen: int, rejected: int, prompt: str = "p") -> StoredPair:
    return StoredPair(pair_id=pair_id, chosen=chosen, rejected=rejected, prompt=prompt)


def fill(store: LatentStore, latents: list[torch.Tensor], unreadable: dict[int, str]) -> None:
    for number in store.missing_shards():
        bucket, rows = store.info.shard(number)
        first = sum(store.info.rows[:bucket])
        part = latents[bucket][rows.start - first : rows.stop - first]
        store.write_shard(number, part, {row: reason for row, reason in unreadable.items() if row in rows})


@pytest.fixture
def filled(tmp_path: Path) -> tuple[LatentStore, list[torch.Tensor]]:
    latents = [normal((5, *SHAPES[0]), "first bucket"), normal((3, *SHAPES[1]), "second bucket")]
    latents[0][3] = 0
    store = LatentStore.create(tmp_path / "latents", INFO, IMAGES)
    fill(store, latents, {3: "broken"})
    return store, latents


def test_a_store_is_the_same_wherever_pipeline_and_images_lie() -> None:
    known = replace(INFO, vae="v", pictures="upright")
    assert known.same_latents(replace(known, dataset="elsewhere", pipeline="elsewhere"))
    assert not known.same_latents(replace(known, vae="w"))
    assert not known.same_latents(replace(known, pictures="as stored"))
    assert not known.same_latents(replace(known, rows=tuple(rows + 1 for rows in known.rows)))
    assert INFO.same_latents(known), "an older store says neither"
    assert not INFO.same_latents(replace(known, pipeline="elsewhere"))


def test_a_shard_holds_rows_of_one_bucket() -> None:
    shards = [INFO.shard(number) for number in range(INFO.num_shards)]
    assert shards == [(0, range(0, 2)), (0, range(2, 4)), (0, range(4, 5)), (1, range(5, 7)), (1, range(7, 8))]
    found = [INFO.shard_of(row) for row in range(INFO.num_rows)]
    assert found == [(n, row - rows.start) for n, (_, rows) in enumerate(shards) for row in rows]
    assert INFO.bucket_of(torch.arange(8)).tolist() == [0] * 5 + [1] * 3


def test_a_bucket_may_be_empty() -> None:
    info = replace(INFO, rows=(0, 3))
    assert [info.shard(number) for number in range(info.num_shards)] == [(1, range(0, 2)), (1, range(2, 3))]
    assert info.shard_of(2) == (1, 0)
    assert info.bucket_of(torch.tensor([0, 2])).tolist() == [1, 1]


def test_a_latent_that_is_not_finite_is_unreadable(tmp_path: Path) -> None:
    """Also one that only the store's precision overflows, and whatever else is wrong with the row stays its reason."""
    info = replace(INFO, buckets=((12, 12),), latent_shapes=SHAPES[:1], rows=(5,), rows_per_shard=5, dtype="bfloat16")
    latents = normal((5, *SHAPES[0]), "spoilt")
    for row, value in ((1, float("nan")), (2, torch.finfo(torch.float32).max), (4, float("-inf"))):
        latents[row, 1, 2, 0] = value
    given = latents.clone()
    store = LatentStore.create(tmp_path / "latents", info, IMAGES[:5])
    store.write_shard(0, latents, {4: "broken"})
    assert store.unreadable() == {1: "the latent is not finite", 2: "the latent is not finite", 4: "broken"}
    stored = store.latents(torch.arange(5))
    assert torch.equal(stored[[0, 3]], latents[[0, 3]].bfloat16().float())
    assert not stored[[1, 2, 4]].any()
    assert torch.equal(latents.nan_to_num(), given.nan_to_num())


def test_rows_come_back_in_any_order_and_repeated(filled) -> None:
    store, latents = filled
    rows = torch.tensor([4, 0, 0, 2, 1])
    assert torch.equal(store.latents(rows), latents[0][rows])
    assert torch.equal(LatentStore(store.directory).latents(rows), latents[0][rows])
    assert torch.equal(store.latents(torch.tensor([7, 5])), latents[1][[2, 0]])


def test_a_store_travels_as_its_directory(filled) -> None:
    store, latents = filled
    store.latents(torch.tensor([0]))
    assert torch.equal(pickle.loads(pickle.dumps(store)).latents(torch.tensor([0])), latents[0][:1])


def test_rows_of_two_buckets_are_no_batch(filled) -> None:
    store, _ = filled
    store.write_pairs("train", [pair(0, 0, 1), pair(1, 5, 6)])
    with pytest.raises(AssertionError, match="one bucket"):
        store.batch(store.pairs("train"), torch.tensor([0, 1]))
    with pytest.raises(AssertionError, match="one bucket"):
        store.latents(torch.tensor([0, 5]))


def test_row_groups_are_small_and_bfloat16_is_read_as_fp32(tmp_path: Path) -> None:
    shape = (16, 64, 128)  # 256 KiB in bfloat16
    info = replace(INFO, buckets=((8, 8),), latent_shapes=(shape,), rows=(10,), rows_per_shard=10, dtype="bfloat16")
    store = LatentStore.create(tmp_path, info, [str(row) for row in range(10)])
    latents = normal((10, *shape), "large")
    store.write_shard(0, latents, {})
    with parquet.ParquetFile(tmp_path / "shard-00000.parquet") as file:
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        assert file.metadata.row_group(0).column(0).compression == "ZSTD"
        assert file.metadata.row_group(0).total_byte_size <= 1.01 * ROW_GROUP_BYTES
    assert sizes == [4, 4, 2]
    rows = torch.tensor([9, 3])
    assert store.latents(rows).dtype == torch.float32
    assert torch.equal(store.latents(rows), latents[rows].bfloat16().float())


def test_shards_that_are_written_are_not_missing(tmp_path: Path) -> None:
    store = LatentStore.create(tmp_path, INFO, IMAGES)
    assert store.missing_shards() == [0, 1, 2, 3, 4]
    store.write_shard(1, torch.zeros(2, *SHAPES[0]), {})
    assert LatentStore.create(tmp_path, INFO, IMAGES).missing_shards() == [0, 2, 3, 4]


def test_nothing_half_written_is_left(tmp_path: Path) -> None:
    store = LatentStore.create(tmp_path, INFO, IMAGES)

    def breaking():
        yield pair(0, 0, 1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.write_pairs("train", breaking())
    assert sorted(file.name for file in tmp_path.iterdir()) == ["rows.parquet", "store.json"]


def test_images_of_consecutive_rows(tmp_path: Path) -> None:
    names = [f"{row}.png" for row in range(10_000)]
    store = LatentStore.create(tmp_path, replace(INFO, rows=(10_000, 0), rows_per_shard=500), iter(names))
    for rows in (range(0, 3), range(4090, 4100), range(9_500, 10_000)):
        assert store.images_of(rows) == names[rows.start : rows.stop]
    assert store.images == names


def test_unreadable_rows_keep_their_reason(filled) -> None:
    assert filled[0].unreadable() == {3: "broken"}


def test_pairs_refer_to_rows(filled) -> None:
    store, latents = filled
    assert not store.complete()
    store.write_pairs("train", [pair(7, 1, 0, "x"), pair(9, 7, 6, "y"), pair(11, 4, 1, "x")])
    store.write_pairs("test", [pair(0, 0, 2)])
    assert store.complete()
    table = LatentStore(store.directory).pairs("train")
    assert (len(table), table.prompts, table.bucket.tolist()) == (3, ("x", "y"), [0, 1, 0])
    batch = store.batch(table, torch.tensor([2, 0]))
    assert batch.pair_ids.tolist() == [11, 7]
    assert batch.prompts == ("x", "x")
    assert torch.equal(batch.chosen, latents[0][[4, 1]])
    assert torch.equal(batch.rejected, latents[0][[1, 0]])


@pytest.mark.parametrize(
    ("info", "images"),
    [
        (replace(INFO, buckets=((24, 24), (8, 20))), IMAGES),
        (INFO, IMAGES[::-1]),
        (INFO, [*IMAGES, "more"]),
        (replace(INFO, pipeline="x"), IMAGES),
    ],
)
def test_latents_of_something_else_are_refused(filled, info: StoreInfo, images: list[str]) -> None:
    with pytest.raises(ValueError, match="other images"):
        LatentStore.create(filled[0].directory, info, images)


def test_no_store(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        LatentStore(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"buckets": []}'])
def test_a_broken_description_names_its_file(tmp_path: Path, content: str) -> None:
    (tmp_path / "store.json").write_text(content)
    with pytest.raises(ValueError, match="store.json does not describe a latent store of this format"):
        LatentStore(tmp_path)


def test_probabilities_of_pairs_come_back(filled) -> None:
    store, _ = filled
    store.write_pairs("train", [pair(0, 0, 1), replace(pair(1, 5, 6), probability=0.75)])
    store.write_pairs("test", [pair(0, 0, 1)])
    told = store.pairs("train").probability
    assert told is not None
    assert told.isnan().tolist() == [True, False]
    assert told[1].item() == 0.75
    assert store.pairs("test").probability is None


def test_pairs_of_an_older_store_have_no_probability(filled) -> None:
    store, _ = filled
    store.write_pairs("train", [replace(pair(0, 0, 1), probability=0.75)])
    file = store.directory / "pairs-train.parquet"
    parquet.write_table(parquet.read_table(file).drop_columns(["probability"]), file)
    assert store.pairs("train").probability is None
