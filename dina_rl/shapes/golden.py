"""The golden score: what a picture of a prompt is truly worth, by rules, for any image.

    golden = colour * f(shape, 0.1) * f(clean) * f(sharp) * f(contrast) * f(frame) * f(whole)

with f(q, c = 0.25) = c + (1 - c) q, so that one flaw costs much but not everything. A clean render scores
about 0.99, a wrong shape below 0.1, noise 0. Nothing here is differentiable or random, and no image sees its
neighbours.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from dina_rl.shapes.grammar import COLOUR, GROUND, SHAPE, SHAPES, SIZE, SIZES, palette, spec_tensor
from dina_rl.shapes.render import IMAGE_SIZE, RADII, coverage, pixel_grid, signed_distance

CHUNK = 256  # images scored at once: bounds the memory of the template correlation
TEMPLATE = 25  # side of a template in pixels: the largest radius fits
CORRELATION = IMAGE_SIZE + TEMPLATE - 1  # side of the FFT: linear, not circular, correlation
TEMPLATE_RADII = 4  # radii tried per size, spread over its range
RADIUS_MARGIN = 0.3  # pixels beyond the drawn range, against rounding

OBJECT_PIXELS = 20  # pixels taken as surely object; a small cross has more
MIN_CONTRAST = 0.15  # opacity contrast below which nothing is amplified further
SHAPE_IOU = (0.55, 0.82)  # a wrong shape reaches .5; the VAE costs a right one .1
SHAPE_MARGIN = (-0.02, 0.08)  # the own template must beat the best other one
RIGHT_IOU = 0.5  # below this nothing is recognisable
COLOUR_RESIDUAL = 0.25  # RGB distance from the prompt's two colours
COLOUR_CONTRAST = (0.05, 0.25)  # without an object there is no colour to praise
HIGH_FREQUENCY = 0.045  # median difference from the 3x3 mean: stripes, pixel noise
UNEVENNESS_FREE, UNEVENNESS = 0.02, 0.06  # mean deviation of the ground from its mean colour: mottle
SHARPEST_PIXELS, SHARPNESS = 30, (0.15, 0.42)  # mean of the steepest opacity gradients: blur
CONTRAST = (0.25, 0.85)  # opacity between object and ground: fading
OFF_CENTRE_FREE, OFF_CENTRE = 3.5, 2.5  # pixels from the middle; renders jitter up to 2.8
OBJECT_MARGIN = 2.0  # pixels around the placed template that may still be object
ODD_DIFFERENCE = 0.15  # RGB distance at which a ground pixel is not ground
ODD_FREE, ODD_SHARE = 0.003, 0.015  # share of such pixels: stamps, bars


@dataclass(frozen=True, slots=True, kw_only=True)
class GoldenParts:
    """The golden score and the qualities it is made of, all fp32 in [0, 1]."""

    score: Tensor  # [B] the product
    shape: Tensor  # [B] overlap with the prompt's shape, and its lead over the other shapes
    shape_right: Tensor  # [B] 1 where the prompt's shape fits best of all; reported, not part of the score
    colour: Tensor  # [B] object and ground have the prompt's colours
    clean: Tensor  # [B] no stripes, noise or mottle
    sharp: Tensor  # [B]
    contrast: Tensor  # [B]
    frame: Tensor  # [B] the object is in the middle
    whole: Tensor  # [B] nothing else is in the picture: no stamp, no bars


@torch.no_grad()
def golden_score(images: Tensor, prompts: Sequence[str]) -> GoldenParts:
    """Score images against their prompts.

    Args:
        images: [B, 3, H, W] in [0, 1] (values outside are clamped); another size than 32 is resized by area.
        prompts: B captions of the grammar.

    Raises:
        ValueError: the shapes or counts do not fit, or a prompt is outside the grammar.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"golden_score takes RGB images [B, 3, H, W], got {list(images.shape)}")
    if len(images) != len(prompts):
        raise ValueError(f"golden_score got {len(images)} images but {len(prompts)} prompts: give one each")
    specs = spec_tensor(prompts)
    pixels = images.detach().to(device="cpu", dtype=torch.float32).clamp(0, 1)
    if pixels.shape[-2:] != (IMAGE_SIZE, IMAGE_SIZE):
        pixels = F.interpolate(pixels, size=(IMAGE_SIZE, IMAGE_SIZE), mode="area")
    chunks = [_score(*pair) for pair in zip(pixels.split(CHUNK), specs.split(CHUNK), strict=True)]
    return GoldenParts(**{f.name: torch.cat([getattr(c, f.name) for c in chunks]) for f in fields(GoldenParts)})


def _score(images: Tensor, specs: Tensor) -> GoldenParts:
    rgb = palette()
    colour = rgb[specs[:, COLOUR]][:, :, None, None]
    ground = rgb[specs[:, GROUND]][:, :, None, None]

    opacity = _opacity(images, colour, ground)
    smooth = _box(opacity[:, None])[:, 0].flatten(1)
    low = smooth.median(dim=1).values
    contrast = smooth.topk(OBJECT_PIXELS, dim=1).values.mean(dim=1) - low
    scale = contrast.clamp_min(MIN_CONTRAST)
    object_ = ((opacity - low.view(-1, 1, 1)) / scale.view(-1, 1, 1)).clamp(0, 1)  # contrast-normalised, [B, H, W]

    fit = _fit_templates(object_, specs)
    shape = _ramp(fit.own, SHAPE_IOU) * _ramp(fit.own - fit.other, SHAPE_MARGIN)
    right = ((fit.winner == specs[:, SHAPE]) & (fit.own > RIGHT_IOU)).float()
    off_centre = torch.sqrt(fit.dx**2 + fit.dy**2)
    frame = _bell(F.relu(off_centre - OFF_CENTRE_FREE), OFF_CENTRE)
    colours = _colour(images, colour, ground, object_) * _ramp(contrast, COLOUR_CONTRAST)
    clean = _clean(images, object_)
    sharp = _ramp(_steepness(object_), SHARPNESS)
    strong = _ramp(contrast, CONTRAST)
    whole = _whole(images, specs, fit)

    score = colours * _floor(shape, 0.1) * _floor(clean) * _floor(sharp)
    score = score * _floor(strong) * _floor(frame) * _floor(whole)
    return GoldenParts(
        score=score,
        shape=shape,
        shape_right=right,
        colour=colours,
        clean=clean,
        sharp=sharp,
        contrast=strong,
        frame=frame,
        whole=whole,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fit:
    """Where the prompt's own shape fits best, and how well."""

    own: Tensor  # [B] soft IoU of the prompt's shape
    other: Tensor  # [B] soft IoU of the best other shape
    winner: Tensor  # [B] index of the best shape
    dx: Tensor  # [B] pixels from the image centre
    dy: Tensor  # [B]
    radius: Tensor  # [B] pixels


@dataclass(frozen=True, slots=True, kw_only=True)
class _Templates:
    radii: Tensor  # [sizes, R]
    energy: Tensor  # [sizes, shapes, R] sum of squares
    spectrum: Tensor  # [sizes, shapes, R, N, N / 2 + 1] conjugated


@functools.cache
def _templates() -> _Templates:
    offsets = torch.arange(TEMPLATE, dtype=torch.float32) - TEMPLATE // 2
    y, x = torch.meshgrid(offsets, offsets, indexing="ij")
    x, y = (axis.expand(TEMPLATE_RADII, -1, -1) for axis in (x, y))
    radii = torch.stack(
        [torch.linspace(low - RADIUS_MARGIN, high + RADIUS_MARGIN, TEMPLATE_RADII) for low, high in RADII]
    )
    images = [
        coverage(signed_distance(torch.full((TEMPLATE_RADII,), shape), x, y, radii[size].view(-1, 1, 1)))
        for size in range(len(SIZES))
        for shape in range(len(SHAPES))
    ]
    stacked = torch.stack(images).view(len(SIZES), len(SHAPES), TEMPLATE_RADII, TEMPLATE, TEMPLATE)
    spectrum = torch.fft.rfft2(stacked, s=(CORRELATION, CORRELATION)).conj()
    return _Templates(radii=radii, energy=(stacked**2).sum((3, 4)), spectrum=spectrum)


def _fit_templates(object_: Tensor, specs: Tensor) -> _Fit:
    """Soft IoU with every shape of the prompt's size, at every place and four radii, by correlation."""
    templates = _templates()
    size = specs[:, SIZE]
    shape = specs[:, SHAPE, None]
    spectrum = torch.fft.rfft2(object_, s=(CORRELATION, CORRELATION))[:, None, None]
    overlap = torch.fft.irfft2(spectrum * templates.spectrum[size], s=(CORRELATION, CORRELATION))
    best, place = overlap.flatten(3).max(dim=3)  # [B, shapes, R]
    energy = (object_ * object_).sum((1, 2)).view(-1, 1, 1)
    dice, radius_index = (2 * best / (energy + templates.energy[size])).max(dim=2)
    iou = dice / (2 - dice)  # [B, shapes]

    chosen = radius_index.gather(1, shape)  # [B, 1]
    own_places = place.gather(1, shape[:, :, None].expand(-1, 1, TEMPLATE_RADII))[:, 0]
    flat = own_places.gather(1, chosen)[:, 0]
    return _Fit(
        own=iou.gather(1, shape)[:, 0],
        other=iou.scatter(1, shape, -1.0).amax(dim=1),
        winner=iou.argmax(dim=1),
        dx=_offset(flat % CORRELATION),
        dy=_offset(flat // CORRELATION),
        radius=templates.radii[size].gather(1, chosen)[:, 0],
    )


def _offset(place: Tensor) -> Tensor:
    """Template centre relative to the image centre, from a circular correlation index."""
    unwrapped = torch.where(place >= IMAGE_SIZE, place - CORRELATION, place)
    return unwrapped.float() + TEMPLATE // 2 + 0.5 - IMAGE_SIZE / 2


def _opacity(images: Tensor, colour: Tensor, ground: Tensor) -> Tensor:
    """Position of each pixel between the prompt's ground (0) and object colour (1), [B, H, W]."""
    axis = colour - ground
    return (((images - ground) * axis).sum(dim=1) / (axis * axis).sum(dim=1)).clamp(0, 1)


def _colour(images: Tensor, colour: Tensor, ground: Tensor, object_: Tensor) -> Tensor:
    smooth = _box(images)
    opacity = _opacity(smooth, colour, ground)[:, None]
    expected = opacity * colour + (1 - opacity) * ground
    residual = (smooth - expected).square().sum(dim=1).sqrt()
    on_object = (residual * object_).sum((1, 2)) / (object_.sum((1, 2)) + 4)
    on_ground = (residual * (1 - object_)).sum((1, 2)) / ((1 - object_).sum((1, 2)) + 4)
    return _bell(on_object, COLOUR_RESIDUAL) * _bell(on_ground, COLOUR_RESIDUAL)


def _clean(images: Tensor, object_: Tensor) -> Tensor:
    high = (images - _box(images)).abs().mean(dim=1).flatten(1).median(dim=1).values
    near_object = F.max_pool2d(object_[:, None], 3, 1, 1) >= 0.3
    weight = ((1 - object_) ** 4)[:, None] * ~near_object + 1e-3
    mean = (images * weight).sum((2, 3), keepdim=True) / weight.sum((2, 3), keepdim=True)
    deviation = (images - mean).abs().mean(dim=1, keepdim=True)
    unevenness = (deviation * weight).sum((1, 2, 3)) / weight.sum((1, 2, 3))
    return _bell(high, HIGH_FREQUENCY) * _bell(F.relu(unevenness - UNEVENNESS_FREE), UNEVENNESS)


def _steepness(object_: Tensor) -> Tensor:
    down = object_[:, 1:, :-1] - object_[:, :-1, :-1]
    right = object_[:, :-1, 1:] - object_[:, :-1, :-1]
    gradient = torch.sqrt(down**2 + right**2).flatten(1)
    return gradient.topk(SHARPEST_PIXELS, dim=1).values.mean(dim=1)


def _whole(images: Tensor, specs: Tensor, fit: _Fit) -> Tensor:
    """1 where all pixels away from the placed template have the ground's median colour."""
    x, y = pixel_grid()
    middle = IMAGE_SIZE / 2
    x = x - (middle + fit.dx).view(-1, 1, 1)
    y = y - (middle + fit.dy).view(-1, 1, 1)
    far = signed_distance(specs[:, SHAPE], x, y, fit.radius.view(-1, 1, 1)) > OBJECT_MARGIN  # [B, H, W]
    flat = images.flatten(2)
    median = flat.masked_fill(~far.flatten(1)[:, None], float("nan")).nanmedian(dim=2).values.nan_to_num(0.0)
    odd = ((images - median[:, :, None, None]).abs().mean(dim=1) > ODD_DIFFERENCE) & far
    share = odd.float().mean(dim=(1, 2))
    return _bell(F.relu(share - ODD_FREE), ODD_SHARE)


def _box(images: Tensor) -> Tensor:
    return F.avg_pool2d(F.pad(images, (1,) * 4, mode="replicate"), 3, 1)


def _bell(value: Tensor, width: float) -> Tensor:
    return torch.exp(-((value / width) ** 2))


def _ramp(value: Tensor, limits: tuple[float, float]) -> Tensor:
    low, high = limits
    return ((value - low) / (high - low)).clamp(0, 1)


def _floor(quality: Tensor, floor: float = 0.25) -> Tensor:
    return floor + (1 - floor) * quality
