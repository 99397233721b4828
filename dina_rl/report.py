"""Pictures of a run: proxy and golden side by side (the paper's Fig. 5), and samples before and after."""

import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont

from dina_rl.checkpoint import write_bytes
from dina_rl.types import Point

TILE = 96
"""Pixels that an image of a grid is wide at least."""
CAPTION_LINES = 4
GOLDEN, PROXY, FAINT = "#c9a227", "#2f6f9f", "#8a8a8a"


def image_grid(images: torch.Tensor, columns: int = 8, captions: Sequence[str] = ()) -> torch.Tensor:
    """One picture [3, H, W] uint8 of `images` [B, 3, h, w] uint8 in rows of `columns`.

    Small ones are enlarged without smoothing. Below each stands its caption, if there are any.
    """
    scale = -(-TILE // images.shape[3])
    enlarged = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    if captions:
        texts = [_caption(text, enlarged.shape[3]) for text in captions]
        enlarged = torch.cat([enlarged, torch.stack(texts)], 2)
    padded = torch.nn.functional.pad(enlarged, (2, 2, 2, 2), value=255)
    missing = -len(padded) % columns
    padded = torch.cat([padded, torch.full((missing, *padded.shape[1:]), 255, dtype=torch.uint8)])
    rows = padded.view(-1, columns, *padded.shape[1:])
    return torch.cat([torch.cat(list(row), 2) for row in rows], 1)


def _caption(text: str, width: int) -> torch.Tensor:
    """`text` [3, h, width] uint8, black on white, wrapped, and cut after `CAPTION_LINES`.

    It is as large in its image as a reader needs who looks at a whole grid in a card of TensorBoard.
    """
    size = max(11, width // 11)
    font = ImageFont.truetype(font_manager.findfont("DejaVu Sans Mono"), size)  # comes with matplotlib
    lines = textwrap.wrap(text, int(width / font.getlength("m")), max_lines=CAPTION_LINES, placeholder="...")
    picture = Image.new("RGB", (width, CAPTION_LINES * (size + 2) + 2), "white")
    ImageDraw.Draw(picture).multiline_text((0, 0), "\n".join(lines), "black", font, spacing=2)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


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
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e5e5e5")
    scale = max(base, key=base.__getitem__)
    left.axhline(base[scale], color=FAINT, linestyle="--", linewidth=1)
    left.annotate(f"{start} at its best guidance ({scale:g}, test prompts)", (0, base[scale]), (2, 3),
                  textcoords="offset points", fontsize=8, color=FAINT)  # fmt: skip
    left.set_title("golden metric (held out)")
    right.set_title("proxy: reward (optimised)")
    _save(figure, path)


def plot_samples(before: torch.Tensor, after: torch.Tensor, path: Path, *, start: str = "base") -> None:
    """Test prompts' first samples, same noise: the start above, aligned below. Images [B, 3, h, w] uint8."""
    figure = Figure(figsize=(9, 5.2), layout="constrained")
    for axes, images, title in zip(figure.subplots(2, 1), (before, after), (start, "aligned"), strict=True):
        axes.imshow(image_grid(images).permute(1, 2, 0).numpy(), interpolation="nearest")
        axes.set_title(title, loc="left")
        axes.set_axis_off()
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    # Agg directly: no pyplot state, no display, safe in any process.
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png", dpi=130)
    write_bytes(path, buffer.getvalue())
