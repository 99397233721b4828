"""The bar over steps that are taken elsewhere."""

import json
import time
from pathlib import Path

import pytest

from jobs.progress import FollowedSteps


def wait_for(seen: str, capsys: pytest.CaptureFixture[str]) -> str:
    said, give_up = "", time.monotonic() + 30
    while seen not in said:
        assert time.monotonic() < give_up, said
        time.sleep(0.05)
        said += capsys.readouterr().err
    return said


def test_steps_are_shown_as_they_are_taken_and_that_none_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "fit.jsonl"
    file.write_text(json.dumps({"step": 1, "loss": 9.0, "accuracy": 0.1}) + "\n")  # of an earlier attempt
    with FollowedSteps(file, steps=5, description="fit", around=lambda: "two workers wait", quiet_s=0.2):
        assert "; two workers wait\n" in wait_for("two workers wait\n", capsys)
        with file.open("a") as log:
            log.write(json.dumps({"step": 3, "loss": 0.5, "accuracy": 0.75}) + "\n" + '{"step": 4, "lo')
        said = wait_for("loss=0.500", capsys)
    assert "3/5" in said
    assert "accuracy=0.750" in said
    assert "loss=9" not in said


def test_where_steps_are_taken_nothing_else_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "fit.jsonl"
    with FollowedSteps(file, steps=2, description="fit", around=lambda: "two workers wait"):
        file.write_text(json.dumps({"step": 2, "loss": 0.5, "accuracy": 0.75}) + "\n")
    said = capsys.readouterr().err
    assert "2/2" in said
    assert "no step" not in said
