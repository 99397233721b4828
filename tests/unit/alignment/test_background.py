"""What goes on while the run does ends before anybody looks, and fails where somebody waits."""

import threading

import pytest

from dina_rl.alignment.background import Background


def test_work_goes_on_beside_its_owner_and_is_waited_for() -> None:
    background, let_go, done = Background(), threading.Event(), []

    def work() -> None:
        assert let_go.wait(60)
        done.append("done")

    background.settle()  # nothing yet
    background.begin(work)
    assert background.works
    assert done == []
    with pytest.raises(AssertionError, match="settle"):
        background.begin(work)
    let_go.set()
    background.settle()
    assert done == ["done"]
    assert not background.works


def test_a_failure_is_raised_once_where_somebody_waits_and_the_next_work_begins_afresh() -> None:
    background, done = Background(), []

    def fail() -> None:
        raise OSError("no room")

    background.begin(fail)
    with pytest.raises(OSError, match="no room"):
        background.settle()
    background.settle()
    background.begin(lambda: done.append("done"))
    background.settle()
    assert done == ["done"]
