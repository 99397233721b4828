"""A diffusion family as tests know it: its miniature pipeline beside the stock classes it must equal."""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, FluxPipeline, StableDiffusion3Pipeline, ZImagePipeline
from torch import nn

from dina_rl.backbones.base import Backbone
from dina_rl.backbones.flux import DISTILLED_GUIDANCE, pack, unpack
from dina_rl.backbones.registry import open_backbone

HEIGHT, WIDTH = 32, 40  # 8 x 10 latents, 20 tokens: not square, and not a multiple of Z-Image's 32


@dataclass(frozen=True, kw_only=True)
class Family:
    """What a test must know of a family beyond its `Backbone`."""

    name: str
    path: Path
    max_sequence_length: int
    blocks: str  # attribute of the stock transformer
    after_blocks: tuple[str, ...]  # modules of the stock transformer that follow its blocks
    time_embedder: str  # attribute of the stock transformer

    def open(self, dtype: torch.dtype = torch.float32) -> Backbone:
        return open_backbone(self.path, dtype=dtype, max_sequence_length=self.max_sequence_length)

    def stock(self, dtype: torch.dtype = torch.float32) -> DiffusionPipeline:
        cls = {"sd3": StableDiffusion3Pipeline, "flux": FluxPipeline, "z_image": ZImagePipeline}[self.name]
        pipeline = cls.from_pretrained(self.path, dtype=dtype)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def sample(
        self,
        pipeline: DiffusionPipeline,
        noise: torch.Tensor,
        *,
        guidance: float,
        negative: str = "",
        distilled: float = DISTILLED_GUIDANCE,
        **options,
    ) -> torch.Tensor:
        """The stock pipeline's latents [B, 16, h, w]; guidance 1 is none. Options: `prompt`, `num_inference_steps`."""
        options |= {
            "height": HEIGHT,
            "width": WIDTH,
            "max_sequence_length": self.max_sequence_length,
            "output_type": "latent",
            "negative_prompt": [negative] * len(noise),
        }
        if self.name == "flux":
            options |= {"true_cfg_scale": guidance}
            tokens = pipeline(latents=pack(noise), guidance_scale=distilled, **options).images
            return unpack(tokens, *noise.shape[-2:])
        scale = guidance - 1 if self.name == "z_image" else guidance
        return pipeline(latents=noise, guidance_scale=scale, **options).images


def watch(module: nn.Module) -> list:
    """A list that grows by each output of `module`."""
    outputs: list = []
    module.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    return outputs
