"""Draws captions: anti-aliased shapes from signed distances, with the defects of a bad web crawl.

The pretraining data is the crawl (`crawl`): most of its images carry defects that the caption does not
mention, so the generator learns to draw them, and alignment has something to remove that guidance does not.
All randomness comes from the generator that the caller passes.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dina_rl.shapes.grammar import ATTRIBUTE_COUNTS, COLOUR, GROUND, SHAPE, SIZE, palette

IMAGE_SIZE = 32
RADII = ((6.0, 7.5), (9.5, 11.5))  # pixels, per size; apart, so that size can be told from the image
CENTRE_JITTER = 2.0  # pixels
COLOUR_JITTER = 0.012  # standard deviation of the palette's colours

DEFECTS = ("stripe", "fade", "mottle", "blur", "frame", "stamp", "bars")
STRIPE, FADE, MOTTLE, BLUR, FRAME, STAMP, BARS = range(len(DEFECTS))

# Stripes and stamps are a large majority because guidance repairs the rarer defects by itself: what stays for
# alignment are the common ones away from the object.
DEFECT_RATE = 0.60
SECOND_DEFECT_RATE = 0.10
DEFECT_WEIGHTS = (0.55, 0.10, 0.15, 0.10, 0.10)  # stripe, fade, mottle, blur, frame
STAMP_RATE = 0.80
BARS_RATE = 0.10
CAPTION_ERROR_RATE = 0.05
MILDEST = 1e-3  # severity 0 means absent

VISIBLE_DIFFERENCE = 0.3  # mean RGB difference at which a stripe or bar is told from the ground


def pixel_grid(size: int = IMAGE_SIZE) -> tuple[Tensor, Tensor]:
    """Pixel centres (x, y), each [size, size], in pixels from the top left corner."""
    centres = torch.arange(size, dtype=torch.float32) + 0.5
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    return x, y


def signed_distance(shape: Tensor, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Signed distance in pixels, negative inside, [B, H, W].

    Args:
        shape: index into SHAPES, [B].
        x, y: offsets from the centre in pixels, [B, H, W].
        radius: pixels, broadcastable to [B, H, W].
    """
    from_centre = torch.sqrt(x * x + y * y + 1e-6)
    root3 = math.sqrt(3.0)
    inradius = 0.6 * radius
    arm = 0.32 * radius
    circle = from_centre - radius
    slopes = torch.maximum((root3 * x - y) / 2, (-root3 * x - y) / 2)
    triangle = torch.maximum(y, slopes) - inradius  # equilateral, base at the bottom
    across = torch.maximum(x.abs() - radius, y.abs() - arm)
    upright = torch.maximum(y.abs() - radius, x.abs() - arm)
    cross = torch.minimum(across, upright)
    ring = (from_centre - 0.76 * radius).abs() - 0.24 * radius
    distances = torch.stack([circle, triangle, cross, ring], dim=1)
    index = shape.view(-1, 1, 1, 1).expand(-1, 1, *from_centre.shape[1:])
    return distances.gather(1, index)[:, 0]


def coverage(distance: Tensor) -> Tensor:
    """Share of each pixel inside the shape: a one-pixel wide anti-aliased edge."""
    return (0.5 - distance).clamp(0, 1)


def render(specs: Tensor, generator: torch.Generator, severities: Tensor | None = None) -> Tensor:
    """Draw specs [B, 4] as images [B, 3, 32, 32] in [0, 1].

    Args:
        specs: int64 indices as `grammar.spec_tensor` gives them.
        generator: source of placement, colour jitter and the defects' random parts.
        severities: [B, 7] in [0, 1] in the order of DEFECTS; 0 means absent. Default: none.
    """
    batch = len(specs)
    severities = torch.zeros(batch, len(DEFECTS)) if severities is None else severities
    assert severities.shape == (batch, len(DEFECTS)), severities.shape
    mask = _object_mask(specs, severities[:, FRAME], generator)
    scene = _draw_scene(specs, generator)
    clean = mask * scene.colour + (1 - mask) * scene.ground
    return _apply_defects(clean, scene, severities).clamp(0, 1)


def crawl(
    specs: Tensor,
    generator: torch.Generator,
    *,
    defect_rate: float = DEFECT_RATE,
    caption_error_rate: float = CAPTION_ERROR_RATE,
) -> Tensor:
    """Web-crawl images [B, 3, 32, 32] in [0, 1] for captions: unmentioned defects, and some wrong captions.

    A share `defect_rate` has one of stripe, fade, mottle, blur or frame (a tenth of them a second one); stamps
    and bars come independently; a share `caption_error_rate` differs from the caption in one attribute.
    """
    batch = len(specs)
    severities = torch.zeros(batch, len(DEFECTS))
    first = torch.rand(batch, generator=generator) < defect_rate
    second = first & (torch.rand(batch, generator=generator) < SECOND_DEFECT_RATE)
    for chosen in (first, second):
        kinds = torch.multinomial(torch.tensor(DEFECT_WEIGHTS), batch, replacement=True, generator=generator)
        strength = torch.rand(batch, generator=generator) + MILDEST
        rows = chosen.nonzero()[:, 0]
        severities[rows, kinds[rows]] = strength[rows]
    for kind, rate in ((STAMP, STAMP_RATE), (BARS, BARS_RATE)):
        chosen = torch.rand(batch, generator=generator) < rate
        strength = torch.rand(batch, generator=generator) + MILDEST
        severities[:, kind] = torch.where(chosen, strength, torch.zeros(batch))
    wrong = torch.rand(batch, generator=generator) < caption_error_rate
    attribute = torch.randint(0, 4, (batch,), generator=generator)
    drawn = torch.where(wrong[:, None], with_wrong_attribute(specs, attribute, generator), specs)
    return render(drawn, generator, severities)


def with_wrong_attribute(specs: Tensor, attribute: Tensor, generator: torch.Generator) -> Tensor:
    """Specs [B, 4] with one attribute (column index [B]) changed; colour and ground stay apart."""
    rows = torch.arange(len(specs))
    counts = torch.tensor(ATTRIBUTE_COUNTS)[attribute]
    uniform = torch.rand(len(specs), generator=generator)
    shift = 1 + (uniform * (counts - 1)).long().clamp(max=counts - 2)
    changed = specs.clone()
    changed[rows, attribute] = (specs[rows, attribute] + shift) % counts
    clash = (changed[:, COLOUR] == changed[:, GROUND]).nonzero()[:, 0]
    column = attribute[clash]
    changed[clash, column] = (changed[clash, column] + 1) % counts[clash]
    # One step further can land on the colour that was there before; then one more step is free again.
    same = clash[(changed[clash] == specs[clash]).all(dim=1)]
    changed[same, attribute[same]] = (changed[same, attribute[same]] + 1) % counts[same]
    return changed


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scene:
    """The random parts of a picture besides its placement."""

    colour: Tensor  # [B, 3, 1, 1]
    ground: Tensor  # [B, 3, 1, 1]
    stripe: Tensor  # [B, 3, 1, 1]
    tone: Tensor  # [B, 1, 1, 1] grey of the bars; stamps take 1 - tone
    mottle: Tensor  # [B, 3, 8, 8]
    corner: Tensor  # [B, 1, 1] 0..3


def _object_mask(specs: Tensor, off_centre: Tensor, generator: torch.Generator) -> Tensor:
    batch = len(specs)
    uniform = torch.rand(batch, 4, generator=generator)
    limits = torch.tensor(RADII)[specs[:, SIZE]]
    radius = limits[:, 0] + uniform[:, 0] * (limits[:, 1] - limits[:, 0])
    middle = IMAGE_SIZE / 2
    dx = (uniform[:, 1] * 2 - 1) * CENTRE_JITTER
    dy = (uniform[:, 2] * 2 - 1) * CENTRE_JITTER
    angle = uniform[:, 3] * 2 * math.pi
    shift = 6 + 4.5 * off_centre
    dx = torch.where(off_centre > 0, shift * angle.cos(), dx)
    dy = torch.where(off_centre > 0, shift * angle.sin(), dy)
    x, y = pixel_grid()
    x = x - (middle + dx).view(-1, 1, 1)
    y = y - (middle + dy).view(-1, 1, 1)
    return coverage(signed_distance(specs[:, SHAPE], x, y, radius.view(-1, 1, 1)))[:, None]


def _draw_scene(specs: Tensor, generator: torch.Generator) -> _Scene:
    batch = len(specs)
    rgb = palette()

    def jittered(index: Tensor) -> Tensor:
        noise = COLOUR_JITTER * torch.randn(batch, 3, generator=generator)
        return (rgb[index] + noise).clamp(0, 1)[:, :, None, None]

    colour = jittered(specs[:, COLOUR])
    ground = jittered(specs[:, GROUND])
    stripe = torch.rand(batch, 3, 1, 1, generator=generator)
    stripe = torch.where(_mean_difference(stripe, ground) < VISIBLE_DIFFERENCE, 1 - ground, stripe)
    shared = torch.randn(batch, 1, 8, 8, generator=generator)
    mottle = shared + 0.5 * torch.randn(batch, 3, 8, 8, generator=generator)
    tone = torch.randint(0, 3, (batch, 1, 1, 1), generator=generator) * 0.45 + 0.05
    opposite = torch.where(ground.mean(dim=1, keepdim=True) > 0.5, 0.05, 0.95)
    tone = torch.where(_mean_difference(tone, ground) < VISIBLE_DIFFERENCE, opposite, tone)
    corner = torch.randint(0, 4, (batch, 1, 1), generator=generator)
    return _Scene(colour=colour, ground=ground, stripe=stripe, tone=tone, mottle=mottle, corner=corner)


def _apply_defects(image: Tensor, scene: _Scene, severities: Tensor) -> Tensor:
    by_kind = severities[:, :, None, None, None].unbind(1)  # each [B, 1, 1, 1]
    image = torch.where(by_kind[BLUR] > 0, _blurred(image, by_kind[BLUR]), image)
    image = torch.where(by_kind[FADE] > 0, _faded(image, scene, by_kind[FADE]), image)
    image = torch.where(by_kind[STRIPE] > 0, _striped(image, scene, by_kind[STRIPE]), image)
    image = torch.where(by_kind[MOTTLE] > 0, _mottled(image, scene, by_kind[MOTTLE]), image)
    image = torch.where((by_kind[BARS] > 0) & _bar_pixels(by_kind[BARS]), scene.tone, image)
    stamped = (by_kind[STAMP] > 0) & _stamp_pixels(scene.corner, by_kind[STAMP][:, 0])
    return torch.where(stamped, 1 - scene.tone, image)


def _blurred(image: Tensor, severity: Tensor) -> Tensor:
    soft = F.avg_pool2d(F.pad(image, (3,) * 4, mode="replicate"), 7, 1)
    soft = F.avg_pool2d(F.pad(soft, (2,) * 4, mode="replicate"), 5, 1)
    return image + (0.65 + 0.35 * severity) * (soft - image)


def _faded(image: Tensor, scene: _Scene, severity: Tensor) -> Tensor:
    middle = 0.5 * scene.colour + 0.5 * scene.ground
    return image + (0.45 + 0.4 * severity) * (middle - image)


def _striped(image: Tensor, scene: _Scene, severity: Tensor) -> Tensor:
    rows = ((torch.arange(IMAGE_SIZE) // 2) % 2).view(1, 1, IMAGE_SIZE, 1)
    return image + (0.25 + 0.4 * severity) * rows * (scene.stripe - image)


def _mottled(image: Tensor, scene: _Scene, severity: Tensor) -> Tensor:
    # Blocks of 4 pixels: noise of single pixels would not survive the VAE's 4x compression.
    blocks = F.interpolate(scene.mottle, size=IMAGE_SIZE, mode="nearest")
    return image + (0.08 + 0.12 * severity) * blocks


def _bar_pixels(severity: Tensor) -> Tensor:
    width = (3 + 2 * severity).round()
    _, y = pixel_grid()
    return (y < width) | (y > IMAGE_SIZE - width)


def _stamp_pixels(corner: Tensor, severity: Tensor) -> Tensor:
    width = (5 + 3 * severity).round()
    x, y = pixel_grid()
    from_side = torch.where(corner % 2 == 0, x, IMAGE_SIZE - x)
    from_edge = torch.where(corner < 2, y, IMAGE_SIZE - y)
    inside = (from_side > 1) & (from_side < 1 + width) & (from_edge > 1) & (from_edge < 1 + width)
    return inside[:, None]


def _mean_difference(left: Tensor, right: Tensor) -> Tensor:
    return (left - right).abs().mean(dim=1, keepdim=True)
