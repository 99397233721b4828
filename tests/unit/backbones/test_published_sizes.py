"""Parameter counts at the published sizes, on the meta device: nothing is allocated."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel, SD3Transformer2DModel, ZImageTransformer2DModel
from torch import nn

from dina_rl.backbones.base import Backbone
from dina_rl.backbones.lora import add_lora, trainable
from dina_rl.backbones.registry import open_backbone
from dina_rl.reward.head import RewardHead


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


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def opened(directory: Path, published: Published) -> tuple[Backbone, nn.Module]:
    """The backbone on a directory that holds the configurations only, and its whole transformer on meta tensors."""
    with torch.device("meta"):
        transformer = published.transformer(**published.config)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(32,) * 4,
            latent_channels=16,
        )
    transformer.save_config(directory / "transformer")
    vae.save_config(directory / "vae")
    (directory / "model_index.json").write_text(json.dumps({"_class_name": published.pipeline}))
    return open_backbone(directory), transformer


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_reward_model_has_the_published_sizes(tmp_path: Path, name: str) -> None:
    published = PUBLISHED[name]
    backbone, transformer = opened(tmp_path, published)
    assert count(transformer) == published.parameters
    assert backbone.latent_shape(1024, 1024) == (16, 128, 128)

    truncated = backbone.truncated(transformer, published.taps[-1])
    assert count(truncated) == published.truncated
    assert all(parameter.is_meta for parameter in truncated.parameters())

    add_lora(truncated, rank=published.lora_rank, alpha=1.0, targets=backbone.lora_targets, seed=0)
    assert sum(parameter.numel() for parameter in trainable(truncated).values()) == published.lora

    with torch.device("meta"):
        head = RewardHead(
            published.head_width or backbone.width,
            token_width=backbone.width,
            time_width=backbone.time_width,
            num_taps=len(published.taps),
            num_queries=4,
            num_heads=8,
        )
    assert count(head) == published.head
