"""The authors' preprocessed files, in their layout."""

import io
import pickle
from pathlib import Path

import numpy
import pyarrow
import pytest
import torch
from pyarrow import parquet

from dina_rl.data.latents import LatentStore
from dina_rl.data.preprocessed import PreprocessedStore
from dina_rl.data.registry import open_store

SHAPES = ((16, 4, 4), (16, 2, 6))
DETAILS = {
    "votes_chosen": 9,
    "votes_rejected": 3,
    "confidence": 0.0,
    "orig_chosen_hw": [40, 40],
    "orig_rejected_hw": [32, 32],
    "final_chosen_hw": [32, 32],
    "final_rejected_hw": [32, 32],
}


def npy(array: numpy.ndarray) -> bytes:
    buffer = io.BytesIO()
    numpy.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def latent(pair: int, side: int) -> numpy.ndarray:
    shape = SHAPES[pair % 2]
    return numpy.random.default_rng([pair, side]).normal(size=shape).astype(numpy.float32)


def write_part(file: Path, pairs: range, **changes: list) -> None:
    """Row groups of 3 pairs; every second pair is of the other shape."""
    sides = [[latent(pair, side) for pair in pairs] for side in (1, 2)]
    columns = {
        "prompt": [f"prompt {pair % 3}" for pair in pairs],
        "model1": ["m"] * len(pairs),
        "model2": ["n"] * len(pairs),
        "detailed_results": [str(DETAILS)] * len(pairs),
        "image1_path": ["images/a.jpg"] * len(pairs),
        "image2_path": ["images/b.jpg"] * len(pairs),
        "latent1": [npy(array) for array in sides[0]],
        "latent2": [npy(array) for array in sides[1]],
        "latent1_shape": [list(array.shape) for array in sides[0]],
        "latent2_shape": [list(array.shape) for array in sides[1]],
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns | changes), file, compression="zstd", row_group_size=3)


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


def test_what_the_authors_recorded(store: PreprocessedStore) -> None:
    assert store.details("train")[4] == DETAILS


def test_pairs_of_two_shapes_are_left_out(tmp_path: Path) -> None:
    shapes = [[16, 4, 4], [16, 2, 2], [16, 4, 4]]
    write_part(tmp_path / "part_rank00.parquet", range(3), latent2_shape=shapes)
    assert open_store(tmp_path).pairs("train").pair_ids.tolist() == [0, 2]


def test_nothing_is_unpickled_or_executed(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    numpy.save(buffer, numpy.array([print], dtype=object), allow_pickle=True)
    write_part(
        tmp_path / "part_rank00.parquet", range(1), latent1=[buffer.getvalue()], detailed_results=["__import__('os')"]
    )
    store = open_store(tmp_path)
    with pytest.raises(ValueError, match="allow_pickle=False"):
        store.latents(torch.tensor([0]))
    with pytest.raises(ValueError, match="malformed node"):
        store.details("train")


def test_neither_kind_of_store(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        open_store(tmp_path)
    with pytest.raises(ValueError, match="holds no part_rankNN"):
        PreprocessedStore(tmp_path)
    parquet.write_table(pyarrow.table({"a": [1]}), tmp_path / "part_rank00.parquet")
    with pytest.raises(ValueError, match="not one of the published files"):
        open_store(tmp_path).pairs("train")
    assert not isinstance(open_store(tmp_path), LatentStore)
