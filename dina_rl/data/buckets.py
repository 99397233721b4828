"""Aspect buckets: the few image sizes that a set is encoded at, and which one a pair of images gets.

Rules of the released preprocessing (HKUST-C4G/diffusion-rm, tools/data_process): both images of a pair end at one size,
so that their latents share the noise and a batch is one tensor. Sizes are (height, width) in pixels throughout.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

Size = tuple[int, int]

PUBLISHED: tuple[Size, ...] = (
    (256, 256),
    (512, 512),
    (1024, 1024),
    (1248, 832),
    (1344, 896),
    (832, 1248),
    (896, 1344),
    (1024, 768),
    (768, 1024),
    (1472, 832),
    (832, 1472),
    (1152, 832),
    (832, 1152),
)
PUBLISHED_MIN_AREA = 65_536  # pixels; smaller images drop their pair
PUBLISHED_MAX_PER_PROMPT = 8  # pairs, in the index that the released training reads
ASPECT_TOLERANCE = 0.03  # of log(width / height), between an image and its bucket
SHARED_TOLERANCE = 0.05  # relative difference of the aspects of the two buckets of one pair


def assign(size: Size, buckets: Sequence[Size]) -> int | None:
    """The bucket of an image: of those with nearly its aspect the one nearest in log-area; None without one."""
    aspect, area = _log_aspect(size), math.log(size[0] * size[1])
    near = [index for index, bucket in enumerate(buckets) if abs(_log_aspect(bucket) - aspect) <= ASPECT_TOLERANCE]
    return min(near, key=lambda index: abs(math.log(buckets[index][0] * buckets[index][1]) - area), default=None)


def share(first: Size, second: Size, buckets: Sequence[Size]) -> int | None:
    """The bucket that the images of a pair share; None if their shapes differ too much.

    Images of two buckets of similar aspect meet in a third size: both scaled up to the longest edge of the two, and cut
    to the smaller height and width, whose bucket it is.
    """
    one, other = assign(first, buckets), assign(second, buckets)
    if one is None or other is None or one == other:
        return one if one == other else None
    sizes = (buckets[one], buckets[other])
    aspects = [width / height for height, width in sizes]
    if abs(aspects[0] - aspects[1]) / max(aspects) >= SHARED_TOLERANCE:
        return None
    edge = max(max(size) for size in sizes)
    scaled = [_scaled_to(size, edge) for size in sizes]
    return assign((min(size[0] for size in scaled), min(size[1] for size in scaled)), buckets)


@dataclass(frozen=True, slots=True, kw_only=True)
class Dropped:
    """A pair that a filter refuses."""

    filter: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucketing:
    """How a set's images get their size."""

    buckets: tuple[Size, ...]
    stretch: bool  # one bucket that takes every image, whatever its shape
    min_area: int = 0  # pixels
    exact: bool = False  # images are of a bucket's size already, and cannot be resized

    def __post_init__(self) -> None:
        if self.stretch and len(self.buckets) != 1:
            raise ValueError(f"images are stretched to one size, got {len(self.buckets)} buckets")

    def of_pair(self, first: Size, second: Size) -> int | Dropped:
        """The index of the bucket of both images, or why there is none."""
        for height, width in (first, second):
            if height * width < self.min_area:
                reason = f"image of {height}x{width} is below the minimum of {self.min_area} pixels"
                return Dropped(filter="min_area", reason=reason)
        if self.stretch:
            return 0
        if self.exact:
            if first == second and first in self.buckets:
                return self.buckets.index(first)
            reason = f"latents of {first[0]}x{first[1]} and {second[0]}x{second[1]} are not of one bucket"
            return Dropped(filter="bucket", reason=reason)
        for size in (first, second):
            if assign(size, self.buckets) is None:
                reason = f"no bucket has the aspect of an image of {size[0]}x{size[1]}"
                return Dropped(filter="bucket", reason=reason)
        shared = share(first, second, self.buckets)
        if shared is None:
            reason = f"no bucket fits both {first[0]}x{first[1]} and {second[0]}x{second[1]}"
            return Dropped(filter="bucket", reason=reason)
        return shared


def _log_aspect(size: Size) -> float:
    return math.log(size[1] / size[0])


def _scaled_to(size: Size, edge: int) -> Size:
    """`size` enlarged until its long edge is `edge`."""
    height, width = size
    if max(size) >= edge:
        return size
    return (int(height * edge / width), edge) if width > height else (edge, int(width * edge / height))
