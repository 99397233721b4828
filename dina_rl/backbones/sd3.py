"""Stable Diffusion 3 / 3.5: `SD3Transformer2DModel`, three text encoders, 16-channel VAE."""

import os
import tempfile
from collections import OrderedDict
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import nn
from transformers import CLIPTextConfig

from dina_rl.backbones.base import Features
from dina_rl.types import PromptEmbeds

CACHED_PROMPTS = 4096  # SD3.5: 333 tokens x 4096 x 2 bytes = 2.7 MB each, 11 GB when full; the tiny world: 4 KB each
LORA_FILE = "pytorch_lora_weights.safetensors"


class SD3TextEncoder:
    """CLIP-L, CLIP-G and T5 through the stock pipeline's `encode_prompt`; distinct prompts are encoded once (LRU)."""

    def __init__(self, pipeline: StableDiffusion3Pipeline, device: str, max_sequence_length: int) -> None:
        self._pipeline = pipeline
        self._device = device
        self._max_sequence_length = max_sequence_length
        self._cache: OrderedDict[str, PromptEmbeds] = OrderedDict()

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> PromptEmbeds:
        return PromptEmbeds.cat([self._one(prompt) for prompt in prompts]).to(self._device)

    def _one(self, prompt: str) -> PromptEmbeds:
        # One prompt at a time: an embedding must not depend on which prompts happened to share its batch.
        if prompt not in self._cache:
            embeds, _, pooled, _ = self._pipeline.encode_prompt(
                prompt=prompt,
                prompt_2=None,
                prompt_3=None,
                device=torch.device(self._device),
                do_classifier_free_guidance=False,
                max_sequence_length=self._max_sequence_length,
            )
            self._cache[prompt] = PromptEmbeds(embeds=embeds, pooled=pooled).to("cpu")  # GPU memory is dear
            if len(self._cache) > CACHED_PROMPTS:
                self._cache.popitem(last=False)
        self._cache.move_to_end(prompt)
        return self._cache[prompt]


class SD3Codec:
    """The frozen VAE with its shift and scale: latents = (z - shift) * scale."""

    def __init__(self, vae: AutoencoderKL) -> None:
        self._vae = vae

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        pixels = (images * 2 - 1).to(self._vae.device, self._vae.dtype)
        latent = self._vae.encode(pixels).latent_dist.mode().float()
        return (latent - self._vae.config.shift_factor) * self._vae.config.scaling_factor

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        latent = latents / self._vae.config.scaling_factor + self._vae.config.shift_factor
        pixels = self._vae.decode(latent.to(self._vae.device, self._vae.dtype)).sample.float()
        return (pixels / 2 + 0.5).clamp(0, 1)


class TruncatedSD3(nn.Module):
    """Embedders and first blocks of an `SD3Transformer2DModel`; copies, so adapters on it never touch the generator."""

    def __init__(self, transformer: SD3Transformer2DModel, num_blocks: int) -> None:
        super().__init__()
        self.pos_embed = deepcopy(transformer.pos_embed)
        self.time_text_embed = deepcopy(transformer.time_text_embed)
        self.context_embedder = deepcopy(transformer.context_embedder)
        self.transformer_blocks = deepcopy(transformer.transformer_blocks[:num_blocks])

    def forward(
        self, latents: torch.Tensor, timestep: torch.Tensor, prompt: PromptEmbeds, taps: Sequence[int]
    ) -> Features:
        """Same arithmetic as the head of `SD3Transformer2DModel.forward`; `timestep` [B] in [0, 1000]."""
        visual = self.pos_embed(latents).contiguous()
        time_embedding = self.time_text_embed(timestep, prompt.pooled)
        text = self.context_embedder(prompt.embeds)
        tapped = {}
        for number, block in enumerate(self.transformer_blocks, start=1):
            text, visual = block(hidden_states=visual, encoder_hidden_states=text, temb=time_embedding)
            if number in taps:
                tapped[number] = (visual, text)
        return Features(
            visual=tuple(tapped[tap][0] for tap in taps),
            text=tuple(tapped[tap][1] for tap in taps),
            time_embedding=time_embedding,
        )


class SD3:
    """`Backbone` for `StableDiffusion3Pipeline` directories and hub ids (SD3, SD3.5 medium and large)."""

    lora_targets = (
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_q_proj",
        "attn.add_k_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
        "attn2.to_q",
        "attn2.to_k",
        "attn2.to_v",
        "attn2.to_out.0",
    )

    def __init__(self, path: str | Path, *, dtype: torch.dtype, device: str, max_sequence_length: int) -> None:
        self.path = str(path)
        self.dtype = dtype
        self.device = device
        self.max_sequence_length = max_sequence_length
        config = SD3Transformer2DModel.load_config(self.path, subfolder="transformer")
        vae = AutoencoderKL.load_config(self.path, subfolder="vae")
        self.num_blocks = config["num_layers"]
        self.width = config["num_attention_heads"] * config["attention_head_dim"]
        clip_tokens = CLIPTextConfig.from_pretrained(self.path, subfolder="text_encoder").max_position_embeddings
        text_width, pooled_width = config["joint_attention_dim"], config["pooled_projection_dim"]
        self.prompt_shape = clip_tokens + max_sequence_length, text_width, pooled_width
        self._channels = config["in_channels"]
        self._patch = config["patch_size"]
        self._largest = config["pos_embed_max_size"] * config["patch_size"]
        self._pixels_per_latent = 2 ** (len(vae["block_out_channels"]) - 1)

    def load_transformer(self) -> SD3Transformer2DModel:
        transformer = SD3Transformer2DModel.from_pretrained(self.path, subfolder="transformer", dtype=self.dtype)
        return transformer.to(self.device).requires_grad_(False).eval()

    def empty_transformer(self) -> SD3Transformer2DModel:
        config = SD3Transformer2DModel.load_config(self.path, subfolder="transformer")
        with torch.device("meta"):
            return SD3Transformer2DModel.from_config(config).to(self.dtype).eval()

    def load_text_encoder(self) -> SD3TextEncoder:
        pipeline = StableDiffusion3Pipeline.from_pretrained(self.path, transformer=None, vae=None, dtype=self.dtype)
        return SD3TextEncoder(pipeline.to(self.device), self.device, self.max_sequence_length)

    def load_codec(self) -> SD3Codec:
        vae = AutoencoderKL.from_pretrained(self.path, subfolder="vae", dtype=self.dtype)
        # channels_last: the convolutions of the encoder run twice as fast on CPUs
        vae = vae.to(self.device, memory_format=torch.channels_last)
        return SD3Codec(vae.requires_grad_(False).eval())

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        multiple = self._pixels_per_latent * self._patch
        if height % multiple or width % multiple:
            raise ValueError(f"image size {height}x{width} must be a multiple of {multiple} for {self.path}")
        h, w = height // self._pixels_per_latent, width // self._pixels_per_latent
        if max(h, w) > self._largest:
            raise ValueError(
                f"image size {height}x{width} is beyond the {self._largest * self._pixels_per_latent} pixels that the "
                f"position table of {self.path} covers"
            )
        return self._channels, h, w

    def sigmas(self, num_steps: int) -> torch.Tensor:
        # A scheduler of its own for every table: set_timesteps mutates the object, and the shift is applied once.
        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(self.path, subfolder="scheduler")
        scheduler.set_timesteps(num_steps)
        return scheduler.sigmas.float()

    def velocity(
        self, transformer: nn.Module, latents: torch.Tensor, sigma: torch.Tensor, prompt: PromptEmbeds
    ) -> torch.Tensor:
        return transformer(
            hidden_states=latents.to(self.dtype),
            timestep=1000 * sigma,
            encoder_hidden_states=prompt.embeds,
            pooled_projections=prompt.pooled,
            return_dict=False,
        )[0].float()

    def truncated(self, transformer: nn.Module, num_blocks: int) -> TruncatedSD3:
        if not 1 <= num_blocks < self.num_blocks:
            raise ValueError(
                f"a reward on {self.path} can use blocks 1 to {self.num_blocks - 1} (the last of its {self.num_blocks} "
                f"blocks has no text output), not {num_blocks}"
            )
        return TruncatedSD3(transformer, num_blocks)

    def features(
        self,
        truncated: nn.Module,
        latents: torch.Tensor,
        sigma: torch.Tensor,
        prompt: PromptEmbeds,
        taps: Sequence[int],
    ) -> Features:
        return truncated(latents.to(self.dtype), 1000 * sigma, prompt, taps)

    def save_adapter(
        self, directory: Path, state: dict[str, torch.Tensor], *, rank: int, alpha: float, targets: Sequence[str]
    ) -> Path:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory, prefix=".writing-") as writing:
            StableDiffusion3Pipeline.save_lora_weights(
                writing,
                transformer_lora_layers=state,
                weight_name=LORA_FILE,
                transformer_lora_adapter_metadata={
                    "r": rank,
                    "lora_alpha": alpha,
                    "target_modules": list(targets),
                },
            )
            os.replace(Path(writing) / LORA_FILE, directory / LORA_FILE)
        return directory / LORA_FILE
