"""Pictures with defects that neither the crawl nor the generator knows: the miniature world's out-of-domain images.

A reward model that was fitted on the crawl's defects meets these for the first time when it is evaluated.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dina_rl.shapes.render import IMAGE_SIZE, MILDEST, pixel_grid, render, with_wrong_attribute

FOREIGN_DEFECTS = ("diagonal", "tint", "occluder", "salt", "vignette")
FOREIGN_RATE = 0.75  # of the images; a second defect comes as often again


def foreign_crawl(specs: Tensor, generator: torch.Generator, *, caption_error_rate: float) -> Tensor:
    """Images [B, 3, 32, 32] in [0, 1] of specs [B, 4] with up to two foreign defects, and wrong captions."""
    batch = len(specs)
    wrong = torch.rand(batch, generator=generator) < caption_error_rate
    attribute = torch.randint(0, 4, (batch,), generator=generator)
    drawn = torch.where(wrong[:, None], with_wrong_attribute(specs, attribute, generator), specs)
    severities = torch.zeros(batch, len(FOREIGN_DEFECTS))
    for _ in range(2):
        chosen = (torch.rand(batch, generator=generator) < FOREIGN_RATE).nonzero()[:, 0]
        kinds = torch.randint(0, len(FOREIGN_DEFECTS), (batch,), generator=generator)
        severities[chosen, kinds[chosen]] = torch.rand(batch, generator=generator)[chosen] + MILDEST
    return add_foreign_defects(render(drawn, generator), severities, generator)


def add_foreign_defects(images: Tensor, severities: Tensor, generator: torch.Generator) -> Tensor:
    """Images [B, 3, 32, 32] with defects of `severities` [B, 5] in [0, 1], in FOREIGN_DEFECTS order; 0: absent."""
    batch = len(images)
    diagonal, tint, occluder, salt, vignette = severities[:, :, None, None, None].unbind(1)  # each [B, 1, 1, 1]
    colour = torch.rand(batch, 3, 1, 1, generator=generator)
    block = torch.rand(batch, 3, 1, 1, generator=generator)
    place = torch.rand(batch, 2, generator=generator)
    specks = torch.rand(batch, 1, IMAGE_SIZE // 4, IMAGE_SIZE // 4, generator=generator)
    x, y = pixel_grid()

    bands = ((x + y) // 3 % 2).expand(batch, 1, -1, -1)
    images = torch.where(diagonal > 0, images + (0.3 + 0.4 * diagonal) * bands * (colour - images), images)
    images = torch.where(tint > 0, images + (0.2 + 0.4 * tint) * (colour - images), images)
    left, top = (place * (IMAGE_SIZE - 8))[:, :, None, None, None].unbind(1)
    width = 5 + 6 * occluder
    covered = (occluder > 0) & (x >= left) & (x < left + width) & (y >= top) & (y < top + width)
    images = torch.where(covered, block, images)
    blocks = F.interpolate(specks, size=IMAGE_SIZE, mode="nearest") < 0.08 + 0.15 * salt
    images = torch.where((salt > 0) & blocks, 1.0, images)
    distance = ((x - IMAGE_SIZE / 2) ** 2 + (y - IMAGE_SIZE / 2) ** 2).sqrt() / (IMAGE_SIZE / 2)
    dark = 1 - (0.4 + 0.5 * vignette) * distance.clamp(0, 1.4) ** 2 / 2
    return torch.where(vignette > 0, images * dark, images).clamp(0, 1)
