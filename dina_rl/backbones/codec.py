"""`AutoencoderKL` with its shift and scale: the latent space of SD3, FLUX and Z-Image alike."""

from dataclasses import dataclass

import torch
from diffusers.models import AutoencoderKL

from dina_rl.loading import VAE, loading


class KLCodec:
    """The frozen VAE: latents = (z - shift) * scale."""

    def __init__(self, vae: AutoencoderKL) -> None:
        self._vae = vae
        self._shift: float = vae.config["shift_factor"]
        self._scale: float = vae.config["scaling_factor"]

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        pixels = (images * 2 - 1).to(self._vae.device, self._vae.dtype)
        latent: torch.Tensor = self._vae.encode(pixels).latent_dist.mode().float()
        return (latent - self._shift) * self._scale

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        latent = latents / self._scale + self._shift
        pixels: torch.Tensor = self._vae.decode(latent.to(self._vae.device, self._vae.dtype)).sample.float()
        return (pixels / 2 + 0.5).clamp(0, 1)


def load_kl_codec(path: str, dtype: torch.dtype, device: str) -> KLCodec:
    """The VAE of the pipeline at `path`, frozen and in eval mode."""
    with loading(VAE, path):
        vae = AutoencoderKL.from_pretrained(path, subfolder="vae", dtype=dtype)
        # channels_last: the convolutions of the encoder run twice as fast on CPUs
        vae = vae.to(device, memory_format=torch.channels_last)
    return KLCodec(vae.requires_grad_(False).eval())


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentGrid:
    """How image sizes become latent sizes in the pipeline at `path`."""

    path: str
    channels: int  # C
    patch: int  # latents per token and side
    pixels: int  # image pixels per latent and side
    largest: int | None = None  # latents per side that the transformer's positions cover; None: any number

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


def pixels_per_latent(path: str) -> int:
    """Downsampling factor of the VAE of the pipeline at `path`."""
    config = AutoencoderKL.load_config(path, subfolder="vae")
    num_halvings = len(config["block_out_channels"]) - 1
    return 1 << num_halvings
