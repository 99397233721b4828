"""The grid that a generator leaves in its pictures: what a reward of latents cannot see, measured on pixels.

A transformer works on tokens of `patch` x `patch` latents, a VAE draws each latent as a square of pixels: what goes
wrong in every token alike repeats every `period` pixels (16 for SD3.5, FLUX.1 and Z-Image), and nothing in nature does.
The paper sees such artifacts after long alignment and asks for a constraint on pixels (its limitations, proposal ii).
"""

from dataclasses import dataclass

import torch

from dina_rl.backbones.base import Backbone, LatentCodec
from dina_rl.backbones.codec import LatentGrid
from dina_rl.config import GridConfig
from dina_rl.scorers.base import Conditions, Space
from dina_rl.seeding import generator

TILE = 4
"""Periods along a tile's side: a Hann window smears a line over one bin, and midway between two there is none of it."""
CHANNELS = (0.299, 0.587, 0.114)
"""Of red, green and blue in luma (ITU-R BT.601), here of their powers: no colour hides a grid."""
TOGETHER = 4
"""Pictures measured at once: at 1024 pixels they take about 200 MB."""
FAINTEST = 1 / 255
"""Amplitude below which a wave hardly counts, a step of 8 bits: a flat picture has no grid, whatever its rounding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Of a crop along one axis."""

    window: slice  # latents that are decoded
    shown: slice  # pixels of them that are looked at


def grid_energy(images: torch.Tensor, period: int) -> torch.Tensor:
    """How far the spectrum at the grid's frequencies lies above its surroundings [B], in nats of power; 0: no grid.

    With P(u, v) the power spectrum of a picture (of tiles of 4 periods under a Hann window, each less its mean,
    averaged over tiles and channels, where a wave of amplitude a has a^2 / 4), p the period and j = 0 ... p - 1,

        S(u)  = sum_j P(u, j / p)                               a grid repeats along the other axis too
        L(u)  = log(S(u) + FAINTEST^2 / 4)
        g     = mean over k = 1 ... p / 2 and both axes of  L(k / p) - w L((k - 1/2) / p) - (1 - w) L((k + 1/2) / p)
        w     = log((k + 1/2) / k) / log((k + 1/2) / (k - 1/2))

    The weights make g 0 for every spectrum that is a power of the frequency, as those of natural pictures are: neither
    sharpness, contrast nor brightness counts, a line that stands out at the grid's frequencies does. Single small
    pictures scatter by some tenths around 0; means over many do not. What it does not see: blocks whose steps have no
    common sign, as those of a coarse JPEG, for these have no lines.

    Args:
        images: [B, 3, H, W] in [0, 1], cut along the grid: pixel 0 begins a token. What exceeds whole tiles is left
            out.
        period: pixels of a token's side, even.

    Raises:
        ValueError: a picture smaller than a tile.
    """
    return torch.cat([_excess(_power(few, period), period) for few in images.split(TOGETHER)])


def _power(images: torch.Tensor, period: int) -> torch.Tensor:
    """S of frequencies 0 ... side / 2 over the side, along either axis [B, 2, side / 2 + 1], over tiles and channels.

    To sum P over the multiples of 1 / p along an axis is to fold the tile there by p pixels (Parseval).
    """
    side = TILE * period
    if min(images.shape[2:]) < side:
        raise ValueError(
            f"a picture of {images.shape[2]}x{images.shape[3]} pixels is smaller than the {side} that its grid of "
            f"{period} is measured on"
        )
    hann = torch.hann_window(side, dtype=images.dtype, device=images.device)
    window = hann[:, None] * hann / hann.sum() ** 2
    tiles = images.unfold(2, side, side).unfold(3, side, side)  # [B, 3, rows, columns, side, side]
    waves = (tiles - (tiles * window).sum((-2, -1), keepdim=True)) * window
    folded = (each.unflatten(-2, (TILE, period)).sum(-3) for each in (waves, waves.mT))  # [..., period, side]
    lines = torch.stack([torch.fft.rfft(each).abs().square().sum(-2) for each in folded], -2) * period
    weights = torch.tensor(CHANNELS, dtype=images.dtype, device=images.device).view(3, 1, 1, 1, 1)
    return (lines * weights).sum(1).mean((1, 2))


def _excess(power: torch.Tensor, period: int) -> torch.Tensor:
    """g [B] of S [B, 2, side / 2 + 1]."""
    level = torch.log(power + FAINTEST**2 / 4)
    k = torch.arange(1, period // 2 + 1, device=power.device)
    weight = (torch.log((k + 0.5) / k) / torch.log((k + 0.5) / (k - 0.5))).to(power.dtype)
    below, above = TILE * k - TILE // 2, TILE * k + TILE // 2
    above = torch.minimum(above, TILE * period - above)  # beyond the highest frequency the spectrum is mirrored
    return (level[..., TILE * k] - weight * level[..., below] - (1 - weight) * level[..., above]).mean((1, 2))


class GridScorer:
    """`Scorer` in latent space: minus the grid beyond `free`, on decoded crops, so that its cost does not grow with the
    picture.

    An approximation: a crop is decoded with `context` latents around it, while a decoder with attention in its middle
    and group norms throughout, as SD3.5's is, looks at the whole picture. A picture that is not larger than crop and
    context, as the miniature world's, is decoded whole, and exactly.

    Crops begin at a token. Where they lie depends on the prompt alone: the samples of a group are compared at the same
    places, and no place is left out for long.
    """

    space: Space = "latents"

    def __init__(self, config: GridConfig, codec: LatentCodec, grid: LatentGrid) -> None:
        self._config, self._codec, self._grid = config, codec, grid

    def __call__(self, samples: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        """Scores [B] of latents [B, C, h, w].

        Raises:
            ValueError: they are of a picture smaller than a crop.
        """
        crops = self._config.crops
        size = samples.shape[2], samples.shape[3]
        places = [place for prompt in conditions.prompts for place in self._places(prompt, size)]
        repeated = samples.repeat_interleave(crops, 0)
        latents = torch.stack([each[:, y.window, x.window] for each, (y, x) in zip(repeated, places, strict=True)])
        images = self._codec.decode(latents)
        shown = torch.stack([each[:, y.shown, x.shown] for each, (y, x) in zip(images, places, strict=True)])
        power = _power(shown, self._grid.period).unflatten(0, (-1, crops)).mean(1)
        return -(_excess(power, self._grid.period) - self._config.free).clamp_min(0)

    def _places(self, prompt: str, size: tuple[int, int]) -> list[tuple[_Place, _Place]]:
        """Of the crops of a picture of `size` latents: along its rows and its columns."""
        draw = generator("grid", prompt)
        return [(self._place(size[0], draw), self._place(size[1], draw)) for _ in range(self._config.crops)]

    def _place(self, size: int, draw: torch.Generator) -> _Place:
        grid, crop = self._grid, crop_latents(self._grid)
        if size < crop:
            raise ValueError(f"a latent of {size} to a side is smaller than the {crop} that its grid is measured on")
        window = min(size, crop + 2 * self._config.context)
        first = int(torch.randint((size - crop) // grid.patch + 1, (), generator=draw)) * grid.patch
        start = min(max(first - self._config.context, 0), size - window)
        shown = (first - start) * grid.pixels
        return _Place(window=slice(start, start + window), shown=slice(shown, shown + crop * grid.pixels))


def crop_latents(grid: LatentGrid) -> int:
    """Latents along a crop's side."""
    return TILE * grid.patch


def open_grid(config: GridConfig, backbone: Backbone) -> GridScorer:
    """The scorer with a VAE of its own on the backbone's device."""
    return GridScorer(config, backbone.load_codec(), backbone.grid)
