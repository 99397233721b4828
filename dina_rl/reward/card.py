"""What both formats of a reward model on disk have in common: the card, the adapter's file, the checks of tensors."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dina_rl.backbones.lora import load_lora_state, lora_state, peft_config
from dina_rl.config import PipelineConfig, RewardModelConfig
from dina_rl.data.buckets import Size
from dina_rl.fingerprint import Fingerprint, pipeline_fingerprint
from dina_rl.reward.model import LatentRewardModel
from dina_rl.reward.revision import pipeline_revision
from dina_rl.runtime import image_size
from dina_rl.textfiles import regular

CARD_FILE = "config.json"
LORA_DIRECTORY = "backbone_lora"
LORA_FILE = "adapter_model.safetensors"
LORA_CONFIG_FILE = "adapter_config.json"
PEFT_PREFIX = "base_model.model."
NAMED_AT_MOST = 5  # tensors, in a message


class RewardCard(BaseModel):
    """What the weights are and what they were fitted on: our `config.json`, or what the published one says."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["dina_rl.reward"] = "dina_rl.reward"
    version: Literal[1, 2, 3] = 3
    """1 had no revision, dtype, image_size and buckets; 2 no fingerprint and pictures"""
    pipeline: str
    """pipeline whose transformer is the backbone: a directory or a hub id"""
    revision: str | None = None
    """which weights that pipeline had, see `revision.pipeline_revision`; None: unknown"""
    fingerprint: Fingerprint | None = None
    """what its transformer, VAE and text encoders held; None: unknown"""
    pipeline_revision: str | None = None
    """the revision of the hub id that the fit asked for; None: its main branch, or a directory"""
    variant: str | None = None
    """of the pipeline's weight files"""
    dtype: Literal["float32", "bfloat16"] | None = None
    """of the backbone's weights during the fit; None: unknown"""
    image_size: Size | None = None
    """(height, width) in pixels to which the images of the fit were stretched; None: unknown"""
    buckets: tuple[Size, ...] | None = None
    """sizes by aspect that they had instead, image_size being nominal; None: all were stretched"""
    pictures: str | None = None
    """how they were read from their files (see `data/images.py`), and should be to be scored; None: unknown"""
    max_sequence_length: int
    """T5 tokens per prompt during the fit; scoring with another number is scoring another input"""
    width: int
    """token width of the backbone"""
    reward: RewardModelConfig


def make_card(
    model: LatentRewardModel,
    pipeline: PipelineConfig,
    buckets: Sequence[Size] | None,
    pictures: str | None = None,
) -> RewardCard:
    """The card of a model on the backbone that `pipeline` opens; `buckets` are the sizes of its fit, if several."""
    return RewardCard(
        pipeline=pipeline.path,
        revision=pipeline_revision(pipeline.location, pipeline.revision),
        pipeline_revision=pipeline.revision,
        variant=pipeline.variant,
        fingerprint=pipeline_fingerprint(*pipeline.place),
        dtype=pipeline.dtype,
        image_size=image_size(pipeline, model.backbone),
        buckets=buckets and tuple(buckets),
        pictures=pictures,
        max_sequence_length=model.backbone.max_sequence_length,
        width=model.backbone.width,
        reward=model.config,
    )


def load_adapter(model: LatentRewardModel, directory: Path) -> None:
    """Overwrite `model`'s backbone adapter with the one in `directory`.

    Raises:
        ValueError: an unreadable file, or other tensors than the adapter's.
    """
    file = directory / LORA_FILE
    try:
        stored = load_file(regular(file))
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} cannot be read: {' '.join(str(error).split())}") from error
    state = {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in stored.items()}
    check_tensors(state, lora_state(model.truncated), file)
    load_lora_state(model.truncated, state)


def save_adapter(model: LatentRewardModel, directory: Path, *, targets: Sequence[str]) -> None:
    """Write `model`'s backbone adapter as peft does.

    Args:
        targets: suffixes of the names of the adapted modules.
    """
    lora = model.config.lora
    assert lora is not None
    config = peft_config(rank=lora.rank, alpha=lora.alpha, targets=targets, inference_mode=True)
    config.save_pretrained(str(directory))
    state = {PEFT_PREFIX + name: tensor.contiguous() for name, tensor in lora_state(model.truncated).items()}
    save_file(state, directory / LORA_FILE, metadata={"format": "pt"})


def check_tensors(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], file: Path) -> None:
    """Whether `found` has exactly the names and shapes of `expected`.

    Raises:
        ValueError: it has not; missing, unknown and misshapen tensors are named.
    """
    missing = [name for name in expected if name not in found]
    unknown = [name for name in found if name not in expected]
    misshapen = [
        f"{name} {list(found[name].shape)} instead of {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]
    kinds = (("missing", missing), ("unknown", unknown), ("of another shape", misshapen))
    problems = [f"{len(names)} tensors {what}: {_listed(names)}" for what, names in kinds if names]
    if problems:
        raise ValueError(f"{file} does not fit the model: {'; '.join(problems)}")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED_AT_MOST]) + (", ..." if len(names) > NAMED_AT_MOST else "")
