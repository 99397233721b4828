"""An alignment run's page in TensorBoard.

TensorBoard colours by run, so golden and proxy are runs of their own beside the one that everything else is in: the two
curves called `gain` share a chart and differ in colour, in Time Series, Scalars and Custom Scalars alike.

    tensorboard/           train/ update/ learner/ scorers/ seconds/ watch/, probes/ and guard/ where they are on,
                           pictures with their prompts, texts
    tensorboard/golden/    gain, golden/, golden_parts/
    tensorboard/proxy/     gain, proxy/, proxy_parts/
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter

from dina_rl.alignment.algorithms.registry import open_algorithm
from dina_rl.alignment.evolution import thumbnails
from dina_rl.config import AlignRun
from dina_rl.eventfile import EventFile
from dina_rl.markdown import grid, numbered, settings
from dina_rl.report import image_grid

SHOWN_IMAGES = 16
SIDE = 384
"""Pixels that a sample is high or wide at most: whole samples are in `samples.png` and in the measurements."""
COLUMNS = 4
"""Of a picture: as wide as a card of the page, so that its captions are read as it stands there."""
CURVES = {
    "proxy and golden: gain over the base, in its standard deviations": "gain",
    "golden (held out)": "golden/dev",
    "proxy (optimised)": "proxy/dev",
    "reward of the rollouts": "train/reward_mean",
}


class Board:
    """Written as the run goes on; `close` at its end. Every method raises StorageFailed where storage refuses.

    Args:
        done: iterations that a resumed run has done; what was written after them is about to be written again.
    """

    def __init__(self, run: AlignRun, directory: Path, *, done: int) -> None:
        purge = done + 1 if done else 0  # what another attempt wrote beyond that is not shown
        self._main, self._golden, self._proxy = (EventFile(directory / name, purge) for name in ("", "golden", "proxy"))
        self._main.write(lambda page: page.add_custom_scalars({"alignment": _charts(run)}))
        self.text("config", settings(run), done)

    def scalars(self, iteration: int, values: Mapping[str, float]) -> None:
        _add(self._main, iteration, values)

    def curves(self, iteration: int, *, golden: Mapping[str, float], proxy: Mapping[str, float]) -> None:
        """A point of the two curves and of what they are made of; a tag that both have is one chart."""
        _add(self._golden, iteration, golden)
        _add(self._proxy, iteration, proxy)

    def histogram(self, tag: str, values: torch.Tensor, iteration: int) -> None:
        self._main.write(lambda page: page.add_histogram(tag, values, iteration))

    def text(self, tag: str, text: str, iteration: int) -> None:
        self._main.write(lambda page: page.add_text(tag, text, iteration))

    def images(self, tag: str, images: torch.Tensor, prompts: Sequence[str], iteration: int) -> None:
        """The first of `images` [B, 3, H, W] uint8, small, each over its number and what has room of its prompt."""
        captions = [f"{number} {prompt}" for number, prompt in enumerate(prompts[:SHOWN_IMAGES], 1)]
        self.picture(tag, image_grid(thumbnails(images[:SHOWN_IMAGES], SIDE), COLUMNS, captions), iteration)

    def picture(self, tag: str, picture: torch.Tensor, iteration: int) -> None:
        """A picture [3, H, W] uint8 as it is."""
        self._main.write(lambda page: page.add_image(tag, picture, iteration))

    def prompts(self, split: str, prompts: Sequence[str], iteration: int) -> None:
        """The whole prompts of that split's pictures, by their numbers."""
        self.text(f"prompts/{split}", numbered(prompts[:SHOWN_IMAGES]), iteration)

    def result(
        self, base: Mapping[float, Mapping[str, float]], aligned: Mapping[float, Mapping[str, float]], iteration: int
    ) -> None:
        """Golden and proxy on the test prompts by guidance scale, where base and aligned model were measured."""
        series = [(table, name) for name in ("golden", "proxy") for table in (base, aligned)]
        rows = [
            [f"{scale:g}", *(f"{table[scale][name]:.3f}" if scale in table else "" for table, name in series)]
            for scale in sorted({*base, *aligned})
        ]
        header = ["guidance", "golden, base", "golden, aligned", "proxy, base", "proxy, aligned"]
        self.text("result", grid(header, rows), iteration)

    def close(self) -> None:
        for writer in (self._main, self._golden, self._proxy):
            writer.close()


def _add(file: EventFile, iteration: int, values: Mapping[str, float]) -> None:
    def add(page: SummaryWriter) -> None:
        for tag, value in values.items():
            page.add_scalar(tag, value, iteration)

    file.write(add)


def _charts(run: AlignRun) -> dict[str, list[str | list[str]]]:
    """Custom Scalars: one tag a chart, for two of one run would have one colour."""
    own = {title: f"update/{metric}" for title, metric in open_algorithm(run).work().charts.items()}
    return {title: ["Multiline", [f"{tag}$"]] for title, tag in (CURVES | own).items()}
