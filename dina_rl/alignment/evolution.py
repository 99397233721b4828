"""The same prompts and noise over a run's iterations (the paper's Fig. 6): thumbnails on disk, and their strip.

A run's length says beforehand which measurements become columns, evenly spaced. So the disk holds a bounded number of
them, and a run that is resumed, or made longer, has the strip of the one that was never interrupted.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from dina_rl.checkpoint import load_tensors, save_tensors
from dina_rl.config import AlignRun
from dina_rl.report import draw_evolution

ROWS, COLUMNS = 6, 10
THUMBNAIL = 192
"""Pixels that a thumbnail is high or wide at most."""


class Evolution:
    """Under `evolution/` of a run directory, one file a column, and `evolution.png`."""

    def __init__(self, run: AlignRun, run_dir: Path) -> None:
        self._directory = run_dir / "evolution"
        self._picture = run_dir / "evolution.png"
        self._start = run.start.partition(" ")[0]
        self._spacing = spacing(run.iterations, run.golden.every, COLUMNS)

    def restore(self, done: int) -> None:
        """Forget what was seen after `done` iterations: it is about to be seen again."""
        for iteration, file in self._files().items():
            if iteration > done:
                file.unlink()

    def add(self, done: int, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Keep the first `images` [B, 3, H, W] uint8 of some `prompts`; returns the strip [3, h, w] as drawn.

        The newest column is always there; the next one takes its place unless it is one of those that stay.
        """
        shown = list(dict.fromkeys(prompts))[:ROWS]
        chosen = images[[prompts.index(prompt) for prompt in shown]]
        save_tensors(self._directory / f"iteration_{done:06d}.safetensors", {"images": thumbnails(chosen, THUMBNAIL)})
        for iteration, file in self._files().items():
            if iteration % self._spacing and iteration != done:
                file.unlink()
        columns = {iteration: load_tensors(file)["images"] for iteration, file in sorted(self._files().items())}
        titles = {(f"iteration {at}" if at else self._start): column for at, column in columns.items()}
        return draw_evolution(titles, shown, self._picture)

    def _files(self) -> dict[int, Path]:
        return {int(file.stem.rpartition("_")[2]): file for file in self._directory.glob("iteration_*.safetensors")}


def spacing(iterations: int, every: int, most: int) -> int:
    """Iterations between what is kept of measurements: `every`, doubled until no more than `most` of a run are.

    A longer run's are some of the same.
    """
    space = every
    while 1 + -(-iterations // space) > most:
        space *= 2
    return space


def thumbnails(images: torch.Tensor, side: int) -> torch.Tensor:
    """`images` [B, 3, H, W] uint8, made smaller where they are higher or wider than `side`."""
    height, width = images.shape[2:]
    scale = side / max(height, width)
    if scale >= 1:
        return images
    size = max(1, round(scale * height)), max(1, round(scale * width))
    smaller = torch.nn.functional.interpolate(images.float(), size, mode="bilinear", antialias=True)
    return smaller.round().clamp(0, 255).to(torch.uint8)
