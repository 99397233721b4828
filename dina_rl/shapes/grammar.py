"""The captions of the miniature world: `a {small|large} {colour} {shape} on {ground colour}`.

There are 2 sizes x 9 colours x 4 shapes x 8 other ground colours = 576 of them; nothing else is a caption.
They are split once and for all into training, development and test prompts.
"""

import functools
import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

PromptSplit = Literal["train", "dev", "test"]

COLOURS: Mapping[str, tuple[float, float, float]] = MappingProxyType(
    {
        "red": (0.90, 0.12, 0.12),
        "green": (0.10, 0.70, 0.20),
        "blue": (0.12, 0.25, 0.90),
        "yellow": (0.95, 0.85, 0.10),
        "purple": (0.60, 0.15, 0.75),
        "orange": (0.98, 0.50, 0.05),
        "white": (0.97, 0.97, 0.97),
        "black": (0.05, 0.05, 0.05),
        "cyan": (0.10, 0.80, 0.85),
    }
)
COLOUR_NAMES = tuple(COLOURS)
SHAPES = ("circle", "triangle", "cross", "ring")
SIZES = ("small", "large")
WORDS = ("a", "on", *SIZES, *COLOUR_NAMES, *SHAPES)

# Columns of a tensor of specs: indices into COLOUR_NAMES, COLOUR_NAMES, SHAPES and SIZES.
COLOUR, GROUND, SHAPE, SIZE = range(4)
ATTRIBUTE_COUNTS = (len(COLOUR_NAMES), len(COLOUR_NAMES), len(SHAPES), len(SIZES))

SPLIT_SIZES: Mapping[PromptSplit, int] = MappingProxyType({"test": 64, "dev": 48, "train": 464})
SPLIT_SEED = "dina_rl shapes split 0"


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """What one caption asks for. Colour and ground always differ."""

    size: str
    colour: str
    shape: str
    ground: str


def caption(spec: Spec) -> str:
    """The one caption of a spec."""
    return f"a {spec.size} {spec.colour} {spec.shape} on {spec.ground}"


def parse_caption(text: str) -> Spec:
    """The spec of a caption.

    Raises:
        ValueError: the text is not one of the 576 captions.
    """
    words = text.split()
    if len(words) == 6:
        spec = Spec(size=words[1], colour=words[2], shape=words[3], ground=words[5])
        known = spec.size in SIZES and spec.shape in SHAPES and {spec.colour, spec.ground} <= COLOURS.keys()
        if known and spec.colour != spec.ground and caption(spec) == text:
            return spec
    raise ValueError(
        f"prompt {text!r} is outside the shapes grammar: write 'a {{{'|'.join(SIZES)}}} COLOUR "
        f"{{{'|'.join(SHAPES)}}} on OTHER_COLOUR', with colours among {', '.join(COLOUR_NAMES)}"
    )


def spec_tensor(prompts: Sequence[str]) -> Tensor:
    """Specs of captions as int64 indices, [B, 4] in the column order COLOUR, GROUND, SHAPE, SIZE.

    Raises:
        ValueError: a prompt is outside the grammar.
    """
    rows = [_row(parse_caption(prompt)) for prompt in prompts]
    return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), 4)


def palette() -> Tensor:
    """RGB of every colour in [0, 1], [9, 3], in the order of COLOUR_NAMES."""
    return torch.tensor(list(COLOURS.values()), dtype=torch.float32)


@functools.cache
def all_prompts() -> tuple[str, ...]:
    """All 576 captions in a fixed order."""
    return tuple(
        caption(Spec(size=size, colour=colour, shape=shape, ground=ground))
        for colour, ground, shape, size in itertools.product(COLOUR_NAMES, COLOUR_NAMES, SHAPES, SIZES)
        if colour != ground
    )


@functools.cache
def prompts(split: PromptSplit) -> tuple[str, ...]:
    """The prompts of a split: 464 for training, 48 for development, 64 for testing, disjoint.

    The shuffle sorts by a hash of the caption, so that it does not depend on any library's random numbers.

    Raises:
        ValueError: the split is unknown.
    """
    if split not in SPLIT_SIZES:
        raise ValueError(f"shapes has no split {split!r}: choose one of {', '.join(SPLIT_SIZES)}")
    shuffled = sorted(all_prompts(), key=_shuffle_key)
    start = 0
    for name, size in SPLIT_SIZES.items():
        if name == split:
            return tuple(shuffled[start : start + size])
        start += size
    raise AssertionError("unreachable: the split was checked above")


def _row(spec: Spec) -> tuple[int, int, int, int]:
    return (
        COLOUR_NAMES.index(spec.colour),
        COLOUR_NAMES.index(spec.ground),
        SHAPES.index(spec.shape),
        SIZES.index(spec.size),
    )


def _shuffle_key(text: str) -> bytes:
    return hashlib.blake2b(f"{SPLIT_SEED}\n{text}".encode(), digest_size=16).digest()
