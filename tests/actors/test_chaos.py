"""A few fixed faults of a cluster of three nodes; `benchmarks.chaos` draws them by the hundred.

None that fills the memory: the machine has others. A cluster that takes it to be full kills as well.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from actors.learner import LearnerActor
from actors.rollout import RolloutActor
from actors.scorer import ScorerActor
from benchmarks.chaos.__main__ import Usual, tried, undisturbed
from benchmarks.chaos.faults import STARTING, WORKING, Fault, Moment
from benchmarks.chaos.lab import Lab
from dina_rl.cli import EXIT_STOPPED
from dina_rl.textfiles import parse_yaml, read_text


@pytest.mark.parametrize("title", [*STARTING, *WORKING])
def test_a_moment_is_one_of_the_actors_own(title: str) -> None:
    kind, method = title.split(".")
    (actor,) = [each for each in (RolloutActor, ScorerActor, LearnerActor) if each.__name__ == kind]
    assert callable(getattr(actor, method))


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    lab = Lab(tmp_path_factory.mktemp("chaos"))
    yield lab
    lab.shutdown()


@pytest.fixture(scope="module")
def usual(lab: Lab) -> Usual:
    return undisturbed(lab)


@pytest.mark.parametrize(
    ("name", "title", "ending"),
    [
        ("node lost", "LearnerActor.update", "alike"),
        ("GCS killed", "ScorerActor.score", "promised"),
    ],
)
def test_a_run_ends_with_the_undisturbed_numbers_at_once_or_resumed(lab, usual, name, title, ending):
    fault = Fault(name=name, moment=Moment(title=title, into_loop_s=0.0))
    assert tried(lab, lab.directory / name.replace(" ", "_"), fault, usual).ending == ending


def test_where_ray_kills_for_memory_as_often_as_it_is_tried_the_run_ends_with_a_line(tmp_path: Path) -> None:
    lab = Lab(tmp_path, full=0.001)  # of the machine's: no worker has room
    settings = tmp_path / "run.yaml"
    values = parse_yaml(read_text(settings))
    values["workers"]["max_restarts"] = 1
    settings.write_text(yaml.safe_dump(values))
    try:
        lab.mend()
        with lab.attempt(tmp_path / "run", resume=False) as attempt:
            assert attempt.wait() == EXIT_STOPPED
    finally:
        lab.shutdown()
    said = attempt.said()
    assert "Traceback" not in said
    last = said.splitlines()[-1]
    assert last.startswith("error: ")
    assert "killed due to the node running low on memory" in last
    assert last.endswith("replaced 1 times (workers.max_restarts)")
