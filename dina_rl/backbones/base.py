"""What the rest of the system needs to know of a latent flow-matching family.

Convention everywhere: sigma in [0, 1], x_sigma = (1 - sigma) x0 + sigma eps, velocity = eps - x0. Each backbone
translates that into its own model time and sign.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from diffusers.models import ModelMixin
from torch import nn

from dina_rl.backbones.codec import LatentGrid
from dina_rl.backbones.files import Need
from dina_rl.backbones.text import CACHED_PROMPTS
from dina_rl.types import PromptEmbeds


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """Hidden states of selected blocks (Eq. 10) and the raw timestep embedding that modulates them."""

    visual: tuple[torch.Tensor, ...]  # per tap [B, N_visual, width]
    text: tuple[torch.Tensor, ...]  # per tap [B, N_text, width]
    time_embedding: torch.Tensor  # [B, time_width]
    text_mask: torch.Tensor | None = None  # [B, N_text], False where a row only pads its batch; None: nowhere


class TextEncoder(Protocol):
    def __call__(self, prompts: Sequence[str]) -> PromptEmbeds:
        """Embeddings of `prompts`, one row each; a prompt seen before is not encoded again."""
        ...


class LatentCodec(Protocol):
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, H, W] in [0, 1] to normalised latents [B, C, H/f, W/f], fp32 (posterior mode)."""
        ...

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Normalised latents back to images in [0, 1], fp32; differentiable, but for what is clamped to that range."""
        ...


class Backbone(Protocol):
    """One diffusion family, opened on a pipeline directory or hub id. Parts load only when asked for."""

    dtype: torch.dtype  # of the frozen weights
    device: str  # where parts load, and where what they compute lies
    num_blocks: int  # joint blocks of the full transformer, those over visual and text tokens
    last_tap: int  # blocks 1 to this one have a visual and a text output
    width: int  # hidden width of a token
    time_width: int  # width of the timestep embedding that modulates the blocks
    prompt_shape: tuple[int, int, int]  # text tokens, their width, and that of the pooled embedding
    max_sequence_length: int  # text tokens per prompt, as asked for or else the pipeline's own
    grid: LatentGrid  # of pixels, latents and tokens
    image_size: tuple[int, int]  # height and width that the stock pipeline makes unless told otherwise
    lora_targets: tuple[str, ...]  # module-name suffixes of the attention projections

    def check(self, *needs: Need) -> None:
        """Raises ValueError where a part that is needed is missing, or a file of it not whole. Loads no weights."""
        ...

    def load_transformer(self) -> ModelMixin:
        """The denoiser, frozen and in eval mode."""
        ...

    def empty_transformer(self) -> ModelMixin:
        """The denoiser on torch's meta device: shapes and names without weights."""
        ...

    def load_text_encoder(self, *, cached: int = CACHED_PROMPTS) -> TextEncoder:
        """The text encoders, behind a cache of the `cached` prompts used last (at least one)."""
        ...

    def cut_prompts(self, prompts: Sequence[str]) -> dict[str, list[str]]:
        """The prompts that a text encoder does not read to their end, by its name and length. Loads tokenizers only."""
        ...

    def load_codec(self) -> LatentCodec: ...

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of the latent of an image of that size. Raises ValueError if the size does not fit."""
        ...

    def sigmas(self, num_steps: int, height: int, width: int) -> torch.Tensor:
        """The scheduler's sigma table [num_steps + 1], fp32, from 1 down to 0, for images of that size in pixels.

        Raises:
            ValueError: no such image size, or a scheduler that does other steps than Euler's along its table.
        """
        ...

    def velocity(
        self, transformer: nn.Module, latents: torch.Tensor, sigma: torch.Tensor, prompt: PromptEmbeds
    ) -> torch.Tensor:
        """Predicted velocity eps - x0, fp32, for latents [B, C, h, w] at sigma [B]."""
        ...

    def truncated(self, transformer: nn.Module, num_blocks: int) -> nn.Module:
        """An independent copy of the first `num_blocks` blocks and what feeds them; nothing after them is kept.

        Raises:
            ValueError: `num_blocks` is not between 1 and `last_tap`.
        """
        ...

    def features(
        self,
        truncated: nn.Module,
        latents: torch.Tensor,
        sigma: torch.Tensor,
        prompt: PromptEmbeds,
        taps: Sequence[int],
    ) -> Features:
        """Outputs of the 1-based blocks `taps` of a `truncated` transformer."""
        ...

    def save_adapter(
        self, directory: Path, state: dict[str, torch.Tensor], *, rank: int, alpha: float, targets: Sequence[str]
    ) -> Path:
        """Write policy LoRA weights as the file that stock diffusers' `load_lora_weights` reads."""
        ...

    def convert_adapter(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """An adapter's tensors under diffusers' names, from names that stock `load_lora_weights` converts."""
        ...
