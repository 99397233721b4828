"""Probes: what the dev samples look like, beside how good golden finds them. They are measured, never optimised.

A reward that is hacked has a taste: people where nobody asked for them, one style for every prompt (the paper's Fig.
7), a grid (its limitations). What such a taste looks like can be asked of every sample that is measured anyway.
"""

from collections.abc import Callable

import torch

from dina_rl import runtime
from dina_rl.backbones.base import Backbone
from dina_rl.config import ProbesConfig
from dina_rl.scorers.clip import open_zero_shot
from dina_rl.scorers.grid import grid_energy
from dina_rl.types import GRID_TAG, ProbeReadings

Probes = Callable[[torch.Tensor], ProbeReadings]
"""Of images [B, 3, H, W] in [0, 1]."""


def open_probes(config: ProbesConfig, backbone: Backbone) -> Probes:
    """The configured probes; their model, if they have one, loads onto this process's device.

    Raises:
        ValueError: the model cannot be read.
    """
    pairs = [(pair.text, pair.against) for pair in config.pairs.values()]
    names = [pair_tag(name) for name in config.pairs]
    model = None if config.model is None else open_zero_shot(config.model, pairs, device=runtime.device())

    def read(images: torch.Tensor) -> ProbeReadings:
        values = {} if model is None else dict(zip(names, _columns(model(images)), strict=True))
        if config.grid:
            values[GRID_TAG] = tuple(grid_energy(images, backbone.grid.period).tolist())
        return ProbeReadings(values=values)

    return read


def pair_tag(name: str) -> str:
    return f"probes/{name}"


def _columns(probabilities: torch.Tensor) -> list[tuple[float, ...]]:
    return [tuple(column.tolist()) for column in probabilities.unbind(1)]
