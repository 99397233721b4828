"""What the benchmark of the layouts compares, without its actors: its runs, the plan of both, and the table."""

from pathlib import Path

import pytest

from benchmarks.layouts import COLOCATED, LAYOUTS, SPLIT, BenchmarkRun, Result, alignment, planned, table
from dina_rl.alignment.timeline import Timeline


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Timeline]:
    directory = tmp_path_factory.mktemp("layouts")
    return {layout: planned(alignment(BenchmarkRun(), layout, directory)) for layout in LAYOUTS}


def test_the_plan_has_two_busy_gpus_against_two_that_wait(plans: dict[str, Timeline], tmp_path: Path) -> None:
    assert plans[COLOCATED].busy == (1.0, 1.0)
    assert len(plans[SPLIT].busy) == 2
    assert sum(plans[SPLIT].busy) == pytest.approx(1, abs=0.1), "one samples, then the other trains"
    assert plans[COLOCATED].length / plans[SPLIT].length == pytest.approx(0.5, abs=0.05)


def test_the_table_says_how_far_the_measurement_is_from_the_plan(plans: dict[str, Timeline]) -> None:
    ratio = plans[COLOCATED].length / plans[SPLIT].length
    seconds = {COLOCATED: [1.1 * ratio, 1.2 * ratio, 1.1 * ratio], SPLIT: [1.0, 1.0, 1.0]}
    last = table(Result(seconds=seconds, planned=plans)).splitlines()[-1]
    assert last.endswith(f"{ratio:.2f}; measured is +10% from it")
