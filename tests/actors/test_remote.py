"""What lies in the object store is what was put there, and each tensor is one rank's to give away."""

import sys

import numpy as np
import pytest
import ray
import torch
from torch import nn

from actors.remote import StoredTensors, brought_here, in_parts
from dina_rl.alignment.engine import share
from tests.tensors import assert_same_tensors

# Workers cannot import test modules by name.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

TENSORS = {
    "matrix": torch.linspace(-1, 1, 600).reshape(20, 30),
    "turned": torch.linspace(-1, 1, 600).reshape(20, 30).T,
    "odd": torch.tensor([float("nan"), -0.0, float("inf"), 1e-45]),
    "count": torch.tensor(7),
    "nothing": torch.zeros(0, 3),
}


def bits(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: each.contiguous().reshape(-1).view(torch.uint8) for name, each in tensors.items()}


@pytest.mark.usefixtures("ray_local")
def test_tensors_come_out_of_the_store_as_they_went_in_and_whole():
    @ray.remote(num_cpus=0)
    def through(part: StoredTensors) -> StoredTensors:
        return StoredTensors({name: tensor.clone() for name, tensor in part.tensors.items()})

    parts = [ray.put(part) for part in in_parts(TENSORS, 3000)]
    assert len(parts) == 2
    for refs in (parts, [through.remote(part) for part in parts]):
        found = brought_here(refs, timeout_s=60)
        assert_same_tensors(bits(found), bits(TENSORS))
        assert {name: (each.dtype, each.shape) for name, each in found.items()} == {
            name: (each.dtype, each.shape) for name, each in TENSORS.items()
        }


@pytest.mark.usefixtures("ray_local")
def test_what_is_large_is_read_where_it_lies():
    ref = ray.put(StoredTensors({"large": torch.zeros(2**20)}))
    first, second = (brought_here([ref], timeout_s=60)["large"] for _ in range(2))
    assert first.data_ptr() == second.data_ptr()
    with pytest.raises(ValueError, match="read-only"):
        ray.get(ref, timeout=60).arrays["large"][0] = 1


@pytest.mark.parametrize("part_bytes", [1, 100, 10**9])
def test_parts_hold_everything_once_and_in_order(part_bytes: int):
    parts = in_parts(TENSORS, part_bytes)
    assert [name for part in parts for name in part.tensors] == list(TENSORS)
    assert all(part.tensors for part in parts)
    assert len(parts) == {1: 5, 100: 3, 10**9: 1}[part_bytes]
    assert in_parts({}, part_bytes) == []


@pytest.mark.parametrize("world_size", [1, 2, 3, 8, 64])
def test_every_tensor_is_one_ranks_and_ranks_have_alike_much(world_size: int):
    sizes = np.random.default_rng(0).integers(1, 1000, 300)
    parameters = {str(number): nn.Parameter(torch.zeros(int(size))) for number, size in enumerate(sizes)}
    shares = [share(parameters, rank, world_size) for rank in range(world_size)]
    assert sorted(name for names in shares for name in names) == sorted(parameters)
    counts = [sum(parameters[name].numel() for name in names) for names in shares]
    assert max(abs(count - sizes.sum() / world_size) for count in counts) <= sizes.max()


def test_where_ranks_are_more_than_tensors_some_have_none():
    parameters = {"a": nn.Parameter(torch.zeros(3)), "b": nn.Parameter(torch.zeros(3))}
    assert sorted(map(sorted, (share(parameters, rank, 8) for rank in range(8)))) == [[]] * 6 + [["a"], ["b"]]
