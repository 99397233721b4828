"""Adapters in files, our own and other people's, as the trained part of a transformer that has an adapter already.

What a file means is what stock diffusers makes of it: per layer, B A times alpha / rank, where alpha stands in `.alpha`
keys, in the file's header, or beside it in peft's `adapter_config.json`, and is the rank where it stands nowhere.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import nn

from dina_rl.backbones.lora import LORA_FILE
from dina_rl.backbones.trained import trained_parameters
from dina_rl.config import PolicyLoRAConfig
from dina_rl.sums import check_sums
from dina_rl.textfiles import parse_json, read_text, regular

PREFIXES = ("transformer.", "base_model.model.")  # diffusers', peft's
PARTS = {  # how a key ends -> what it holds
    **dict.fromkeys((".lora_A.weight", ".lora_A.default.weight", ".lora.down.weight", ".lora_down.weight"), "a"),
    **dict.fromkeys((".lora_B.weight", ".lora_B.default.weight", ".lora.up.weight", ".lora_up.weight"), "b"),
    ".alpha": "alpha",
}
PEFT_FILES = ("adapter_model.safetensors", "adapter_config.json")

Tensors = dict[str, torch.Tensor]
Convert = Callable[[Tensors], Tensors]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoRALayer:
    """What a file adds to one layer: scale B A."""

    a: torch.Tensor  # [rank, in]
    b: torch.Tensor  # [out, rank]
    scale: float

    @property
    def rank(self) -> int:
        return len(self.a)


def initial_state(module: nn.Module, lora: PolicyLoRAConfig, convert: Convert) -> Tensors:
    """The trained part of `module`, which has `lora`'s adapter, with which it adds what the file `lora.init` adds.

    Args:
        module: may lie on torch's meta device.
        convert: names of other programs to diffusers' (`Backbone.convert_adapter`).

    Raises:
        ValueError: no such file, no adapter in it, or not one of these layers and this rank.
    """
    assert lora.init is not None
    file = adapter_file(lora.init.expanduser())
    layers = read_adapter(file, convert)
    wanted = trained_parameters(module)
    _check_layers(file, layers, wanted, lora)
    own_scale = lora.alpha / lora.rank
    state = {}
    for name, layer in layers.items():
        state[f"{name}.lora_A.weight"] = layer.a.float()
        state[f"{name}.lora_B.weight"] = layer.b.float() * (layer.scale / own_scale)
    return {name: state[name] for name in wanted}


def adapter_file(place: Path) -> Path:
    """The file of an adapter, given it or its directory.

    Raises:
        ValueError: there is none, or several.
    """
    if place.is_file():
        return place
    if not place.is_dir():
        raise ValueError(f"learner.lora.init: {place} does not exist")
    for name in (LORA_FILE, PEFT_FILES[0]):
        if (place / name).is_file():
            return place / name
    found = sorted(place.glob("*.safetensors"))
    if len(found) != 1:
        raise ValueError(f"learner.lora.init: {place} holds {len(found)} .safetensors files; name one of them")
    return found[0]


def read_adapter(file: Path, convert: Convert) -> dict[str, LoRALayer]:
    """An adapter's layers by their diffusers names.

    Raises:
        ValueError: it is no adapter of a transformer alone, or is made otherwise than LoRA.
    """
    try:
        with safe_open(regular(file), framework="pt") as opened:
            names: list[str] = opened.keys()
            tensors, header = {name: opened.get_tensor(name) for name in names}, opened.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"learner.lora.init: {file} is no safetensors file ({error})") from error
    try:
        check_sums(file.parent, [file.name])
    except ValueError as error:
        raise ValueError(f"learner.lora.init: {file.parent} is broken: {error}") from error
    if not all(name.startswith(PREFIXES) for name in tensors):
        tensors = _converted(file, tensors, convert)
    parts = _parts(file, tensors)
    settings = _settings(file, header)
    if settings.get("use_dora"):
        raise ValueError(f"learner.lora.init: {file} is a DoRA adapter; only LoRA is trained here")
    return {name: _layer(file, name, part, settings) for name, part in parts.items()}


def _converted(file: Path, tensors: Tensors, convert: Convert) -> Tensors:
    try:
        return convert(dict(tensors))
    # Stock converters check little: on keys that are not theirs they fail wherever their parsing first meets one.
    except (ValueError, KeyError, IndexError, AttributeError, RuntimeError, NotImplementedError) as error:
        raise ValueError(
            f"learner.lora.init: {file} has keys of another program that cannot be converted (first: {min(tensors)!r})"
        ) from error


def _parts(file: Path, tensors: Tensors) -> dict[str, Tensors]:
    """Layer -> its matrices and alpha."""
    parts: dict[str, Tensors] = {}
    for key, tensor in tensors.items():
        prefix = next((each for each in PREFIXES if key.startswith(each)), None)
        ending = next((each for each in PARTS if key.endswith(each)), None)
        if prefix is None or ending is None:
            raise ValueError(
                f"learner.lora.init: {file} is no LoRA adapter of a diffusers transformer alone: it holds {key!r}"
            )
        layer = key.removeprefix(prefix).removesuffix(ending)
        parts.setdefault(layer, {})[PARTS[ending]] = tensor
    if not parts:
        raise ValueError(f"learner.lora.init: {file} holds no tensors")
    return parts


def _settings(file: Path, header: Mapping[str, str]) -> dict[str, Any]:
    """The adapter's settings in peft's words, from the header or from peft's own file; empty where there are none."""
    beside = file.with_name(PEFT_FILES[1])
    if LORA_ADAPTER_METADATA_KEY in header:
        settings: dict[str, Any] = parse_json(header[LORA_ADAPTER_METADATA_KEY])
        return {name.removeprefix("transformer."): value for name, value in settings.items()}
    if file.name == PEFT_FILES[0] and beside.is_file():
        settings = parse_json(read_text(beside))
        return settings
    return {}


def _layer(file: Path, name: str, part: Tensors, settings: Mapping[str, Any]) -> LoRALayer:
    if not {"a", "b"} <= set(part) or part["a"].dim() != 2 or part["b"].dim() != 2:
        raise ValueError(f"learner.lora.init: {file} does not hold two matrices of {name}")
    rank = len(part["a"])
    said = []  # alpha, by whoever says it
    if "alpha" in part:
        said.append(float(part["alpha"]))
    if "lora_alpha" in settings:
        patterns: dict[str, float] = settings.get("alpha_pattern") or {}
        said.append(float(patterns.get(get_pattern_key(list(patterns), name), settings["lora_alpha"])))
    if len(set(said)) > 1:
        raise ValueError(f"learner.lora.init: {file} says alpha {said[0]:g} and {said[1]:g} of {name}")
    alpha = said[0] if said else float(rank)
    return LoRALayer(a=part["a"], b=part["b"], scale=alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank))


def _check_layers(
    file: Path, layers: Mapping[str, LoRALayer], wanted: Mapping[str, nn.Parameter], lora: PolicyLoRAConfig
) -> None:
    """Raises ValueError where the file does not adapt what the run adapts."""
    ours = {name.removesuffix(".lora_A.weight") for name in wanted if name.endswith(".lora_A.weight")}
    if set(layers) != ours:
        odd = min(set(layers) ^ ours)
        raise ValueError(
            f"learner.lora.init: {file} adapts {len(layers)} layers, this run {len(ours)}; {odd} is only in "
            f"{'the file' if odd in layers else 'the run'}. learner.lora.targets for the file: {_targets(layers)}"
        )
    ranks = sorted({layer.rank for layer in layers.values()})
    if ranks != [lora.rank]:
        raise ValueError(
            f"learner.lora.init: {file} has rank {', '.join(map(str, ranks))}, learner.lora.rank is {lora.rank}"
        )
    for name, layer in layers.items():
        shapes = wanted[f"{name}.lora_A.weight"].shape, wanted[f"{name}.lora_B.weight"].shape
        if (layer.a.shape, layer.b.shape) != shapes:
            raise ValueError(
                f"learner.lora.init: {file} is of another transformer: {name} is {layer.a.shape[1]} -> "
                f"{layer.b.shape[0]} there and {shapes[0][1]} -> {shapes[1][0]} here"
            )


def _targets(layers: Mapping[str, LoRALayer]) -> str:
    """The layers as `learner.lora.targets` names them: without the number of their block and what precedes it."""
    ends = {name: next((i for i, part in enumerate(name.split(".")) if part.isdigit()), -1) for name in layers}
    return " ".join(sorted({".".join(name.split(".")[at + 1 :]) for name, at in ends.items()}))
