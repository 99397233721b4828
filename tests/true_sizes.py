"""Released pipelines at their true sizes, as directories of configurations without weights; for torch's meta device."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, ZImageTransformer2DModel
from torch import nn


@dataclass(frozen=True, kw_only=True)
class Published:
    """A released pipeline's transformer and the reward model that the paper builds on it (Table 6)."""

    pipeline: str
    transformer: type[nn.Module]
    config: dict  # where it differs from the class's defaults
    parameters: int
    taps: tuple[int, ...]
    truncated: int  # parameters of the blocks up to the last tap and of what feeds them
    lora_rank: int
    lora: int  # parameters
    head_width: int | None
    head: int  # parameters


PUBLISHED = {
    "SD3.5-M": Published(
        pipeline="StableDiffusion3Pipeline",
        transformer=SD3Transformer2DModel,
        config={
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)),
            "qk_norm": "rms_norm",
        },
        parameters=2_243_171_520,
        taps=(4, 8, 12),
        truncated=1_232_739_840,
        lora_rank=64,
        lora=28_311_552,
        head_width=None,
        head=139_296_003,
    ),
    "FLUX.1-dev": Published(
        pipeline="FluxPipeline",
        transformer=FluxTransformer2DModel,
        config={"guidance_embeds": True},
        parameters=11_901_408_320,
        taps=(8, 12, 16, 19),
        truncated=6_501_842_432,
        lora_rank=64,
        lora=59_768_832,
        head_width=1536,
        head=245_492_739,
    ),
    "Z-Image-Turbo": Published(
        pipeline="ZImagePipeline",
        transformer=ZImageTransformer2DModel,
        config={"axes_lens": [1536, 512, 512]},
        parameters=6_154_908_736,
        taps=(4, 8, 12, 16),
        truncated=3_620_931_328,
        lora_rank=32,
        lora=19_660_800,
        head_width=1536,
        head=185_723_907,
    ),
}


def write_pipeline(directory: Path, published: Published) -> Path:
    """A directory that holds the released pipeline's configurations and no weights."""
    with torch.device("meta"):
        config = dict(published.transformer(**published.config).config)
    files = {
        "model_index.json": {"_class_name": published.pipeline},
        "transformer/config.json": config,
        "vae/config.json": {"block_out_channels": [128, 256, 512, 512], "latent_channels": 16},
        "text_encoder/config.json": {"model_type": "clip_text_model", "max_position_embeddings": 77},
    }
    for name, content in files.items():
        (directory / name).parent.mkdir(exist_ok=True, parents=True)
        (directory / name).write_text(json.dumps(content))
    return directory


def complete(directory: Path, tiny: Path) -> Path:
    """Files of the family's miniature stand in for what `directory` lacks: index, tokenizers, scheduler, weights."""
    for file in tiny.rglob("*"):
        copy = directory / file.relative_to(tiny)
        if file.is_file() and (file.name == "model_index.json" or not copy.exists()):
            copy.parent.mkdir(exist_ok=True)
            shutil.copy(file, copy)
    return directory
