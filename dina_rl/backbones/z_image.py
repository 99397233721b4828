"""Z-Image: `ZImageTransformer2DModel`, Qwen3 as text encoder, 16-channel VAE.

The model's time runs from 0 (noise) to 1 and it predicts x0 - eps; here both become sigma and eps - x0. Image and
caption tokens are one sequence, image first, each padded to a multiple of 32 by tokens that the model has learnt.
Guidance: the stock pipeline follows v_cond + s (v_cond - v_uncond), so that its `guidance_scale` s is our s + 1, and
Turbo's 0 is our 1: no guidance.
"""

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

import torch
from diffusers.models import ZImageTransformer2DModel
from diffusers.models.transformers.transformer_z_image import ADALN_EMBED_DIM, SEQ_MULTI_OF
from diffusers.pipelines.z_image.pipeline_z_image import ZImagePipeline
from torch import nn
from torch.nn import functional

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
    load_text_pipeline,
    load_tokenizers,
    longer,
    own_text_length,
)
from dina_rl.backbones.transformer import load_frozen, without_weights
from dina_rl.types import PromptEmbeds

TEXT_PARTS = ("text_encoder", "tokenizer")
PATCH = 2  # latents per token and side; the one that the stock pipeline uses
DEFAULT_SIZE = (1024, 1024)  # pixels, the stock pipeline's
EMBEDDER = f"{PATCH}-1"  # of `all_x_embedder`: that patch, one frame


class TruncatedZImage(nn.Module):
    """Embedders, both refiners and first layers of a `ZImageTransformer2DModel`; copies, as in `TruncatedSD3`."""

    def __init__(self, transformer: ZImageTransformer2DModel, num_blocks: int) -> None:
        super().__init__()
        self.t_scale = transformer.t_scale
        self.rope_embedder = deepcopy(transformer.rope_embedder)
        self.t_embedder = deepcopy(transformer.t_embedder)
        self.all_x_embedder = deepcopy(nn.ModuleDict({EMBEDDER: transformer.all_x_embedder[EMBEDDER]}))
        self.cap_embedder = deepcopy(transformer.cap_embedder)
        self.x_pad_token = deepcopy(transformer.x_pad_token)
        self.cap_pad_token = deepcopy(transformer.cap_pad_token)
        self.noise_refiner = deepcopy(transformer.noise_refiner)
        self.context_refiner = deepcopy(transformer.context_refiner)
        self.layers = deepcopy(transformer.layers[:num_blocks])

    def forward(self, latents: torch.Tensor, time: torch.Tensor, prompt: PromptEmbeds, taps: Sequence[int]) -> Features:
        """Same arithmetic as `ZImageTransformer2DModel.forward` up to its layers, on tensors instead of lists.

        `time` [B] is the model's own, 1 - sigma. Visual features hold the image's padding, text features each caption's
        padding to a multiple of 32, because the model computes with them; `text_mask` leaves out what lies beyond.
        """
        time_embedding = self.t_embedder(time * self.t_scale).type_as(latents)
        lengths = _lengths(prompt)
        padded = [_in_multiples(length) for length in lengths]
        longest = max(padded)
        words, ends = (torch.tensor(each, device=latents.device) for each in (lengths, padded))
        text_mask = None if min(padded) == longest else torch.arange(longest, device=latents.device) < ends[:, None]
        visual, visual_rope = self._image(latents, ends, time_embedding)
        text, text_rope = self._caption(prompt.embeds, words, longest, text_mask)

        tokens, rope = torch.cat([visual, text], 1), torch.cat([visual_rope, text_rope], 1)
        mask = None if text_mask is None else functional.pad(text_mask, (visual.shape[1], 0), value=True)
        tapped = {}
        for number, block in enumerate(self.layers, start=1):
            tokens = block(tokens, mask, rope, time_embedding)
            if number in taps:
                tapped[number] = tokens.split([visual.shape[1], longest], 1)
        return Features(
            visual=tuple(tapped[tap][0] for tap in taps),
            text=tuple(tapped[tap][1] for tap in taps),
            time_embedding=time_embedding,
            text_mask=text_mask,
        )

    def _image(
        self, latents: torch.Tensor, ends: torch.Tensor, time_embedding: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Refined visual tokens [B, N, W] and their rotations, behind captions that end at `ends` [B]."""
        batch, _, h, w = latents.shape
        tokens = self.all_x_embedder[EMBEDDER](_patches(latents))
        padding = _in_multiples(tokens.shape[1]) - tokens.shape[1]
        tokens = torch.cat([tokens, self.x_pad_token.expand(batch, padding, -1)], 1)
        rope = self._rope(_image_positions(ends, h // PATCH, w // PATCH, padding))
        for block in self.noise_refiner:
            tokens = block(tokens, None, rope, time_embedding)
        return tokens, rope

    def _caption(
        self, embeds: torch.Tensor, lengths: torch.Tensor, longest: int, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Refined caption tokens [B, longest, W] and their rotations; pad tokens follow each row's `lengths` [B]."""
        place = torch.arange(longest, device=embeds.device)
        words = functional.pad(embeds, (0, 0, 0, longest - embeds.shape[1]))  # or cuts
        is_word = (place < lengths[:, None])[..., None]
        tokens = torch.where(is_word, self.cap_embedder(words), self.cap_pad_token)
        rope = self._rope(functional.pad(place[:, None] + 1, (0, 2)).expand(len(embeds), -1, -1))
        for block in self.context_refiner:
            tokens = block(tokens, mask, rope)
        return tokens, rope

    def _rope(self, positions: torch.Tensor) -> torch.Tensor:
        """Rotations [B, N, head / 2] of positions [B, N, 3]."""
        rotations: torch.Tensor = self.rope_embedder(positions.flatten(0, 1)).unflatten(0, positions.shape[:2])
        return rotations


class ZImage:
    """`Backbone` for `ZImagePipeline` directories and hub ids (Z-Image, Z-Image-Turbo).

    Captions of one batch are padded to the longest and masked: a row's numbers depend on the others' lengths, by
    rounding. Where micro-batches mix prompts that a rollout call does not, set `grpo.old_log_probs recompute` in fp32,
    as runs below fp32 do by themselves.

    Raises:
        ValueError: `max_sequence_length` is beyond the transformer's position table.
    """

    lora_targets: tuple[str, ...] = ("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0")

    def __init__(self, source: Source, options: Options) -> None:
        self.path = source.path
        self.dtype = options.dtype
        self.device = options.device
        self._source, self._options = source, options
        refuse_distilled_guidance(source, options)
        self.max_sequence_length = options.max_sequence_length or own_text_length(ZImagePipeline, source, "tokenizer")
        config = ZImageTransformer2DModel.load_config(self.path, **source.config("transformer"))
        self.num_blocks = config["n_layers"]
        self.last_tap = self.num_blocks
        self.width = config["dim"]
        self.time_width = min(config["dim"], ADALN_EMBED_DIM)
        self.prompt_shape = self.max_sequence_length, config["cap_feat_dim"], 0
        positions, rows, columns = config["axes_lens"]
        if _in_multiples(self.max_sequence_length) + 1 >= positions:  # captions start at 1, the image sits behind them
            raise ValueError(
                f"max_sequence_length {self.max_sequence_length} is beyond the {positions} positions of {self.path}"
            )
        self.image_size = DEFAULT_SIZE
        self.grid = LatentGrid(
            path=self.path,
            channels=config["in_channels"],
            patch=PATCH,
            pixels=pixels_per_latent(source),
            largest=PATCH * min(rows, columns),
        )

    def check(self, *needs: Need) -> None:
        check_files(self._source, *needs, text=TEXT_PARTS)

    def load_transformer(self) -> ZImageTransformer2DModel:
        stock = ZImageTransformer2DModel
        transformer: ZImageTransformer2DModel = load_frozen(stock, self._source, self.dtype, self.device)
        return transformer

    def empty_transformer(self) -> ZImageTransformer2DModel:
        transformer: ZImageTransformer2DModel = without_weights(ZImageTransformer2DModel, self._source, self.dtype)
        return transformer

    def load_text_encoder(self, *, cached: int = CACHED_PROMPTS) -> CachedTextEncoder:
        """Qwen3's last hidden states but one of the chat, through the stock pipeline's `encode_prompt`."""
        self.check("text")
        pipeline = load_text_pipeline(ZImagePipeline, self._source, self._options)

        def encode(prompts: Sequence[str]) -> PromptEmbeds:
            rows, _ = pipeline.encode_prompt(
                prompt=list(prompts),
                device=torch.device(self.device),
                do_classifier_free_guidance=False,
                max_sequence_length=self.max_sequence_length,
            )
            length = self.max_sequence_length
            return PromptEmbeds(
                embeds=torch.stack([functional.pad(row, (0, 0, 0, length - len(row))) for row in rows]),
                pooled=rows[0].new_empty(len(rows), 0),
                lengths=torch.tensor([len(row) for row in rows]),
            )

        return CachedTextEncoder(encode, self.device, cached=cached)

    def cut_prompts(self, prompts: Sequence[str]) -> CutPrompts:
        """By Qwen3, in the chat that the stock pipeline makes of a prompt."""
        pipeline = load_tokenizers(ZImagePipeline, self._source, {"text_encoder": None})

        def chat(prompt: str) -> str:
            text: str = pipeline.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=True
            )
            return text

        chats = {chat(prompt): prompt for prompt in prompts}
        cut = longer(tuple(chats), pipeline.tokenizer, self.max_sequence_length)
        return {f"the chat's {self.max_sequence_length} tokens": [chats[each] for each in cut]} if cut else {}

    def load_codec(self) -> KLCodec:
        return load_kl_codec(self._source, self._options)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        return self.grid.shape(height, width)

    def sigmas(self, num_steps: int, height: int, width: int) -> torch.Tensor:
        return shifted_sigmas(self._source, num_steps, self.grid.tokens(height, width))

    def velocity(
        self, transformer: nn.Module, latents: torch.Tensor, sigma: torch.Tensor, prompt: PromptEmbeds
    ) -> torch.Tensor:
        frames = list(latents.to(self.dtype).unsqueeze(2))  # of [C, 1, h, w]
        captions = [row[:length] for row, length in zip(prompt.embeds, _lengths(prompt), strict=True)]
        towards_image: list[torch.Tensor] = transformer(frames, _time(sigma), captions, return_dict=False)[0]
        return -torch.stack(towards_image).squeeze(2).float()

    def truncated(self, transformer: nn.Module, num_blocks: int) -> TruncatedZImage:
        if not 1 <= num_blocks <= self.last_tap:
            raise ValueError(f"a reward on {self.path} can use blocks 1 to {self.last_tap}, not {num_blocks}")
        assert isinstance(transformer, ZImageTransformer2DModel)
        return TruncatedZImage(transformer, num_blocks)

    def features(
        self,
        truncated: nn.Module,
        latents: torch.Tensor,
        sigma: torch.Tensor,
        prompt: PromptEmbeds,
        taps: Sequence[int],
    ) -> Features:
        features: Features = truncated(latents.to(self.dtype), _time(sigma), prompt, taps)
        return features

    def save_adapter(
        self, directory: Path, state: dict[str, torch.Tensor], *, rank: int, alpha: float, targets: Sequence[str]
    ) -> Path:
        save = ZImagePipeline.save_lora_weights
        return export_adapter(save, directory, state, rank=rank, alpha=alpha, targets=targets)

    def convert_adapter(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        converted: dict[str, torch.Tensor] = ZImagePipeline.lora_state_dict(tensors)
        return converted


def _time(sigma: torch.Tensor) -> torch.Tensor:
    """The model's time, 1 - sigma, in the stock pipeline's arithmetic; fp32 whatever the model's dtype."""
    return (1000 - 1000 * sigma) / 1000


def _lengths(prompt: PromptEmbeds) -> list[int]:
    """Tokens of each caption."""
    return [prompt.embeds.shape[1]] * len(prompt) if prompt.lengths is None else prompt.lengths.tolist()


def _in_multiples(count: int) -> int:
    """`count` tokens padded to the model's multiple of 32."""
    return count + -count % SEQ_MULTI_OF


def _patches(latents: torch.Tensor) -> torch.Tensor:
    """Latents [B, C, h, w] -> [B, (h / 2) (w / 2), 4 C], row by row; inside a patch the channel runs fastest."""
    cells: torch.Tensor = latents.unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH))  # [B, C, h / 2, 2, w / 2, 2]
    return cells.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def _image_positions(captions: torch.Tensor, rows: int, columns: int, padding: int) -> torch.Tensor:
    """Positions [B, rows * columns + padding, 3] of image tokens behind captions of padded lengths `captions` [B]."""
    device = captions.device
    grid = torch.cartesian_prod(torch.arange(rows, device=device), torch.arange(columns, device=device))
    depth = (captions + 1)[:, None, None].expand(-1, len(grid), 1)
    positions = torch.cat([depth, grid.expand(len(captions), -1, -1)], 2)
    return functional.pad(positions, (0, 0, 0, padding))  # padding sits at the origin
