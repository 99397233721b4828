"""Stable Diffusion 3 / 3.5: `SD3Transformer2DModel`, three text encoders, 16-channel VAE."""

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

import torch
from diffusers.models import SD3Transformer2DModel
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from torch import nn
from transformers import CLIPTextConfig

from dina_rl.backbones.base import Features
from dina_rl.backbones.codec import KLCodec, LatentGrid, load_kl_codec, pixels_per_latent
from dina_rl.backbones.files import Need, check_files, left_out
from dina_rl.backbones.lora import export_adapter
from dina_rl.backbones.schedule import scheduled_sigmas
from dina_rl.backbones.source import Options, Source, check_config, refuse_distilled_guidance
from dina_rl.backbones.text import (
    CACHED_PROMPTS,
    CachedTextEncoder,
    CutPrompts,
    cut_by,
    load_text_pipeline,
    load_tokenizers,
    own_text_length,
)
from dina_rl.backbones.transformer import load_frozen, without_weights
from dina_rl.types import PromptEmbeds

TEXT_PARTS = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
T5_PARTS = ("text_encoder_3", "tokenizer_3")  # a pipeline may be without: zeros stand for its tokens


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

    lora_targets: tuple[str, ...] = (
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

    def __init__(self, source: Source, options: Options) -> None:
        self.path = source.path
        self.dtype = options.dtype
        self.device = options.device
        self._source, self._options = source, options
        refuse_distilled_guidance(source, options)
        self.max_sequence_length = options.max_sequence_length or own_text_length(
            StableDiffusion3Pipeline, source, "tokenizer_3"
        )
        config = SD3Transformer2DModel.load_config(self.path, **source.config("transformer"))
        self.num_blocks = config["num_layers"]
        self.last_tap = self.num_blocks - 1  # the last block has no text output
        self.width = config["num_attention_heads"] * config["attention_head_dim"]
        self.time_width = self.width
        if (Path(self.path) / "text_encoder").is_dir():  # else there are stored embeddings, and CLIP's own length holds
            check_config(source, "text_encoder")
        clip_tokens = CLIPTextConfig.from_pretrained(
            self.path, subfolder="text_encoder", revision=source.revision or "main"
        ).max_position_embeddings
        text_width, pooled_width = config["joint_attention_dim"], config["pooled_projection_dim"]
        self.prompt_shape = clip_tokens + self.max_sequence_length, text_width, pooled_width
        pixels = pixels_per_latent(source)
        self.image_size = (config["sample_size"] * pixels,) * 2
        self.grid = LatentGrid(
            path=self.path,
            channels=config["in_channels"],
            patch=config["patch_size"],
            pixels=pixels,
            largest=config["pos_embed_max_size"] * config["patch_size"],
        )

    def check(self, *needs: Need) -> None:
        check_files(self._source, *needs, text=TEXT_PARTS, optional=T5_PARTS)

    def load_transformer(self) -> SD3Transformer2DModel:
        transformer: SD3Transformer2DModel = load_frozen(SD3Transformer2DModel, self._source, self.dtype, self.device)
        return transformer

    def empty_transformer(self) -> SD3Transformer2DModel:
        transformer: SD3Transformer2DModel = without_weights(SD3Transformer2DModel, self._source, self.dtype)
        return transformer

    def load_text_encoder(self, *, cached: int = CACHED_PROMPTS) -> CachedTextEncoder:
        """CLIP-L, CLIP-G and T5 through the stock pipeline's `encode_prompt`; zeros for T5 where there is none."""
        self.check("text")
        pipeline = load_text_pipeline(
            StableDiffusion3Pipeline, self._source, self._options, left_out(self._source, T5_PARTS)
        )
        if pipeline.text_encoder_3 is None:
            pipeline.register_modules(transformer=self.empty_transformer())  # the zeros' width is read of it

        def encode(prompts: Sequence[str]) -> PromptEmbeds:
            embeds, _, pooled, _ = pipeline.encode_prompt(
                prompt=list(prompts),
                prompt_2=list(prompts),
                prompt_3=list(prompts),
                device=torch.device(self.device),
                do_classifier_free_guidance=False,
                max_sequence_length=self.max_sequence_length,
            )
            return PromptEmbeds(embeds=embeds, pooled=pooled)

        return CachedTextEncoder(encode, self.device, cached=cached)

    def cut_prompts(self, prompts: Sequence[str]) -> CutPrompts:
        """By CLIP-L, whose tokens are CLIP-G's, and by T5."""
        encoders = {"text_encoder": None, "text_encoder_2": None, "text_encoder_3": None}
        pipeline = load_tokenizers(
            StableDiffusion3Pipeline, self._source, {**encoders, **left_out(self._source, T5_PARTS)}
        )
        clip, t5 = pipeline.tokenizer, pipeline.tokenizer_3
        return cut_by((("CLIP", clip, clip.model_max_length), ("T5", t5, self.max_sequence_length)), prompts)

    def load_codec(self) -> KLCodec:
        return load_kl_codec(self._source, self._options)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        return self.grid.shape(height, width)

    def sigmas(self, num_steps: int, height: int, width: int) -> torch.Tensor:
        return scheduled_sigmas(self._source, num_steps, self.grid.tokens(height, width))

    def velocity(
        self, transformer: nn.Module, latents: torch.Tensor, sigma: torch.Tensor, prompt: PromptEmbeds
    ) -> torch.Tensor:
        velocity: torch.Tensor = transformer(
            hidden_states=latents.to(self.dtype),
            timestep=1000 * sigma,
            encoder_hidden_states=prompt.embeds,
            pooled_projections=prompt.pooled,
            return_dict=False,
        )[0]
        return velocity.float()

    def truncated(self, transformer: nn.Module, num_blocks: int) -> TruncatedSD3:
        if not 1 <= num_blocks <= self.last_tap:
            raise ValueError(
                f"a reward on {self.path} can use blocks 1 to {self.last_tap} (the last of its {self.num_blocks} "
                f"blocks has no text output), not {num_blocks}"
            )
        assert isinstance(transformer, SD3Transformer2DModel)
        return TruncatedSD3(transformer, num_blocks)

    def features(
        self,
        truncated: nn.Module,
        latents: torch.Tensor,
        sigma: torch.Tensor,
        prompt: PromptEmbeds,
        taps: Sequence[int],
    ) -> Features:
        features: Features = truncated(latents.to(self.dtype), 1000 * sigma, prompt, taps)
        return features

    def save_adapter(
        self, directory: Path, state: dict[str, torch.Tensor], *, rank: int, alpha: float, targets: Sequence[str]
    ) -> Path:
        save = StableDiffusion3Pipeline.save_lora_weights
        return export_adapter(save, directory, state, rank=rank, alpha=alpha, targets=targets)

    def convert_adapter(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        converted: dict[str, torch.Tensor] = StableDiffusion3Pipeline.lora_state_dict(tensors)
        return converted
