"""The reward model on disk: what `save_reward` writes, and what `load_reward` reads, which is that and the published.

    config.json                                      RewardCard
    backbone_lora/adapter_config.json                peft's own; both files absent for a frozen backbone
    backbone_lora/adapter_model.safetensors          base_model.model.transformer_blocks.{i}....lora_A.weight, fp32
    head.safetensors                                 RewardHead, fp32
    SHA256SUMS                                       of the weights; absent in directories of earlier versions

A fit saves its averaged weights (EMA) here, and nothing else: raw weights, averages, optimizer moments and the step,
which only the fit itself needs, stay in the checkpoints of its run directory. The adapter's key names and the head's
are those of the published checkpoint (`published.py`). A directory appears whole or not at all.
"""

from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dina_rl.backbones.base import Backbone
from dina_rl.checkpoint import replaced_directory
from dina_rl.config import PipelineConfig
from dina_rl.data.buckets import Size
from dina_rl.reward import published
from dina_rl.reward.card import (
    CARD_FILE,
    LORA_DIRECTORY,
    RewardCard,
    check_tensors,
    load_adapter,
    make_card,
    save_adapter,
)
from dina_rl.reward.model import LatentRewardModel
from dina_rl.sums import check_all_sums, sum_files
from dina_rl.textfiles import parse_json, read_text, regular

HEAD_FILE = "head.safetensors"


def save_reward(
    model: LatentRewardModel,
    directory: Path,
    *,
    pipeline: PipelineConfig,
    buckets: Sequence[Size] | None = None,
    pictures: str | None = None,
) -> None:
    """Write `model`'s current weights to `directory`, replacing a reward model that lies there.

    Args:
        pipeline: what `model.backbone` was opened on; recorded in the card.
        buckets: sizes of the images of the fit; None: all were stretched to the pipeline's. Recorded likewise.
        pictures: how they were read; None: unknown. Recorded likewise.
    """
    with replaced_directory(directory, lasting=True) as fresh:
        (fresh / CARD_FILE).write_text(make_card(model, pipeline, buckets, pictures).model_dump_json(indent=2) + "\n")
        head = {name: tensor.detach().cpu().contiguous() for name, tensor in model.head.state_dict().items()}
        save_file(head, fresh / HEAD_FILE)
        if model.config.lora is not None:
            save_adapter(model, fresh / LORA_DIRECTORY, targets=model.backbone.lora_targets)
        sum_files(fresh)


def read_card(directory: str | Path) -> RewardCard:
    """The card of a saved reward model, or what the published checkpoint's configuration says of it.

    Args:
        directory: a directory, or a hub id, which is downloaded if it is not there yet.

    Raises:
        ValueError: no such directory, or not a reward model of either format.
    """
    return _read(directory)[1]


def load_reward(directory: str | Path, backbone: Backbone) -> LatentRewardModel:
    """The reward model saved in `directory` on `backbone` and its device: eval mode, every parameter frozen.

    Args:
        directory: of either format; a directory or a hub id.
        backbone: the pipeline that the card names, or one with the same transformer.

    Raises:
        ValueError: no such directory, broken or foreign files, or a backbone of another width or depth.
    """
    where, card, is_published = _read(directory)
    if card.width != backbone.width:
        raise ValueError(
            f"reward model {directory} was fitted on a backbone of width {card.width} ({card.pipeline}), "
            f"this one has width {backbone.width}"
        )
    model = LatentRewardModel(backbone, card.reward, seed=0)
    if is_published:
        published.load_weights(model, where)
    else:
        _load_weights(model, where)
    return model.requires_grad_(False).eval()  # peft's setters turn requires_grad on


def _read(directory: str | Path) -> tuple[Path, RewardCard, bool]:
    """(where the files lie, the card, whether it is of the published layout)."""
    where = published.local_directory(directory)
    file = where / CARD_FILE
    if not file.is_file():
        raise ValueError(f"reward model {directory} does not exist (no {CARD_FILE}); fit one with jobs.fit_reward")
    try:
        raw = parse_json(read_text(file))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    is_published = published.is_published(raw)
    try:
        card = published.card(raw, where) if is_published else RewardCard.model_validate(raw)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        path = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{file} is not a reward model of this format: {path} {first['msg']}") from error
    return where, card, is_published


def _load_weights(model: LatentRewardModel, directory: Path) -> None:
    file = directory / HEAD_FILE
    try:
        head = load_file(regular(file))
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} cannot be read: {' '.join(str(error).split())}") from error
    check_all_sums(directory)
    check_tensors(head, model.head.state_dict(), file)
    model.head.load_state_dict(head)
    if model.config.lora is not None:
        load_adapter(model, directory / LORA_DIRECTORY)
