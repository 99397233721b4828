"""An adapter to start from adds what its file adds, whoever wrote it; what does not fit is one line."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from dina_rl.backbones.adapter_files import initial_state
from dina_rl.backbones.base import Backbone
from dina_rl.backbones.registry import open_backbone
from dina_rl.backbones.trained import load_trained_state, make_trainable, trained_state
from dina_rl.config import PolicyLoRAConfig
from dina_rl.seeding import generator
from tests.families import Family
from tests.unit.backbones.test_exported_adapter import Deltas, deltas

RANK = 2
Tensors = dict[str, torch.Tensor]


def adapted(backbone: Backbone, **lora: object) -> tuple[nn.Module, PolicyLoRAConfig]:
    config = PolicyLoRAConfig.model_validate({"rank": RANK, "alpha": 3.0, **lora})
    module = backbone.load_transformer()
    make_trainable(module, config, targets=backbone.lora_targets, seed=0)
    return module, config


def drawn(backbone: Backbone) -> Tensors:
    """A and B of every layer under peft's names."""
    module, _ = adapted(backbone)
    return {
        name: torch.randn(tensor.shape, generator=generator("init", name))
        for name, tensor in trained_state(module).items()
    }


def named(tensors: Tensors, prefix: str, a: str = ".lora_A.weight", b: str = ".lora_B.weight") -> Tensors:
    return {
        prefix + name.replace(".lora_A.weight", a).replace(".lora_B.weight", b): tensor
        for name, tensor in tensors.items()
    }


def alphas(tensors: Tensors, prefix: str, alpha: float) -> Tensors:
    names = (name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight"))
    return {f"{prefix}{name}.alpha": torch.tensor(alpha) for name in names}


def save_ours(backbone: Backbone, tensors: Tensors, place: Path) -> float:
    backbone.save_adapter(place, tensors, rank=RANK, alpha=5.0, targets=backbone.lora_targets)
    return 5.0 / RANK


def save_with_header(backbone: Backbone, tensors: Tensors, place: Path) -> float:
    header = {"r": RANK, "lora_alpha": 7, "target_modules": list(backbone.lora_targets)}
    header = {f"transformer.{name}": value for name, value in header.items()}
    metadata = {"lora_adapter_metadata": json.dumps(header), "format": "pt"}
    save_file(named(tensors, "transformer."), place / "other_name.safetensors", metadata)
    return 7 / RANK


def save_without_header(backbone: Backbone, tensors: Tensors, place: Path) -> float:
    save_file(named(tensors, "transformer."), place / "pytorch_lora_weights.safetensors")
    return 1.0


def save_with_alphas(backbone: Backbone, tensors: Tensors, place: Path) -> float:
    keys = named(tensors, "transformer.", ".lora.down.weight", ".lora.up.weight")
    save_file(keys | alphas(tensors, "transformer.", 1.0), place / "down_up.safetensors")
    return 1.0 / RANK


def save_by_peft(backbone: Backbone, tensors: Tensors, place: Path) -> float:
    save_file(named(tensors, "base_model.model."), place / "adapter_model.safetensors")
    settings = {"r": RANK, "lora_alpha": 4, "use_rslora": True, "alpha_pattern": {}}
    (place / "adapter_config.json").write_text(json.dumps(settings))
    return 4 / RANK**0.5


@pytest.mark.parametrize("save", [save_ours, save_with_header, save_without_header, save_with_alphas, save_by_peft])
def test_what_is_loaded_adds_what_the_file_adds(
    tmp_path: Path, backbone: Backbone, save: Callable[[Backbone, Tensors, Path], float]
) -> None:
    tensors = drawn(backbone)
    scale = save(backbone, tensors, tmp_path)
    module, lora = adapted(backbone, init=tmp_path)
    load_trained_state(module, initial_state(module, lora, backbone.convert_adapter))
    found = deltas(module)
    for name, delta in found.items():
        expected = scale * tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
        torch.testing.assert_close(delta, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("save", [save_ours, save_with_header, save_without_header])
def test_stock_diffusers_reads_the_same(
    tmp_path: Path, family: Family, backbone: Backbone, save: Callable[[Backbone, Tensors, Path], float]
) -> None:
    save(backbone, drawn(backbone), tmp_path)
    stock = family.stock()
    stock.load_lora_weights(next(tmp_path.glob("*.safetensors")))
    module, lora = adapted(backbone, init=tmp_path)
    load_trained_state(module, initial_state(module, lora, backbone.convert_adapter))
    theirs: Deltas = deltas(stock.transformer)
    for name, delta in deltas(module).items():
        torch.testing.assert_close(delta, theirs[name], rtol=1e-5, atol=1e-6)


def test_our_own_export_comes_back_bit_for_bit(tmp_path: Path, backbone: Backbone) -> None:
    tensors = drawn(backbone)
    backbone.save_adapter(tmp_path, tensors, rank=RANK, alpha=4.0, targets=backbone.lora_targets)
    module, lora = adapted(backbone, init=tmp_path, alpha=4.0)
    found = initial_state(module, lora, backbone.convert_adapter)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_keys_that_stock_diffusers_converts(tmp_path: Path, family: Family, backbone: Backbone) -> None:
    """Kohya's of FLUX and ComfyUI's of Z-Image, which have diffusers' layers; SD3's have not."""
    tensors = drawn(backbone)
    keys = named(tensors, "diffusion_model.", ".lora_down.weight", ".lora_up.weight")
    save_file(keys | alphas(tensors, "diffusion_model.", 1.0), tmp_path / "foreign.safetensors")
    module, lora = adapted(backbone, init=tmp_path)
    if family.name != "z_image":
        with pytest.raises(ValueError, match="keys of another program|is no LoRA adapter of a diffusers transformer"):
            initial_state(module, lora, backbone.convert_adapter)
        return
    load_trained_state(module, initial_state(module, lora, backbone.convert_adapter))
    for name, delta in deltas(module).items():
        expected = tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"] / RANK
        torch.testing.assert_close(delta, expected, rtol=1e-5, atol=1e-6)


def without_last_layer(tensors: Tensors) -> Tensors:
    last = max(tensors).rsplit(".lora_", 1)[0]
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(last)}


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda t: {k: torch.ones(4, 4) for k in t}, "has rank 4, learner.lora.rank is 2"),
        (without_last_layer, "is only in the run. learner.lora.targets for the file: attn.add_k_proj"),
        (lambda t: t | {"transformer.norm.lora_A.weight": torch.ones(1, 1)}, "does not hold two matrices of norm"),
        (lambda t: t | {"text_encoder.a.lora_A.weight": torch.ones(1, 1)}, "it holds 'text_encoder.a.lora_A.weight'"),
        (lambda t: t | {"transformer.x.dora_scale": torch.ones(1)}, "it holds 'transformer.x.dora_scale'"),
        (lambda t: {k: v[:, :-1] if "lora_A" in k else v for k, v in t.items()}, "is of another transformer"),
        (lambda t: {"a.b": torch.ones(1)}, "is no LoRA adapter of a diffusers transformer alone: it holds 'a.b'"),
        (lambda t: {}, "holds no tensors"),
    ],
)
def test_what_does_not_fit_is_one_line(
    tmp_path: Path, tiny_pipeline: Path, change: Callable[[Tensors], Tensors], line: str
) -> None:
    backbone = open_backbone(tiny_pipeline)
    tensors = {name: tensor.contiguous() for name, tensor in change(named(drawn(backbone), "transformer.")).items()}
    save_file(tensors, tmp_path / "adapter.safetensors")
    check(backbone, tmp_path, line)


def test_what_is_no_adapter_is_one_line(tmp_path: Path, tiny_pipeline: Path) -> None:
    backbone = open_backbone(tiny_pipeline)
    check(backbone, tmp_path / "nowhere", "nowhere does not exist")
    check(backbone, tmp_path, "holds 0 .safetensors files")
    save_with_header(backbone, drawn(backbone), tmp_path)
    file = tmp_path / "other_name.safetensors"
    contradicted = load_file(file) | alphas(drawn(backbone), "transformer.", 1.0)
    header = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 7})}
    save_file(contradicted, file, header)
    check(backbone, file, "says alpha 1 and 7 of transformer_blocks.0.attn.add_k_proj")
    file.write_bytes(b"no tensors at all")
    check(backbone, file, "is no safetensors file")


def check(backbone: Backbone, init: Path, line: str) -> None:
    module, lora = adapted(backbone, init=init)
    with pytest.raises(ValueError, match="learner.lora.init: ") as caught:
        initial_state(module, lora, backbone.convert_adapter)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)
