"""Pictures of captions from a pipeline directory, many at a time: what pretraining and the preference set draw with."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dina_rl.backbones.base import Backbone, LatentCodec, TextEncoder
from dina_rl.backbones.guidance import guided_velocity
from dina_rl.backbones.registry import open_backbone
from dina_rl.flow.sampler import denoise
from dina_rl.shapes.pipeline import MAX_SEQUENCE_LENGTH
from dina_rl.shapes.render import IMAGE_SIZE

BATCH = 128  # images that go through a network at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Studio:
    """The opened parts of one pipeline."""

    backbone: Backbone
    transformer: nn.Module
    text_encoder: TextEncoder
    codec: LatentCodec


def open_studio(path: Path) -> Studio:
    """Open a shapes pipeline directory in fp32 on the CPU.

    Raises:
        ValueError: there is no pipeline of a known class at `path`.
    """
    backbone = open_backbone(path, max_sequence_length=MAX_SEQUENCE_LENGTH)
    return Studio(
        backbone=backbone,
        transformer=backbone.load_transformer(),
        text_encoder=backbone.load_text_encoder(),
        codec=backbone.load_codec(),
    )


def draw(
    studio: Studio, captions: Sequence[str], *, num_steps: int, guidance: float, generator: torch.Generator
) -> Tensor:
    """One image per caption, [B, 3, 32, 32] in [0, 1], by Euler steps with classifier-free guidance.

    Args:
        guidance: 1 is the conditional model alone.
        generator: source of the initial noise, drawn for all captions at once.
    """
    prompt = studio.text_encoder(captions)
    shape = studio.backbone.latent_shape(IMAGE_SIZE, IMAGE_SIZE)
    noise = torch.randn(len(captions), *shape, generator=generator)
    sigmas = studio.backbone.sigmas(num_steps, IMAGE_SIZE, IMAGE_SIZE)
    negative = None if guidance == 1 else studio.text_encoder([""])

    def finished(rows: Tensor) -> Tensor:
        velocity = guided_velocity(studio.backbone, studio.transformer, prompt.select(rows), negative, guidance)
        return denoise(noise[rows], sigmas, velocity).latents

    parts = [finished(rows) for rows in torch.arange(len(captions)).split(BATCH)]
    return decode(studio.codec, torch.cat(parts))


def encode(codec: LatentCodec, images: Tensor) -> Tensor:
    """Normalised latents [B, 16, 8, 8] of images [B, 3, 32, 32] in [0, 1], in batches."""
    return torch.cat([codec.encode(_channels_last(part)) for part in images.split(BATCH)]).contiguous()


def decode(codec: LatentCodec, latents: Tensor) -> Tensor:
    """Images [B, 3, 32, 32] in [0, 1] of normalised latents [B, 16, 8, 8], in batches."""
    return torch.cat([codec.decode(_channels_last(part)) for part in latents.split(BATCH)]).contiguous()


def _channels_last(images: Tensor) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last)  # twice as fast for small convolutions on a CPU
