"""Tables of what was measured several times."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Values of one quantity, and how many digits are shown."""

    values: Sequence[float]
    digits: int


def spread_table(rows: Mapping[str, Row]) -> str:
    """Minimum, median and maximum of every row."""
    width = max(map(len, rows))
    lines = [f"{'':<{width}}{'min':>8}{'median':>8}{'max':>8}"]
    for name, row in rows.items():
        shown = "".join(f"{of(row.values):>8.{row.digits}f}" for of in (min, median, max))
        lines.append(f"{name:<{width}}{shown}")
    return "\n".join(lines)


def ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """Of neighbours: what ran one after the other met the same load of the machine."""
    return [a / b for a, b in zip(over, under, strict=True)]
