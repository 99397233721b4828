"""The evaluator's pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from dina_rl.evaluation.calibration import Calibration
from dina_rl.evaluation.tables import Cell, Table
from dina_rl.report import COLOURS, FAINT, STYLES, plain, save

PANELS_PER_ROW = 3
Line = Sequence[tuple[float, Cell]]
"""(x, value) from left to right."""


def plot_table(table: Table, path: Path) -> None:
    """A table's numbers as dots, one line per row and one colour per column; error bars are spread or interval."""
    figure = Figure(figsize=(8, 1.2 + 0.38 * len(table.rows)), layout="constrained")
    axes = figure.subplots()
    scale = 100 if table.percent else 1
    for number, column in enumerate(table.columns):
        shift = 0.5 * ((number + 0.5) / len(table.columns) - 0.5)
        cells = enumerate(row.cells[column] for row in table.rows)
        points = [(place, cell) for place, cell in cells if cell is not None]
        if not points:
            continue
        below, above = zip(*(_error(cell) for _, cell in points), strict=True)
        axes.errorbar(
            [scale * cell.mean for _, cell in points],
            [place + shift for place, _ in points],
            xerr=[[scale * value for value in below], [scale * value for value in above]],
            fmt="o",
            markersize=4,
            linewidth=1,
            color=COLOURS[number % len(COLOURS)],
            label=column,
        )
    axes.set_yticks(range(len(table.rows)), [", ".join(filter(None, row.labels)) for row in table.rows])
    axes.invert_yaxis()
    axes.set_title(table.title, loc="left", fontsize=10)
    axes.set_xlabel("percent" if table.percent else "")
    plain(axes, "x")
    if axes.containers:
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    save(figure, path)


def plot_lines(panels: Mapping[str, Mapping[str, Line]], path: Path, *, title: str, percent: bool) -> None:
    """Values over the noise level, one panel per key and one line per inner key; bands are spread or interval."""
    columns = min(len(panels), PANELS_PER_ROW)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(1 + 3.4 * columns, 3.2 * rows + 0.2), layout="constrained")
    places = figure.subplots(rows, columns, squeeze=False).flatten()
    for empty in places[len(panels) :]:
        empty.remove()
    scale = 100 if percent else 1
    for axes, (name, lines) in zip(places, panels.items(), strict=False):
        for number, (label, line) in enumerate(lines.items()):
            colour, style = COLOURS[number % len(COLOURS)], STYLES[number // len(COLOURS) % len(STYLES)]
            x, y = [point for point, _ in line], [scale * cell.mean for _, cell in line]
            axes.plot(x, y, style, color=colour, marker="o", markersize=3, label=label)
            ends = [(cell.mean, *_error(cell)) for _, cell in line]
            low, high = [scale * (m - b) for m, b, _ in ends], [scale * (m + a) for m, _, a in ends]
            axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("noise level t")
        axes.set_ylabel("percent" if percent else "")
        plain(axes, "y")
    figure.suptitle(title, fontsize=10)
    if figure.axes[-1].lines:
        figure.axes[-1].legend(fontsize=7, frameon=False)
    save(figure, path)


def plot_reliability(curves: Mapping[str, Calibration], path: Path) -> None:
    """Reliability curves: the share of comparisons in which people agree, over the predicted winner's probability."""
    figure = Figure(figsize=(4.4, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.plot([0.5, 1], [0.5, 1], color=FAINT, linestyle="--", linewidth=1)
    for number, (label, curve) in enumerate(curves.items()):
        points = [(c, a) for c, a in zip(curve.confidence, curve.accuracy, strict=True) if c is not None]
        if not points:
            continue  # all its scores failed
        axes.plot(
            *zip(*points, strict=True),
            color=COLOURS[number % len(COLOURS)],
            marker="o",
            markersize=4,
            label=f"{label}: ECE {curve.ece:.3f}",
        )
    axes.set_xlabel("probability of the predicted winner")
    axes.set_ylabel("share of people's decisions for it")
    plain(axes, "both")
    if len(axes.lines) > 1:
        axes.legend(fontsize=7, frameon=False)
    save(figure, path)


def _error(cell: Cell) -> tuple[float, float]:
    """(below, above) the mean; 0 where nothing is known."""
    if cell.std is not None:
        return cell.std, cell.std
    if cell.low is not None and cell.high is not None:
        return max(0.0, cell.mean - cell.low), max(0.0, cell.high - cell.mean)
    return 0.0, 0.0
