import csv
from pathlib import Path

import pytest
import torch
from PIL import Image

from dina_rl.evaluation.calibration import calibrate
from dina_rl.evaluation.figures import plot_lines, plot_reliability, plot_table
from dina_rl.evaluation.tables import Cell, Row, Table, markdown, write_csv

SEEDS = Cell.over_seeds([0.7, 0.8, 0.9])
ONE = Cell.over_seeds([0.7512], low=0.7, high=0.8)
TABLE = Table(
    title="A table",
    labels=("model",),
    columns=("x", "y"),
    rows=(Row(labels=("a|b",), cells={"x": SEEDS, "y": ONE}), Row(labels=("c",), cells={"x": ONE, "y": None})),
    percent=True,
    notes=("A note.",),
)


def test_seeds_have_a_spread_and_one_seed_an_interval() -> None:
    assert (SEEDS.mean, SEEDS.n, SEEDS.low) == (pytest.approx(0.8), 3, None)
    assert SEEDS.std == pytest.approx(0.1)  # the sample's: over n - 1
    assert (ONE.std, ONE.low, ONE.high, ONE.n) == (None, 0.7, 0.8, 1)


def test_markdown_shows_percent_spread_and_interval() -> None:
    text = markdown(TABLE)
    assert "| a\\|b | 80.00 ± 10.00 (n=3) | 75.12 [70.00, 80.00] |" in text
    assert "| c | 75.12 [70.00, 80.00] |  |" in text
    assert text.rstrip().endswith("A note.")


def test_csv_keeps_shares_exactly(tmp_path: Path) -> None:
    write_csv(TABLE, tmp_path / "table.csv")
    first, second = csv.DictReader((tmp_path / "table.csv").open())
    assert (first["model"], float(first["x"]), float(first["x_std"]), first["n"]) == ("a|b", SEEDS.mean, SEEDS.std, "3")
    assert (float(first["y_low"]), second["y"], second["n"]) == (0.7, "", "1")


@pytest.mark.filterwarnings("error")
def test_tables_without_a_number_are_drawn_and_written(tmp_path: Path) -> None:
    empty = Table(
        title="Nothing", labels=("t",), columns=("x",), rows=(Row(labels=("0.1",), cells={"x": None}),), percent=False
    )
    write_csv(empty, tmp_path / "table.csv")
    assert (tmp_path / "table.csv").read_text().splitlines()[1] == "0.1,,,,,0"
    plot_table(empty, tmp_path / "table.png")
    plot_lines({"x": {}}, tmp_path / "lines.png", title="lines", percent=False)
    plot_reliability({"failed": calibrate(torch.tensor([torch.nan]), bins=10)}, tmp_path / "reliability.png")
    for name in ("table", "lines", "reliability"):
        assert (tmp_path / f"{name}.png").is_file()


def test_pictures_are_pictures(tmp_path: Path) -> None:
    plot_table(TABLE, tmp_path / "table.png")
    plot_lines({"x": {"a": [(0.1, SEEDS), (0.2, ONE)]}}, tmp_path / "lines.png", title="lines", percent=True)
    curve = calibrate(torch.tensor([0.6, 0.9, 0.2]), bins=10)
    failed = calibrate(torch.tensor([torch.nan]), bins=10)
    plot_reliability({"a": curve, "failed": failed}, tmp_path / "reliability.png")
    for name in ("table", "lines", "reliability"):
        with Image.open(tmp_path / f"{name}.png") as image:
            assert min(image.size) > 100
            assert len(image.convert("RGB").getcolors(10**6)) > 10  # something is drawn
