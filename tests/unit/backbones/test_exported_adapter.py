"""The exported adapter changes the generator by what was trained, whoever reads it and whatever they leave unread."""

from pathlib import Path

import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import nn

from dina_rl.backbones.base import Backbone
from dina_rl.backbones.lora import add_lora, lora_state, trainable
from dina_rl.seeding import generator
from tests.families import Family

Deltas = dict[str, torch.Tensor]


def deltas(module: nn.Module) -> Deltas:
    """What the only adapter of a transformer adds to its weights, by layer."""
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, LoraLayer)}
    with torch.no_grad():
        return {name: layer.get_delta_weight(layer.active_adapters[0]) for name, layer in layers.items()}


def deltas_by_keys(file: Path) -> Deltas:
    """The same as ComfyUI computes it: from `.alpha` where there is such a key, at scale 1 where there is none."""
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    found = {}
    for name in (key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")):
        a, b = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
        alpha = tensors.get(f"{name}.alpha")
        found[name] = b @ a * (1.0 if alpha is None else alpha.item() / len(a))
    return found


def shares(found: Deltas, trained: Deltas) -> list[float]:
    """How much of each trained change is found: along it, in its lengths."""
    assert set(found) == set(trained)
    return [float((found[name] * delta).sum() / delta.square().sum()) for name, delta in trained.items()]


@pytest.mark.parametrize("alpha", [4.0, 3.0, 1.0])
def test_every_reader_finds_the_whole_change(tmp_path: Path, family: Family, backbone: Backbone, alpha: float) -> None:
    transformer = backbone.load_transformer()
    add_lora(transformer, rank=2, alpha=alpha, targets=backbone.lora_targets, seed=0)
    with torch.no_grad():
        for parameter in trainable(transformer).values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator("export", *parameter.shape))
    trained, state = deltas(transformer), lora_state(transformer)
    file = backbone.save_adapter(tmp_path / "ours", state, rank=2, alpha=alpha, targets=backbone.lora_targets)
    assert all(torch.equal(tensor, state[name]) for name, tensor in lora_state(transformer).items()), "left as it was"
    bare = tmp_path / "bare" / file.name
    bare.parent.mkdir()
    save_file(load_file(file), bare)

    expected = pytest.approx([1.0] * len(trained), abs=1e-5)  # exact where alpha / rank is a power of two
    assert shares(deltas_by_keys(file), trained) == expected
    for each in (file, bare):
        stock = family.stock()
        stock.load_lora_weights(each.parent)
        assert shares(deltas(stock.transformer), trained) == expected
