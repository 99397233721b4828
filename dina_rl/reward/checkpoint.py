"""The reward model on disk: what `save_reward` writes and `load_reward` reads.

    config.json                                      RewardCard
    backbone_lora/adapter_config.json                peft's own; both files absent for a frozen backbone
    backbone_lora/adapter_model.safetensors          base_model.model.transformer_blocks.{i}....lora_A.weight, fp32
    head.safetensors                                 RewardHead, fp32

The adapter's key names and the head's are those of the published checkpoint. A directory appears whole or not at all.
"""

import os
import tempfile
from pathlib import Path
from typing import Literal

from peft import LoraConfig
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dina_rl.backbones.base import Backbone
from dina_rl.backbones.lora import load_lora_state, lora_state
from dina_rl.config import PipelineConfig, RewardModelConfig
from dina_rl.reward.model import LatentRewardModel
from dina_rl.reward.revision import pipeline_revision

CARD_FILE = "config.json"
HEAD_FILE = "head.safetensors"
LORA_DIRECTORY = "backbone_lora"
LORA_FILE = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."


class RewardCard(BaseModel):
    """`config.json`: what the weights are and what they were fitted on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["dina_rl.reward"] = "dina_rl.reward"
    version: Literal[1, 2] = 2
    """1 had no revision, dtype and image_size"""
    pipeline: str
    """pipeline whose transformer is the backbone: a directory or a hub id"""
    revision: str | None = None
    """which weights that pipeline had, see `revision.pipeline_revision`; None: unknown"""
    dtype: Literal["float32", "bfloat16"] | None = None
    """of the backbone's weights during the fit; None: unknown"""
    image_size: tuple[int, int] | None = None
    """nominal (height, width) in pixels of the images of the fit; None: unknown"""
    max_sequence_length: int
    """T5 tokens per prompt during the fit; scoring with another number is scoring another input"""
    width: int
    """token width of the backbone"""
    reward: RewardModelConfig


def save_reward(model: LatentRewardModel, directory: Path, *, pipeline: PipelineConfig) -> None:
    """Write `model`'s current weights to `directory`, replacing a reward model that lies there.

    Args:
        pipeline: what `model.backbone` was opened on; recorded in the card.
    """
    card = RewardCard(
        pipeline=pipeline.path,
        revision=pipeline_revision(pipeline.location),
        dtype=pipeline.dtype,
        image_size=(pipeline.height, pipeline.width),
        max_sequence_length=pipeline.max_sequence_length,
        width=model.backbone.width,
        reward=model.config,
    )
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}-") as writing:
        fresh = Path(writing) / "fresh"
        fresh.mkdir()
        (fresh / CARD_FILE).write_text(card.model_dump_json(indent=2) + "\n")
        head = {name: tensor.detach().cpu().contiguous() for name, tensor in model.head.state_dict().items()}
        save_file(head, fresh / HEAD_FILE)
        if model.config.lora is not None:
            _save_adapter(model, fresh / LORA_DIRECTORY)
        if directory.exists():
            os.replace(directory, Path(writing) / "replaced")
        os.replace(fresh, directory)


def read_card(directory: Path) -> RewardCard:
    """The card of a saved reward model.

    Raises:
        ValueError: no such directory, or not a reward model of this format.
    """
    file = directory / CARD_FILE
    if not file.is_file():
        raise ValueError(f"reward model {directory} does not exist (no {CARD_FILE}); fit one with jobs.fit_reward")
    try:
        return RewardCard.model_validate_json(file.read_text())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{file} is not a reward model of this format: {where} {first['msg']}") from error


def load_reward(directory: Path, backbone: Backbone) -> LatentRewardModel:
    """The reward model saved in `directory` on `backbone` and its device: eval mode, every parameter frozen.

    Args:
        backbone: the pipeline that the card names, or one with the same transformer.

    Raises:
        ValueError: no such directory, broken or foreign files, or a backbone of another width or depth.
    """
    card = read_card(directory)
    if card.width != backbone.width:
        raise ValueError(
            f"reward model {directory} was fitted on a backbone of width {card.width} ({card.pipeline}), "
            f"this one has width {backbone.width}"
        )
    model = LatentRewardModel(backbone, card.reward, seed=0)
    try:
        model.head.load_state_dict(load_file(directory / HEAD_FILE))
        if card.reward.lora is not None:
            adapter = load_file(directory / LORA_DIRECTORY / LORA_FILE)
            state = {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in adapter.items()}
            load_lora_state(model.truncated, state)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ValueError(
            f"weights of reward model {directory} cannot be read: {' '.join(str(error).split())}"
        ) from error
    return model.requires_grad_(False).eval()  # peft's setters turn requires_grad on


def _save_adapter(model: LatentRewardModel, directory: Path) -> None:
    lora = model.config.lora
    LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        init_lora_weights="gaussian",
        target_modules=list(model.backbone.lora_targets),
        inference_mode=True,
    ).save_pretrained(str(directory))
    state = {PEFT_PREFIX + name: tensor.contiguous() for name, tensor in lora_state(model.truncated).items()}
    save_file(state, directory / LORA_FILE, metadata={"format": "pt"})
