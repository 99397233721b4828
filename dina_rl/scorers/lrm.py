"""LRM-SD1.5 and LRM-SDXL (Zhang et al., 2025), which score noisy latents of their own VAE; here, pictures.

A picture is resized to the model's own size, encoded, and disturbed by the noise of one timestep. LRM-SDXL was trained
on latents of madebyollin/sdxl-vae-fp16-fix, SDXL's own VAE made to work in half precision. In fp32, as here, either
does: the processor's `vae/` is used, which in a local copy may hold the files of that repository.
"""

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dina_rl import seeding
from dina_rl.config import ImageScorerConfig
from dina_rl.scorers.base import Conditions, EmptyImageScorer, ImageKind, Space
from dina_rl.scorers.lrm_files import (
    ON_HUB,
    SD15,
    SDXL,
    Family,
    bytes_on_disk,
    empty_lrm,
    first_line,
    open_lrm,
    read_sizes,
)
from dina_rl.scorers.lrm_model import LRM, TIMESTEP, Words

NOISE_SEED = 0
"""Of the noise, one draw for all pictures: it hardly disturbs comparisons, and no score depends on its batch."""


def check_lrm(config: ImageScorerConfig, family: Family) -> None:
    """Whether the model and its pipeline are there at all, without loading weights.

    Raises:
        ValueError: neither a local directory nor a hub id that can be read here, or another kind of model.
    """
    read_sizes(config.path, config.processor, family)
    _read_processor(config.processor, family)


class LRMScorer:
    """`Scorer` in image space: learned scale times cosine of a picture's noisy latents and its prompt.

    A picture at a time, and its gradient by computing it again: memory is that of one, and no score depends on others.

    Raises:
        ValueError: the model or its pipeline cannot be read, or is of another kind.
    """

    space: Space = "images"

    def __init__(self, config: ImageScorerConfig, family: Family, *, device: str) -> None:
        self._device = device
        self._tokenizers, self._scheduler = _read_processor(config.processor, family)
        model = open_lrm(config.path, config.processor, family)
        self._model: LRM = model.to(device).requires_grad_(False).eval()
        self._noise = seeding.normal(model.latent_shape, NOISE_SEED, "lrm-noise").to(device)
        self._timestep = torch.tensor([TIMESTEP], device=device)
        self._empty = self._read("")

    def __call__(self, samples: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        return self.score(samples, conditions.prompts)

    def score(self, images: torch.Tensor, prompts: tuple[str, ...]) -> torch.Tensor:
        """Scores [B] of images [B, 3, H, W] in [0, 1] against their prompts; a prompt is encoded once."""
        words = {prompt: self._read(prompt) for prompt in dict.fromkeys(prompts)}
        pairs = zip(images.split(1), prompts, strict=True)
        return torch.cat(
            [checkpoint(self._score, image, words[prompt], use_reentrant=False) for image, prompt in pairs]
        )

    def _score(self, image: torch.Tensor, words: Words) -> torch.Tensor:
        latents = self._model.latents(self._resized(image.to(self._device)))
        noisy = self._scheduler.add_noise(latents, self._noise, self._timestep)  # type: ignore[arg-type]  # int64
        return self._model.score(noisy, words, self._empty)

    @torch.no_grad()
    def _read(self, prompt: str) -> Words:
        return self._model.read(
            [
                tokenizer(
                    prompt, padding="max_length", truncation=True, max_length=limit, return_tensors="pt"
                ).input_ids.to(self._device)
                for tokenizer, limit in zip(self._tokenizers, self._model.text_lengths, strict=True)
            ]
        )

    @torch.no_grad()
    def reduce(self, pixels: torch.Tensor) -> torch.Tensor:
        """The resized picture [3, h, w] in [0, 1] of one [3, H, W] uint8; resizing it again changes nothing."""
        return self._resized(pixels[None].to(self._device).float() / 255)[0].cpu()

    def _resized(self, images: torch.Tensor) -> torch.Tensor:
        """Square, whatever they were; bilinear, as published (PIL's, on 8-bit pictures, but for rounding).

        In one memory layout: kernels of several round differently.
        """
        edge = self._model.edge
        return functional.interpolate(images.contiguous(), size=(edge, edge), mode="bilinear", antialias=True)


def _read_processor(path: str, family: Family) -> tuple[list[PreTrainedTokenizerBase], DDPMScheduler]:
    """The tokenizers of the pipeline at `path`, one for each text encoder, and its noise."""
    names = [name.replace("text_encoder", "tokenizer") for name in family.texts]
    try:
        tokenizers: list[PreTrainedTokenizerBase] = [
            AutoTokenizer.from_pretrained(path, subfolder=name, trust_remote_code=False) for name in names
        ]
        return tokenizers, DDPMScheduler.from_config(DDPMScheduler.load_config(path, subfolder="scheduler"))
    except (OSError, ValueError) as error:
        raise ValueError(f"processor {path} cannot be read: {first_line(error)}") from error


def _empty(config: ImageScorerConfig, family: Family) -> EmptyImageScorer:
    model = empty_lrm(config.path, config.processor, family)
    return EmptyImageScorer(model=model, look=lambda: _look(model))


def _look(model: LRM) -> torch.Tensor:
    with torch.device("meta"):
        words = model.read([torch.zeros(1, limit, dtype=torch.long) for limit in model.text_lengths])
        return model.score(model.latents(torch.empty(1, 3, model.edge, model.edge)), words, words)


def _kind(family: Family, backbone: str) -> ImageKind:
    return ImageKind(
        open=lambda config, device: LRMScorer(config, family, device=device),
        check=lambda config: check_lrm(config, family),
        empty=lambda config: _empty(config, family),
        files=(ON_HUB, "model_index.json"),
        backbone=backbone,
        size=lambda config: bytes_on_disk(config.path, family),
    )


LRM_SD15, LRM_SDXL = _kind(SD15, "SD1.5"), _kind(SDXL, "SDXL")
