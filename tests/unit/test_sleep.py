"""What leaves a device and comes back is what it was, wherever it is seen from."""

import pytest
import torch
from torch import nn

from dina_rl.sleep import Luggage, SharedGPU, tensors_on


def test_moved_storages_come_back_under_every_view():
    base = torch.arange(12.0)
    view, other = base[3:9].view(2, 3), torch.ones(5, dtype=torch.bfloat16)
    expected = [tensor.clone() for tensor in (base, view, other)]
    luggage = Luggage()
    for _ in range(2):  # the buffer is used again
        luggage.pack([base, view, other, base])
        assert base.untyped_storage().nbytes() == other.untyped_storage().nbytes() == 0
        luggage.pack([base])  # asleep already
        luggage.unpack()
        luggage.unpack()  # awake already
        assert all(torch.equal(*pair) for pair in zip((base, view, other), expected, strict=True))
    base[3] = 7
    assert view[0, 0] == 7


def test_storages_of_mapped_files_stay(tmp_path):
    file = tmp_path / "weights"
    file.write_bytes(bytes(16))
    mapped = torch.from_file(str(file), size=4)
    Luggage().pack([mapped])
    assert torch.equal(mapped, torch.zeros(4))


def test_a_model_its_gradients_and_its_optimizer_are_found():
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    found = {tensor.untyped_storage()._cdata for tensor in tensors_on("cpu")}
    moments = [tensor for state in optimizer.state.values() for tensor in state.values()]
    gradients = [parameter.grad for parameter in module.parameters()]
    for tensor in (*module.parameters(), *module.buffers(), *gradients, *moments):
        assert tensor.untyped_storage()._cdata in found


@pytest.mark.gpu
def test_a_training_step_after_sleep_is_the_one_without():
    def train(*, sleeps: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        module = nn.Linear(512, 512, device="cuda")
        optimizer = torch.optim.AdamW(module.parameters())
        gpu = SharedGPU(sleeps=sleeps)
        for _ in range(3):
            gpu.wake()
            module(torch.ones(4, 512, device="cuda")).square().sum().backward()
            optimizer.step()
            held, size = torch.cuda.memory_allocated(), sum(parameter.nbytes for parameter in module.parameters())
            gpu.rest()
            # Weights, gradients and two moments; cuBLAS keeps a workspace that may be larger than all of them.
            assert (held - torch.cuda.memory_allocated() >= 4 * size) == sleeps
        gpu.wake()
        return [parameter.detach().cpu() for parameter in module.parameters()]

    assert all(torch.equal(*pair) for pair in zip(train(sleeps=True), train(sleeps=False), strict=True))
