"""A few fixed faults of a cluster of three nodes; `benchmarks.chaos` draws them by the hundred.

None that fills the memory: the machine has others.
"""

from collections.abc import Iterator

import pytest

from benchmarks.chaos.__main__ import Usual, tried, undisturbed
from benchmarks.chaos.faults import Fault, Moment
from benchmarks.chaos.lab import Lab


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
