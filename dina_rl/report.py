"""Pictures of runs: proxy and golden side by side (the paper's Fig. 5), of several runs (Fig. 3), and samples."""

import io
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont

from dina_rl.checkpoint import write_bytes
from dina_rl.types import Point

TILE = 96
"""Pixels that an image of a grid is wide at least."""
CAPTION_LINES = 4
GAP = 4
"""Pixels between the pictures of a strip."""
GOLDEN, PROXY, FAINT = "#c9a227", "#2f6f9f", "#8a8a8a"
COLOURS = ("#2f6f9f", "#c9a227", "#7a4f9a", "#3f8f5f", "#b5523b", "#6b7a86")
STYLES = ("-", "--", ":")
Curve = Sequence[tuple[float, float]]
"""(x, y) from left to right."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Band:
    """Runs that are one line: their median, between the lowest and the highest of them."""

    runs: Sequence[Curve]
    x: Sequence[float]  # where all of them are known
    low: Sequence[float]
    median: Sequence[float]
    high: Sequence[float]


def image_grid(images: torch.Tensor, columns: int = 8, captions: Sequence[str] = ()) -> torch.Tensor:
    """One picture [3, H, W] uint8 of `images` [B, 3, h, w] uint8 in rows of `columns`.

    Small ones are enlarged without smoothing. Below each stands its caption, if there are any.
    """
    enlarged = _enlarged(images)
    if captions:
        texts = [_caption(text, enlarged.shape[3]) for text in captions]
        enlarged = torch.cat([enlarged, torch.stack(texts)], 2)
    padded = torch.nn.functional.pad(enlarged, (2, 2, 2, 2), value=255)
    missing = -len(padded) % columns
    padded = torch.cat([padded, torch.full((missing, *padded.shape[1:]), 255, dtype=torch.uint8)])
    rows = padded.view(-1, columns, *padded.shape[1:])
    return torch.cat([torch.cat(list(row), 2) for row in rows], 1)


def _enlarged(images: torch.Tensor) -> torch.Tensor:
    scale = -(-TILE // images.shape[3])
    return images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)


def _caption(text: str, width: int) -> torch.Tensor:
    """`text` [3, h, width] uint8, black on white, wrapped, and cut after `CAPTION_LINES`.

    It is as large in its image as a reader needs who looks at a whole grid in a card of TensorBoard.
    """
    size = max(11, width // 11)
    font = _font(size)
    picture = Image.new("RGB", (width, CAPTION_LINES * (size + 2) + 2), "white")
    ImageDraw.Draw(picture).multiline_text((0, 0), _wrapped(text, font, width), "black", font, spacing=2)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(font_manager.findfont("DejaVu Sans Mono"), size)  # comes with matplotlib


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    return "\n".join(textwrap.wrap(text, int(width / font.getlength("m")), max_lines=CAPTION_LINES, placeholder="..."))


def draw_evolution(columns: Mapping[str, torch.Tensor], prompts: Sequence[str], path: Path) -> torch.Tensor:
    """Samples of `prompts` over the iterations, same noise: a row a prompt, a column [B, 3, h, w] uint8 a title.

    Returns the picture [3, H, W] uint8. Small samples are enlarged without smoothing.
    """
    samples = [_enlarged(column) for column in columns.values()]
    height, width = samples[0].shape[2:]
    size = max(11, width // 11)
    margin, head = 3 * width // 2, 3 * size
    corner = torch.full((3, head, margin), 255, dtype=torch.uint8)
    rows = [torch.cat([corner, *(_written(title, size, width + GAP, head) for title in columns)], 2)]
    for number, prompt in enumerate(prompts):
        tiles = [torch.nn.functional.pad(column[number], (0, GAP, 0, GAP), value=255) for column in samples]
        rows.append(torch.cat([_written(prompt, size, margin, height + GAP), *tiles], 2))
    strip = torch.cat(rows, 1)
    buffer = io.BytesIO()
    Image.fromarray(strip.permute(1, 2, 0).numpy()).save(buffer, "png")
    write_bytes(path, buffer.getvalue())
    return strip


def _written(text: str, size: int, width: int, height: int) -> torch.Tensor:
    """`text` [3, height, width] uint8, black on white, wrapped, in the middle of its height."""
    picture, font = Image.new("RGB", (width, height), "white"), _font(size)
    lines = _wrapped(text, font, width - 2 * GAP)
    ImageDraw.Draw(picture).multiline_text((GAP, height // 2), lines, "black", font, anchor="lm", spacing=2)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def plot_bands(panels: Mapping[tuple[str, str], Mapping[str, Band]], path: Path) -> None:
    """Several runs beside each other: a panel for each (what stands below, what stands beside), a colour a label."""
    below, beside = (list(dict.fromkeys(names)) for names in zip(*panels, strict=True))
    labels = list(dict.fromkeys(label for bands in panels.values() for label in bands))
    figure = Figure(figsize=(1 + 4.4 * len(below), 0.6 + 2.9 * len(beside)), layout="constrained")
    places = figure.subplots(len(beside), len(below), squeeze=False, sharex="col", sharey="row")
    for (x, y), bands in panels.items():
        axes = places[beside.index(y), below.index(x)]
        for label, band in bands.items():
            _plot_band(axes, band, _counted(label, len(band.runs)), labels.index(label))
        plain(axes, "y")
    for axes, name in zip(places[-1], below, strict=True):
        axes.set_xlabel(name)
    for axes, name in zip(places[:, 0], beside, strict=True):
        axes.set_ylabel(name)
    handles, names = places[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper left", ncols=min(3, len(labels)), frameon=False)
    save(figure, path)


def _counted(label: str, runs: int) -> str:
    """A label for the legend, where a leading underscore would hide it and dollars would begin a formula."""
    text = " " + label.replace("$", r"\$")
    return f"{text} (median and range of {runs} runs)" if runs > 1 else text


def _plot_band(axes: Axes, band: Band, label: str, number: int) -> None:
    colour, style = COLOURS[number % len(COLOURS)], STYLES[number // len(COLOURS) % len(STYLES)]
    axes.plot(band.x, band.median, style, color=colour, linewidth=2, label=label)
    axes.fill_between(band.x, band.low, band.high, color=colour, alpha=0.18, linewidth=0)
    for curve in band.runs:
        x, y = zip(*curve, strict=True)
        axes.plot(x, y, style, color=colour, linewidth=0.8, alpha=0.45, marker="o", markersize=3)


def plot_curves(points: Sequence[Point], base: Mapping[float, float], path: Path, *, start: str = "base") -> None:
    """Golden (left) and proxy (right) over iterations, with standard errors.

    Args:
        base: guidance scale -> golden of the base; its best is drawn as a line, the honest bar to clear.
        start: what that base is.
    """
    iterations = [point["iteration"] for point in points]
    golden = [(point["golden"], point["golden_std"]) for point in points]
    proxy = [(point["proxy"], point["proxy_std"]) for point in points]
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, curve, colour in ((left, golden, GOLDEN), (right, proxy, PROXY)):
        mean = [value for value, _ in curve]
        error = [std / point["samples"] ** 0.5 for (_, std), point in zip(curve, points, strict=True)]
        axes.plot(iterations, mean, color=colour, marker="o", markersize=4)
        low = [m - e for m, e in zip(mean, error, strict=True)]
        high = [m + e for m, e in zip(mean, error, strict=True)]
        axes.fill_between(iterations, low, high, color=colour, alpha=0.2, linewidth=0)
        axes.set_xlabel("iteration")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        plain(axes, "y")
    scale = max(base, key=base.__getitem__)
    left.axhline(base[scale], color=FAINT, linestyle="--", linewidth=1)
    left.annotate(f"{start} at its best guidance ({scale:g}, test prompts)", (0, base[scale]), (2, 3),
                  textcoords="offset points", fontsize=8, color=FAINT)  # fmt: skip
    left.set_title("golden metric (held out)")
    right.set_title("proxy: reward (optimised)")
    save(figure, path)


def plot_samples(before: torch.Tensor, after: torch.Tensor, path: Path, *, start: str = "base") -> None:
    """Test prompts' first samples, same noise: the start above, aligned below. Images [B, 3, h, w] uint8."""
    figure = Figure(figsize=(9, 5.2), layout="constrained")
    for axes, images, title in zip(figure.subplots(2, 1), (before, after), (start, "aligned"), strict=True):
        axes.imshow(image_grid(images).permute(1, 2, 0).numpy(), interpolation="nearest")
        axes.set_title(title, loc="left")
        axes.set_axis_off()
    save(figure, path)


def plain(axes: Axes, grid: Literal["x", "y", "both"]) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="#e5e5e5")


def save(figure: Figure, path: Path) -> None:
    """Write a figure by Agg directly: no pyplot state, no display, safe in any process."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png", dpi=130)
    write_bytes(path, buffer.getvalue())
