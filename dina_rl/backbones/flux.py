"""FLUX.1: `FluxTransformer2DModel`, CLIP and T5, 16-channel VAE.

The model reads latents packed 2x2 into tokens, a time in [0, 1] and, in FLUX.1-dev, a distilled guidance scale. All of
that stays in this file: outside, latents are [B, 16, h, w] and time is sigma. Features come from the 19 double blocks,
in which visual and text tokens are two streams; the 38 single blocks after them belong to the policy only.
"""

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

import torch
from diffusers.models import FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from torch import nn

from dina_rl.backbones.base import Features
from dina_rl.backbones.codec import KLCodec, LatentGrid, load_kl_codec, pixels_per_latent
from dina_rl.backbones.files import Need, check_files
from dina_rl.backbones.lora import export_adapter
from dina_rl.backbones.schedule import shifted_sigmas
from dina_rl.backbones.source import Options, Source, refuse_distilled_guidance
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

TEXT_PARTS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")

# An input of FLUX.1-dev, not a second forward: the stock pipeline's default. The generator may be given another one
# (`pipeline.distilled_guidance`), the reward model sees this one in its fit and ever after. The rollout's guidance
# scale is classifier-free guidance on top of it (the stock pipeline's `true_cfg_scale`).
DISTILLED_GUIDANCE = 3.5
DEFAULT_LATENTS = 128  # per side: the stock pipeline's `default_sample_size`


class TruncatedFlux(nn.Module):
    """Embedders and first double blocks of a `FluxTransformer2DModel`; copies, as in `TruncatedSD3`."""

    def __init__(self, transformer: FluxTransformer2DModel, num_blocks: int) -> None:
        super().__init__()
        self.pos_embed = deepcopy(transformer.pos_embed)
        self.x_embedder = deepcopy(transformer.x_embedder)
        self.time_text_embed = deepcopy(transformer.time_text_embed)
        self.context_embedder = deepcopy(transformer.context_embedder)
        self.transformer_blocks = deepcopy(transformer.transformer_blocks[:num_blocks])

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        pooled_projections: torch.Tensor,
        timestep: torch.Tensor,
        guidance: torch.Tensor | None,
        img_ids: torch.Tensor,
        txt_ids: torch.Tensor,
        taps: Sequence[int],
    ) -> Features:
        """Same arithmetic on the same arguments as the head of `FluxTransformer2DModel.forward`."""
        visual = self.x_embedder(hidden_states)
        conditions = [1000 * scalar.to(visual.dtype) for scalar in (timestep, guidance) if scalar is not None]
        time_embedding = self.time_text_embed(*conditions, pooled_projections)
        text = self.context_embedder(encoder_hidden_states)
        rotary = self.pos_embed(torch.cat([txt_ids, img_ids]))
        tapped = {}
        for number, block in enumerate(self.transformer_blocks, start=1):
            text, visual = block(
                hidden_states=visual, encoder_hidden_states=text, temb=time_embedding, image_rotary_emb=rotary
            )
            if number in taps:
                tapped[number] = (visual, text)
        return Features(
            visual=tuple(tapped[tap][0] for tap in taps),
            text=tuple(tapped[tap][1] for tap in taps),
            time_embedding=time_embedding,
        )


class Flux:
    """`Backbone` for `FluxPipeline` directories and hub ids (FLUX.1-dev, and FLUX.1-schnell, which has no guidance)."""

    lora_targets: tuple[str, ...] = (
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_q_proj",
        "attn.add_k_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
    )

    def __init__(self, source: Source, options: Options) -> None:
        self.path = source.path
        self.dtype = options.dtype
        self.device = options.device
        self._source, self._options = source, options
        self.max_sequence_length = options.max_sequence_length or own_text_length(FluxPipeline, source, "tokenizer_2")
        config = FluxTransformer2DModel.load_config(self.path, **source.config("transformer"))
        self.num_blocks = config["num_layers"]
        self.last_tap = self.num_blocks
        self.width = config["num_attention_heads"] * config["attention_head_dim"]
        self.time_width = self.width
        self.prompt_shape = self.max_sequence_length, config["joint_attention_dim"], config["pooled_projection_dim"]
        self._guided = config["guidance_embeds"]
        if not self._guided:
            refuse_distilled_guidance(source, options)
        given = options.distilled_guidance
        self._generator_guidance = DISTILLED_GUIDANCE if given is None else given
        pixels = pixels_per_latent(source)
        self.image_size = (DEFAULT_LATENTS * pixels,) * 2
        self.grid = LatentGrid(path=self.path, channels=config["in_channels"] // 4, patch=2, pixels=pixels)

    def check(self, *needs: Need) -> None:
        check_files(self._source, *needs, text=TEXT_PARTS)

    def load_transformer(self) -> FluxTransformer2DModel:
        transformer: FluxTransformer2DModel = load_frozen(FluxTransformer2DModel, self._source, self.dtype, self.device)
        return transformer

    def empty_transformer(self) -> FluxTransformer2DModel:
        transformer: FluxTransformer2DModel = without_weights(FluxTransformer2DModel, self._source, self.dtype)
        return transformer

    def load_text_encoder(self, *, cached: int = CACHED_PROMPTS) -> CachedTextEncoder:
        """T5's tokens and CLIP-L's pooled embedding through the stock pipeline's `encode_prompt`."""
        self.check("text")
        pipeline = load_text_pipeline(FluxPipeline, self._source, self._options)

        def encode(prompts: Sequence[str]) -> PromptEmbeds:
            embeds, pooled, _ = pipeline.encode_prompt(
                prompt=list(prompts), device=torch.device(self.device), max_sequence_length=self.max_sequence_length
            )
            return PromptEmbeds(embeds=embeds, pooled=pooled)

        return CachedTextEncoder(encode, self.device, cached=cached)

    def cut_prompts(self, prompts: Sequence[str]) -> CutPrompts:
        """By CLIP-L and by T5."""
        pipeline = load_tokenizers(FluxPipeline, self._source, {"text_encoder": None, "text_encoder_2": None})
        clip, t5 = pipeline.tokenizer, pipeline.tokenizer_2
        return cut_by((("CLIP", clip, clip.model_max_length), ("T5", t5, self.max_sequence_length)), prompts)

    def load_codec(self) -> KLCodec:
        return load_kl_codec(self._source, self._options)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        return self.grid.shape(height, width)

    def sigmas(self, num_steps: int, height: int, width: int) -> torch.Tensor:
        return shifted_sigmas(self._source, num_steps, self.grid.tokens(height, width))

    def velocity(
        self, transformer: nn.Module, latents: torch.Tensor, sigma: torch.Tensor, prompt: PromptEmbeds
    ) -> torch.Tensor:
        tokens: torch.Tensor = transformer(
            **self._inputs(latents, sigma, prompt, self._generator_guidance), return_dict=False
        )[0]
        return unpack(tokens, *latents.shape[-2:]).float()

    def truncated(self, transformer: nn.Module, num_blocks: int) -> TruncatedFlux:
        if not 1 <= num_blocks <= self.last_tap:
            raise ValueError(
                f"a reward on {self.path} can use blocks 1 to {self.last_tap} (its double blocks), not {num_blocks}"
            )
        assert isinstance(transformer, FluxTransformer2DModel)
        return TruncatedFlux(transformer, num_blocks)

    def features(
        self,
        truncated: nn.Module,
        latents: torch.Tensor,
        sigma: torch.Tensor,
        prompt: PromptEmbeds,
        taps: Sequence[int],
    ) -> Features:
        features: Features = truncated(**self._inputs(latents, sigma, prompt, DISTILLED_GUIDANCE), taps=taps)
        return features

    def save_adapter(
        self, directory: Path, state: dict[str, torch.Tensor], *, rank: int, alpha: float, targets: Sequence[str]
    ) -> Path:
        save = FluxPipeline.save_lora_weights
        return export_adapter(save, directory, state, rank=rank, alpha=alpha, targets=targets)

    def convert_adapter(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        converted: dict[str, torch.Tensor] = FluxPipeline.lora_state_dict(tensors)
        return converted

    def _inputs(
        self, latents: torch.Tensor, sigma: torch.Tensor, prompt: PromptEmbeds, guidance: float
    ) -> dict[str, torch.Tensor | None]:
        """What the stock pipeline passes to its transformer at `sigma`.

        In bfloat16 it rounds the timestep 1000 sigma, and the transformer rounds guidance, before they are embedded:
        steps of 4 near sigma = 1. We do the same, so that the network sees the times it would see there. The latents
        between steps are fp32 here, whereas the stock pipeline rounds them too.
        """
        h, w = latents.shape[-2:]
        device = latents.device
        rows, columns = torch.arange(h // 2, device=device), torch.arange(w // 2, device=device)
        return {
            "hidden_states": pack(latents).to(self.dtype),
            "encoder_hidden_states": prompt.embeds,
            "pooled_projections": prompt.pooled,
            "timestep": (1000 * sigma).to(self.dtype) / 1000,
            "guidance": torch.full_like(sigma, guidance) if self._guided else None,
            "img_ids": torch.cartesian_prod(torch.zeros_like(rows[:1]), rows, columns),
            "txt_ids": torch.zeros(prompt.embeds.shape[1], 3, dtype=rows.dtype, device=device),
        }


def pack(latents: torch.Tensor) -> torch.Tensor:
    """Latents [B, C, h, w] -> tokens [B, (h / 2) (w / 2), 4 C], each a 2x2 patch, row by row."""
    cells: torch.Tensor = latents.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # [B, C, h / 2, 2, w / 2, 2]
    return cells.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack(tokens: torch.Tensor, h: int, w: int) -> torch.Tensor:
    """The inverse of `pack`: tokens [B, (h / 2) (w / 2), 4 C] -> latents [B, C, h, w]."""
    cells: torch.Tensor = tokens.unflatten(2, (-1, 2, 2)).unflatten(1, (h // 2, w // 2))  # [B, h / 2, w / 2, C, 2, 2]
    return cells.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
