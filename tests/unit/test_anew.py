"""Work that is begun anew where a node takes it along."""

from collections.abc import Callable

import pytest

from dina_rl.errors import RunStopped, WorkLost
from jobs.anew import anew_where_lost


def lost_at_first(times: int) -> Callable[[], str]:
    losses = iter(range(times))

    def attempt() -> str:
        for number in losses:
            raise WorkLost(f"loss {number}")
        return "done"

    return attempt


def test_it_goes_on_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    found = anew_where_lost(lost_at_first(2), times=2, setting="a.setting", goes_on=lambda: "on we go")
    assert found == "done"
    assert capsys.readouterr().err.splitlines() == ["loss 0; on we go", "loss 1; on we go"]


def test_once_too_often_is_the_end() -> None:
    with pytest.raises(RunStopped, match=r"^loss 2; begun again 2 times \(a\.setting\)$"):
        anew_where_lost(lost_at_first(3), times=2, setting="a.setting", goes_on=lambda: "on we go")


def test_another_error_is_not_tried_again() -> None:
    def attempt() -> str:
        raise KeyError("a mistake")

    with pytest.raises(KeyError, match="a mistake"):
        anew_where_lost(attempt, times=2, setting="a.setting", goes_on=lambda: "on we go")
