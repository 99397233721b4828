"""`AutoencoderKL` with its shift and scale: the latent space of SD3, FLUX and Z-Image alike."""

import math
from dataclasses import dataclass

import torch
from diffusers.models import AutoencoderKL
from torch.utils.checkpoint import checkpoint

from dina_rl.backbones.files import check_files
from dina_rl.backbones.source import Options, Source, StockReading
from dina_rl.loading import VAE, loading


class KLCodec:
    """The frozen VAE: latents = (z - shift) * scale.

    Args:
        decode_batch: most latents decoded at once, in batches of about one size; None: all. What a gradient
            needs of one such batch is then computed anew in the backward pass: memory is that of one batch there too.
    """

    def __init__(self, vae: AutoencoderKL, *, decode_batch: int | None = None) -> None:
        self._vae = vae
        self._shift: float = vae.config["shift_factor"]
        self._scale: float = vae.config["scaling_factor"]
        self._decode_batch = decode_batch

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        pixels = (images * 2 - 1).to(self._vae.device, self._vae.dtype)
        latent: torch.Tensor = self._vae.encode(pixels).latent_dist.mode().float()
        return (latent - self._shift) * self._scale

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        if self._decode_batch is None or len(latents) <= self._decode_batch:
            return self._decode(latents)
        batches = latents.tensor_split(math.ceil(len(latents) / self._decode_batch))
        if latents.requires_grad and torch.is_grad_enabled():
            return torch.cat([checkpoint(self._decode, batch, use_reentrant=False) for batch in batches])
        return torch.cat([self._decode(batch) for batch in batches])

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        latent = latents / self._scale + self._shift
        pixels: torch.Tensor = self._vae.decode(latent.to(self._vae.device, self._vae.dtype)).sample.float()
        return (pixels / 2 + 0.5).clamp(0, 1)


def load_kl_codec(source: Source, options: Options) -> KLCodec:
    """The VAE of a pipeline, frozen and in eval mode.

    Raises:
        ValueError: its files are missing or not whole.
    """
    check_files(source, "vae")
    with loading(VAE, source.path, source.variant), StockReading(source):
        vae = AutoencoderKL.from_pretrained(source.path, **source.weights("vae"), dtype=options.dtype)
        if options.vae_tiling:
            vae.enable_tiling()
        # channels_last: the convolutions of the encoder run twice as fast on CPUs
        vae = vae.to(options.device, memory_format=torch.channels_last)
    return KLCodec(vae.requires_grad_(False).eval(), decode_batch=options.decode_batch)


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentGrid:
    """How image sizes become latent sizes in the pipeline at `path`."""

    path: str
    channels: int  # C
    patch: int  # latents per token and side
    pixels: int  # image pixels per latent and side
    largest: int | None = None  # latents per side that the transformer's positions cover; None: any number

    @property
    def period(self) -> int:
        """Image pixels per token and side: what goes wrong in every token repeats after so many."""
        return self.pixels * self.patch

    def shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of the latent of an image of `height` x `width` pixels.

        Raises:
            ValueError: the size does not split into tokens, or is beyond the positions.
        """
        multiple = self.pixels * self.patch
        if height % multiple or width % multiple:
            raise ValueError(f"image size {height}x{width} must be a multiple of {multiple} for {self.path}")
        h, w = height // self.pixels, width // self.pixels
        if self.largest is not None and max(h, w) > self.largest:
            raise ValueError(
                f"image size {height}x{width} is beyond the {self.largest * self.pixels} pixels that the position "
                f"table of {self.path} covers"
            )
        return self.channels, h, w

    def tokens(self, height: int, width: int) -> int:
        """Visual tokens of such an image; raises as `shape`."""
        _, h, w = self.shape(height, width)
        return h * w // self.patch**2


def pixels_per_latent(source: Source) -> int:
    """Downsampling factor of a pipeline's VAE."""
    config = AutoencoderKL.load_config(source.path, **source.config("vae"))
    num_halvings = len(config["block_out_channels"]) - 1
    return 1 << num_halvings
