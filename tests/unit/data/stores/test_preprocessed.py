"""The authors' preprocessed files, in their layout."""

import io
import pickle
from pathlib import Path

import numpy
import pyarrow
import pytest
import torch
from pyarrow import parquet

from dina_rl.config import DatasetConfig, FitRun, PipelineConfig
from dina_rl.data.copy import copy_latents
from dina_rl.data.encode import measure_images
from dina_rl.data.filters import bucketing
from dina_rl.data.plan import EncodePlan
from dina_rl.data.sets.records import PreferenceRecord, SkippedRecord
from dina_rl.data.sets.registry import open_set
from dina_rl.data.stores.latents import LatentStore, StoreInfo
from dina_rl.data.stores.open import open_store
from dina_rl.data.stores.preprocessed import PreprocessedStore, read_latent
from dina_rl.reward.inputs import unseen_pairs
from tests.tiny_preprocessed import DETAILS, SHAPES, latent, npy, write_part


@pytest.fixture
def store(tmp_path: Path) -> PreprocessedStore:
    write_part(tmp_path / "part_rank00.parquet", range(0, 7))
    write_part(tmp_path / "part_rank01.parquet", range(7, 12))
    write_part(tmp_path / "test" / "part_rank00.parquet", range(20, 24))
    return open_store(tmp_path)


def test_buckets_are_the_shapes_that_occur(store: PreprocessedStore) -> None:
    assert store.latent_shapes == ((16, 2, 6), (16, 4, 4))
    assert store.buckets == ((16, 48), (32, 32))


def test_latent1_is_the_preferred_image(store: PreprocessedStore) -> None:
    table = store.pairs("train")
    assert table.pair_ids.tolist() == list(range(12))
    assert table.bucket.tolist() == [1, 0] * 6
    batch = store.batch(table, torch.tensor([10, 0, 6, 0]))
    assert batch.prompts == ("prompt 1", "prompt 0", "prompt 0", "prompt 0")
    for position, pair in enumerate((10, 0, 6, 0)):
        assert numpy.array_equal(batch.chosen[position].numpy(), latent(pair, 1))
        assert numpy.array_equal(batch.rejected[position].numpy(), latent(pair, 2))
    with pytest.raises(AssertionError, match="one bucket"):
        store.batch(table, torch.tensor([0, 1]))


def test_the_held_out_split_is_a_folder(store: PreprocessedStore) -> None:
    table = store.pairs("test")
    assert table.pair_ids.tolist() == [0, 1, 2, 3]
    batch = store.batch(table, torch.tensor([3, 1]))
    assert numpy.array_equal(batch.rejected[0].numpy(), latent(23, 2))
    again = pickle.loads(pickle.dumps(store))
    assert torch.equal(again.batch(again.pairs("test"), torch.tensor([3, 1])).chosen, batch.chosen)


def test_a_set_without_held_out_pairs(tmp_path: Path) -> None:
    write_part(tmp_path / "part_rank00.parquet", range(2))
    assert len(open_store(tmp_path).pairs("test")) == 0


def test_pairs_of_two_shapes_are_left_out(tmp_path: Path) -> None:
    shapes = [[16, 4, 4], [16, 2, 2], [16, 4, 4], [16, None, 6], [16, 4, 4]]
    write_part(tmp_path / "part_rank00.parquet", range(5), latent2_shape=shapes)
    store = open_store(tmp_path)
    assert store.pairs("train").pair_ids.tolist() == [0, 2, 4]
    assert (store.left_out("train"), store.left_out("test")) == (2, 0)
    write_part(tmp_path / "other" / "test" / "part_rank00.parquet", range(1, 4), latent2_shape=[[16, 4, 4]] * 3)
    run = FitRun(latents=tmp_path, fit={"steps": 3, "batch_size": 2, "held_out": {"other": str(tmp_path / "other")}})
    reason = "are left out: their latents differ in shape"
    assert unseen_pairs(run, store) == [
        f"2 train pairs of {tmp_path} {reason}",
        f"2 test pairs of {tmp_path / 'other'} {reason}",
    ]


def test_nothing_is_unpickled_or_executed(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    numpy.save(buffer, numpy.array([print], dtype=object), allow_pickle=True)
    write_part(
        tmp_path / "part_rank00.parquet", range(1), latent1=[buffer.getvalue()], detailed_results=["__import__('os')"]
    )
    store = open_store(tmp_path)
    with pytest.raises(ValueError, match="unreadable latent: object of shape"):
        store.latents(torch.tensor([0]))
    (record,) = open_set("preprocessed", tmp_path).records("train")
    assert isinstance(record, SkippedRecord)
    assert "malformed node" in record.reason


def npy_header(**values: object) -> bytes:
    """A .npy file of a header and 100 bytes."""
    buffer = io.BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": SHAPES[0]}
    numpy.lib.format.write_array_header_1_0(buffer, header | values)
    return buffer.getvalue() + bytes(100)


def test_a_rotten_latent_costs_no_memory_and_says_why() -> None:
    huge = (16, 10**6, 10**6)
    for content, shape, reason in (
        (npy_header(shape=huge), SHAPES[0], "float32 of shape .16, 1000000, 1000000., not floats of shape .16, 4, 4."),
        (npy_header(shape=huge), huge, "bytes are too few for float32"),
        (npy_header(), SHAPES[0], "bytes are too few for float32"),
        (npy_header(descr="<i4"), SHAPES[0], "int32 of shape"),
        (npy_header(descr="|O"), SHAPES[0], "object of shape"),
        (npy(latent(0, 1)).replace(b"{'descr'", b"{('descr'"), SHAPES[0], "header"),
        (npy(latent(0, 1)).replace(b"'shape'", b"'(ape' "), SHAPES[0], "header|Header"),
        (npy(latent(0, 1))[:20], SHAPES[0], "EOF"),
        (b"\x93NUMPY\x03\x00", SHAPES[0], "format .3, 0."),
        (b"", SHAPES[0], "EOF"),
        (None, SHAPES[0], "the cell holds None"),
    ):
        with pytest.raises(ValueError, match=f"unreadable latent: .*({reason})"):
            read_latent(content, shape)


@pytest.mark.parametrize("dtype", ["<f2", ">f4", "<f8", numpy.longdouble])
def test_a_latent_is_read_as_float32(dtype: str) -> None:
    array = latent(0, 1).astype(numpy.float16)
    assert numpy.array_equal(read_latent(npy(array.astype(dtype)), SHAPES[0]).numpy(), array.astype(numpy.float32))


def test_rotten_cells_are_listed(tmp_path: Path) -> None:
    details = [str(DETAILS | {"confidence": value}) for value in (0.9, "0.9", 1.5, None, [0.9])]
    shapes = [[16, None, 4], None, [16, 4], [16, -4, 4], [16, 4, 4]]
    write_part(tmp_path / "part_rank00.parquet", range(5), detailed_results=details, latent1_shape=shapes)
    source = open_set("preprocessed", tmp_path)
    records = list(source.records("train"))
    assert [isinstance(record, SkippedRecord) for record in records] == [False, True, True, False, True]
    assert [record.confidence for record in records if isinstance(record, PreferenceRecord)] == [0.9, None]
    sizes = measure_images(source, [f"part_rank00.parquet#{row // 3}/{row % 3}/latent1" for row in range(5)])
    assert all("the shape of a latent must be" in problem for problem in sizes[:4])
    assert sizes[4] == (32, 32)


def voted(chosen: int, rejected: int) -> str:
    return str(DETAILS | {"votes_chosen": chosen, "votes_rejected": rejected})


def test_the_copy_is_filtered_and_holds_the_same_latents(tmp_path: Path) -> None:
    """What passes the filters, by bucket; a latent that is unreadable or no number drops its pair."""
    votes = [voted(9, 1), voted(0, 0), voted(5, 5), *[voted(9, 1)] * 4]
    write_part(tmp_path / "part_rank00.parquet", range(7), detailed_results=votes)
    broken = [npy(latent(pair, 1)) for pair in range(7, 12)]
    broken[1] = broken[1][:-4]
    broken[3] = npy(latent(10, 1) * numpy.float32("nan"))
    write_part(tmp_path / "part_rank01.parquet", range(7, 12), latent1=broken, detailed_results=["{"] + votes[3:])
    source = open_set("preprocessed", tmp_path)
    dataset = DatasetConfig(kind="preprocessed", buckets=[[32, 32], [16, 48]], filter={"min_vote_share": 0.6})
    sizes = bucketing(dataset, PipelineConfig())
    plan = EncodePlan(tmp_path / "plan.sqlite", made_of={})
    plan.read({"train": source.records("train")}, preferences=dataset.filter, seed=0)
    for chunk in plan.unmeasured():
        plan.measured(chunk, measure_images(source, plan.images(chunk)))
    plan.place(sizes, max_per_prompt=None)
    info = StoreInfo(
        dataset="d",
        pipeline="p",
        buckets=sizes.buckets,
        latent_shapes=SHAPES,
        rows=plan.rows_per_bucket(2),
        rows_per_shard=3,
    )
    store = LatentStore.create(tmp_path / "latents", info, plan.row_images())
    copy_latents(source, store, store.missing_shards()[:2])
    copy_latents(source, store, store.missing_shards())
    assert store.missing_shards() == []
    plan.found_unreadable(store.unreadable())
    store.write_pairs("train", plan.stored_pairs("train"))
    report = plan.retention(sizes.buckets)["train"]
    assert (report.records, report.malformed, report.pairs) == (12, 1, 11)
    assert (report.dropped, report.kept) == ({"vote_share": 1, "unreadable": 2}, 8)
    listed = [line.reason for line in plan.skipped()]
    for reason, words in zip(listed, ("not a literal", "unreadable latent", "latent is not finite"), strict=True):
        assert words in reason
    plan.close()
    table = store.pairs("train")
    assert table.pair_ids.tolist() == [0, 1, 3, 4, 5, 6, 9, 11]
    for position, pair in enumerate(table.pair_ids.tolist()):
        batch = store.batch(table, torch.tensor([position]))
        assert numpy.array_equal(batch.chosen[0].numpy(), latent(pair, 1))
        assert numpy.array_equal(batch.rejected[0].numpy(), latent(pair, 2))


def test_latents_cannot_be_stretched(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="set dataset.buckets to published"):
        bucketing(DatasetConfig(kind="preprocessed"), PipelineConfig())
    exact = bucketing(DatasetConfig(kind="preprocessed", buckets="published"), PipelineConfig())
    assert exact.of_pair((1024, 768), (1024, 768)) == exact.buckets.index((1024, 768))
    assert exact.of_pair((1024, 1024), (512, 512)).filter == "bucket"
    assert exact.of_pair((1032, 1024), (1032, 1024)).filter == "bucket"


def test_neither_kind_of_store(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        open_store(tmp_path)
    with pytest.raises(ValueError, match="holds no part_rankNN"):
        PreprocessedStore(tmp_path)
    parquet.write_table(pyarrow.table({"a": [1]}), tmp_path / "part_rank00.parquet")
    with pytest.raises(ValueError, match="not one of the published files"):
        open_store(tmp_path).pairs("train")
    write_part(tmp_path / "part_rank00.parquet", range(2))
    incomplete = parquet.read_table(tmp_path / "part_rank00.parquet").drop_columns(["latent2"])
    parquet.write_table(incomplete, tmp_path / "part_rank00.parquet")
    with pytest.raises(ValueError, match="it has no column latent2"):
        open_store(tmp_path).pairs("train")
    assert not isinstance(open_store(tmp_path), LatentStore)
