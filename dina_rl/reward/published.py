"""The published layout, that of `liuhuohuo/DiNa-LRM-SD35M-12layers`: read here, and written by `save_published`.

    config.json                                               the released code's training configuration
    checkpoint/backbone_lora/adapter_config.json              peft's
    checkpoint/backbone_lora/adapter_model.safetensors        peft's: base_model.model.transformer_blocks.{i}....
    checkpoint/rm_head.pt                                     torch state dict of the head

SD3.5's is the only checkpoint published. The released code's FLUX variant has the same layout, but conditions the
blocks on time otherwise than FLUX does, so that its weights would mean something else here.

Field names of config.json are those that the released code (HKUST-C4G/diffusion-rm) reads; everything it does not need
to rebuild and score the model (data, paths, logging, optimiser) is ignored, and not written. The section `dina_rl` is
ours: it holds the whole `RewardCard`, for what the released configuration has no name, and the released code skips it.

The released likelihood in our terms. It divides the difference of two scores by sqrt(v + v + 1e-6), where each picture
has v = 2 sigma^2 + 0.05 (`thurstone`) or v = 0.5 (`thurstone-constant`); ours by sqrt(2 (k sigma^2 + sigma_u^2))
(Eq. 7, 8). Hence k = 2 and sigma_u^2 = 0.05 + 5e-7 (the paper: 0.01), or sigma_u^2 = 0.5 + 5e-7 (the paper: 0.25).
"""

import json
import math
import pickle
import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError, safe_open

from dina_rl.checkpoint import replaced_directory
from dina_rl.config import LoRAConfig, PipelineConfig, RewardModelConfig, ThurstoneConfig, TimestepConfig
from dina_rl.data.buckets import PUBLISHED, Size
from dina_rl.reward.card import (
    CARD_FILE,
    LORA_CONFIG_FILE,
    LORA_DIRECTORY,
    LORA_FILE,
    PEFT_PREFIX,
    RewardCard,
    check_tensors,
    load_adapter,
    make_card,
    save_adapter,
)
from dina_rl.reward.model import LatentRewardModel
from dina_rl.textfiles import parse_json, read_text, regular

CHECKPOINT_DIRECTORY = "checkpoint"
HEAD_FILE = "rm_head.pt"
OUR_SECTION = "dina_rl"
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
HUB_FILES = ["*.json", "*.safetensors", f"{CHECKPOINT_DIRECTORY}/*"]

LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
"""The released code's: bare, so that they reach `attn` and, in the blocks that have it (0 to 12), `attn2`."""

# What the released code fixes outside its configuration
MAX_SEQUENCE_LENGTH = 128  # T5 tokens in training; its examples of scoring use 256
REFERENCE_SIZE = (1024, 1024)
EPSILON = 1e-6  # added to the variance of a difference
FLOORS = {"thurstone": 0.05, "thurstone-constant": 0.5}  # variance of one picture

PLAIN_LORA = {
    "peft_type": "LORA",
    "bias": "none",
    "use_rslora": False,
    "use_dora": False,
    "lora_bias": False,
    "fan_in_fan_out": False,
}
"""What an adapter must be: any other value would be another function of the same tensors."""


DAMAGED = (OSError, EOFError, RuntimeError, LookupError, TypeError, ValueError, AssertionError, struct.error)
"""What torch.load was seen to raise on damaged files, beside UnpicklingError."""


class _Released(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class _Head(_Released):
    use_proj_in: bool = False
    width: int = -1
    out_dim: int = 1
    num_queries: int = 4
    num_attn_heads: int = 8


class _Model(_Released):
    model_type: str
    backbone_model_id: str
    num_transformer_layers: int
    freeze_backbone: bool
    use_lora: bool
    use_logistic: bool = False
    visual_head_idx: tuple[int, ...]
    text_head_idx: tuple[int, ...]
    reward_head: _Head


class _Training(_Released):
    add_noise: bool = True
    t_weighting_scheme: str = "uniform"
    t_weighting_scheme_param: float | str = 0.0


class _Config(_Released):
    model: _Model
    training: _Training = _Training()


def local_directory(directory: str | Path) -> Path:
    """Where the files of a reward model lie; those of a hub id are downloaded first, unless they are there.

    Raises:
        ValueError: it looks like a hub id and cannot be read.
    """
    local = Path(directory).expanduser()
    if local.is_dir() or not HUB_ID.fullmatch(str(directory)):
        return local
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(directory), allow_patterns=HUB_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"reward model {directory} does not exist: neither a local directory nor a hub id that can be read here "
            f"({reason})"
        ) from error


def is_published(config: object) -> bool:
    """Whether a `config.json` is of this layout rather than ours."""
    return isinstance(config, dict) and "format" not in config and isinstance(config.get("model"), dict)


def card(config: Mapping[str, Any], directory: Path) -> RewardCard:
    """What the published checkpoint in `directory` is, in our terms.

    The adapter's own configuration decides its rank and alpha, as it does in the released code.

    Raises:
        pydantic.ValidationError: a field is missing or of the wrong type.
        ValueError: a model that the released code can train, but this project cannot express.
    """
    if OUR_SECTION in config:
        return RewardCard.model_validate(config[OUR_SECTION])
    released = _Config.model_validate(config)
    model, head, taps = released.model, released.model.reward_head, released.model.visual_head_idx
    width = _width(directory, frozen=model.freeze_backbone)
    own_width = None if head.width in (-1, width) else head.width
    for wrong, what in (
        (model.model_type not in FLOORS, f"model.model_type {model.model_type}"),
        (model.use_logistic, "model.use_logistic (its parameters are not saved)"),
        (not (model.use_lora or model.freeze_backbone), "a fully fine-tuned backbone (model.use_lora false)"),
        (model.text_head_idx != taps, f"text taps {list(model.text_head_idx)} other than the visual {list(taps)}"),
        (model.num_transformer_layers != taps[-1], f"{model.num_transformer_layers} layers read at {list(taps)}"),
        (head.use_proj_in and own_width is None, "a projection to the same width (model.reward_head.use_proj_in)"),
        (head.out_dim != 1, f"model.reward_head.out_dim {head.out_dim}"),
        (not released.training.add_noise, "training.add_noise false"),
    ):
        if wrong:
            raise ValueError(f"{directory / CARD_FILE}: {what} is not supported")
    return RewardCard(
        pipeline=model.backbone_model_id,
        dtype="bfloat16",
        image_size=REFERENCE_SIZE,
        buckets=PUBLISHED,
        max_sequence_length=MAX_SEQUENCE_LENGTH,
        width=width,
        reward=RewardModelConfig(
            taps=taps,
            head_width=own_width,
            num_queries=head.num_queries,
            num_heads=head.num_attn_heads,
            lora=None if model.freeze_backbone else _lora(directory),
            thurstone=_thurstone(model.model_type),
            timestep=_timestep(released.training, directory),
        ),
    )


def load_weights(model: LatentRewardModel, directory: Path) -> None:
    """Overwrite head and adapter of `model` with those of the published checkpoint in `directory`, in fp32.

    Raises:
        ValueError: unreadable files, a pickle that holds more than tensors, or other tensors than the model's.
    """
    file = directory / CHECKPOINT_DIRECTORY / HEAD_FILE
    head = _load_head(file)
    check_tensors(head, model.head.state_dict(), file)
    model.head.load_state_dict(head)
    if model.config.lora is not None:
        load_adapter(model, directory / CHECKPOINT_DIRECTORY / LORA_DIRECTORY)


def save_published(
    model: LatentRewardModel, directory: Path, *, pipeline: PipelineConfig, buckets: Sequence[Size] | None = None
) -> None:
    """Write `model`'s current weights, fp32, in the published layout, replacing what lies in `directory`.

    Args:
        pipeline: what `model.backbone` was opened on.
        buckets: sizes of the images of the fit; None: all were stretched to the pipeline's.
    """
    with replaced_directory(directory) as fresh:
        checkpoint = fresh / CHECKPOINT_DIRECTORY
        checkpoint.mkdir()
        config = _released_config(model, pipeline)
        config[OUR_SECTION] = make_card(model, pipeline, buckets).model_dump(mode="json")
        (fresh / CARD_FILE).write_text(json.dumps(config, indent=4) + "\n")
        head = {name: tensor.detach().cpu().clone() for name, tensor in model.head.state_dict().items()}
        torch.save(head, checkpoint / HEAD_FILE)
        if model.config.lora is not None:
            save_adapter(model, checkpoint / LORA_DIRECTORY, targets=LORA_TARGETS)


def _released_config(model: LatentRewardModel, pipeline: PipelineConfig) -> dict[str, Any]:
    reward, lora, timestep = model.config, model.config.lora, model.config.timestep
    scheme, parameter = {
        "uniform": ("uniform", 0.0),
        "fixed": ("constant", timestep.fixed),
        "logit_normal": ("logit_normal", f"{timestep.mean!r}_{timestep.std!r}"),
    }[timestep.distribution]
    return {
        "model": {
            "model_type": "thurstone-constant" if reward.thurstone.variance == "fixed" else "thurstone",
            "backbone_model_id": pipeline.path,
            "num_transformer_layers": reward.taps[-1],
            "freeze_backbone": lora is None,
            "use_lora": lora is not None,
            "use_text_features": True,
            "lora_config": lora and {"r": lora.rank, "lora_alpha": lora.alpha, "init_lora_weights": "gaussian"},
            "use_logistic": False,
            "visual_head_idx": list(reward.taps),
            "text_head_idx": list(reward.taps),
            "use_t_embed": True,
            "reward_head": {
                "use_proj_in": reward.head_width not in (None, model.backbone.width),
                "width": reward.head_width or -1,
                "out_dim": 1,
                "num_queries": reward.num_queries,
                "num_attn_heads": reward.num_heads,
                "dropout": 0.0,
            },
        },
        "training": {"add_noise": True, "t_weighting_scheme": scheme, "t_weighting_scheme_param": parameter},
    }


def _thurstone(model_type: str) -> ThurstoneConfig:
    floor = math.sqrt(FLOORS[model_type] + EPSILON / 2)
    if model_type == "thurstone-constant":
        return ThurstoneConfig(variance="fixed", sigma_u=floor)
    return ThurstoneConfig(k=2.0, sigma_u=floor)


def _timestep(training: _Training, directory: Path) -> TimestepConfig:
    parameter = training.t_weighting_scheme_param
    try:
        match training.t_weighting_scheme:
            case "uniform":
                return TimestepConfig()
            case "constant":
                return TimestepConfig(distribution="fixed", fixed=float(parameter))
            case "logit_normal":
                mean, std = str(parameter).split("_")
                return TimestepConfig(distribution="logit_normal", mean=float(mean), std=float(std))
    except ValueError as error:
        raise ValueError(f"{directory / CARD_FILE}: training.t_weighting_scheme_param is {parameter!r}") from error
    raise ValueError(f"{directory / CARD_FILE}: t_weighting_scheme {training.t_weighting_scheme} is not supported")


def _lora(directory: Path) -> LoRAConfig:
    file = directory / CHECKPOINT_DIRECTORY / LORA_DIRECTORY / LORA_CONFIG_FILE
    try:
        adapter = parse_json(read_text(file))
        lora = LoRAConfig(rank=adapter["r"], alpha=adapter["lora_alpha"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} cannot be read: {' '.join(str(error).split())}") from error
    odd = [name for name, value in PLAIN_LORA.items() if adapter.get(name, value) != value]
    odd += [name for name in ("rank_pattern", "alpha_pattern", "modules_to_save") if adapter.get(name)]
    if odd:
        raise ValueError(f"{file}: {', '.join(f'{name} {adapter[name]}' for name in odd)} is not supported")
    return lora


def _width(directory: Path, *, frozen: bool) -> int:
    """Token width of the backbone, which the configuration does not say: that of a tensor."""
    if frozen:
        file = directory / CHECKPOINT_DIRECTORY / HEAD_FILE
        head, adapter = _load_head(file), "layer_adapters_visual.0"
        for name in (f"{adapter}.proj_in.weight", f"{adapter}.layer_embed"):
            if name in head:
                return head[name].shape[-1]
        raise ValueError(f"{file} has no {adapter}.layer_embed")
    file = directory / CHECKPOINT_DIRECTORY / LORA_DIRECTORY / LORA_FILE
    name = f"{PEFT_PREFIX}transformer_blocks.0.attn.to_q.lora_A.weight"
    try:
        with safe_open(regular(file), "pt") as adapter:
            if name not in adapter.keys():  # noqa: SIM118 - not a mapping
                raise ValueError(f"{file} has no {name}")
            width: int = adapter.get_slice(name).get_shape()[-1]
            return width
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} cannot be read: {' '.join(str(error).split())}") from error


def _load_head(file: Path) -> dict[str, torch.Tensor]:
    """A state dict from somewhere else. Only tensors are built; anything else in the pickle is refused, not run.

    Raises:
        ValueError: missing, broken, or more than a state dict.
    """
    try:
        state = torch.load(regular(file), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{file} is damaged or holds more than a state dict of tensors; not loaded") from error
    except DAMAGED as error:
        raise ValueError(f"{file} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise ValueError(f"{file} is not a state dict of tensors")
    return state
