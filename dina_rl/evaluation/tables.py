"""Tables as CSV, for programs, and as Markdown, for people."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from dina_rl.checkpoint import write_text
from dina_rl.markdown import grid


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A number over the seeds of a row."""

    mean: float
    std: float | None = None  # sample standard deviation; None: one seed
    low: float | None = None  # confidence interval; None: several seeds, or none was computed
    high: float | None = None
    n: int = 1

    @staticmethod
    def over_seeds(values: Sequence[float], *, low: float | None = None, high: float | None = None) -> "Cell":
        """Mean and spread of one value per seed; a single one keeps its interval."""
        if len(values) == 1:
            return Cell(mean=values[0], low=low, high=high)
        return Cell(mean=mean(values), std=stdev(values), n=len(values))


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    labels: tuple[str, ...]  # one per label column
    cells: Mapping[str, Cell | None]  # by column; None: there is no such number


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table whose left columns are labels and whose others are numbers."""

    title: str
    labels: tuple[str, ...]
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    percent: bool  # numbers are shares, shown in percent
    notes: tuple[str, ...] = ()


def write_csv(table: Table, path: Path) -> None:
    """One line per row; a column and its `_std`, `_low`, `_high`, then `n`, the seeds. Shares stay shares."""
    parts = [(column, part) for column in table.columns for part in ("mean", "std", "low", "high")]
    header = [*table.labels, *(c if part == "mean" else f"{c}_{part}" for c, part in parts), "n"]
    lines = []
    for row in table.rows:
        values = [None if row.cells[c] is None else getattr(row.cells[c], part) for c, part in parts]
        seeds = max((cell.n for cell in row.cells.values() if cell is not None), default=0)
        lines.append([*row.labels, *("" if value is None else repr(value) for value in values), seeds])
    write_rows(path, header, lines)


def write_rows(path: Path, header: Sequence[str], lines: Sequence[Sequence[object]]) -> None:
    """A CSV file of any lines."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(lines)
    write_text(path, text.getvalue())


def markdown(table: Table) -> str:
    """The table with its title and notes."""
    lines = [shown(table)]
    if table.percent:
        lines.append("Percent.")
    lines.append("A spread is the standard deviation over n seeds; brackets are a bootstrap interval of one run.")
    return "\n\n".join([f"## {table.title}", *lines, *table.notes]) + "\n"


def shown(table: Table) -> str:
    """The bare table in Markdown."""
    rows = [[*row.labels, *(_number(row.cells[name], table.percent) for name in table.columns)] for row in table.rows]
    return grid([*table.labels, *table.columns], rows)


def _number(cell: Cell | None, percent: bool) -> str:
    if cell is None:
        return ""

    def plain(value: float) -> str:
        return f"{100 * value:.2f}" if percent else f"{value:.3g}"

    if cell.std is not None:
        return f"{plain(cell.mean)} ± {plain(cell.std)} (n={cell.n})"
    if cell.low is not None and cell.high is not None:
        return f"{plain(cell.mean)} [{plain(cell.low)}, {plain(cell.high)}]"
    return plain(cell.mean)
