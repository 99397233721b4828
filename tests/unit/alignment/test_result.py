"""Whether a run's result is there, and whether the run may be made longer."""

import json
from pathlib import Path

import pytest

from dina_rl.alignment.result import finished, note_finished, why_not_longer
from dina_rl.config import AlignRun, GoldenConfig, LearnerConfig, WatchConfig


def with_result(run_dir: Path, *, checkpoint: int | None) -> None:
    """A directory with an exported adapter and, if asked for, a checkpoint without sums, whose weights nobody reads."""
    (run_dir / "adapter").mkdir()
    (run_dir / "adapter" / "pytorch_lora_weights.safetensors").touch()
    if checkpoint is not None:
        directory = run_dir / "checkpoints" / f"iteration_{checkpoint:06d}"
        directory.mkdir(parents=True)
        (directory / "state.safetensors").touch()
        (directory / "state.json").write_text(json.dumps({"history": [{"kind": "diverged", "iteration": checkpoint}]}))


def test_a_result_is_that_of_the_length_it_had(tmp_path: Path) -> None:
    run = AlignRun(iterations=200)
    assert not finished(run, tmp_path)
    with_result(tmp_path, checkpoint=None)
    note_finished(200, tmp_path)
    assert finished(run, tmp_path)
    assert not finished(AlignRun(iterations=201), tmp_path)


@pytest.mark.parametrize("action", ["none", "stop"])
def test_a_result_of_version_01_has_the_length_of_its_last_checkpoint(tmp_path: Path, action: str) -> None:
    with_result(tmp_path, checkpoint=200)
    assert finished(AlignRun(iterations=200), tmp_path)
    longer = AlignRun(iterations=300, watch=WatchConfig(action=action))
    assert finished(longer, tmp_path) == (action == "stop"), "a longer one would have stopped there too"


def test_a_run_grows_from_its_last_checkpoint(tmp_path: Path) -> None:
    run = AlignRun(iterations=300)
    assert why_not_longer(run, tmp_path, 200) is None
    with_result(tmp_path, checkpoint=None)
    assert "its last checkpoint is not in" in (why_not_longer(run, tmp_path, 200) or "")


@pytest.mark.parametrize(("action", "every", "grows"), [("none", 7, True), ("stop", 50, True), ("stop", 7, False)])
def test_a_watch_that_acts_must_not_have_seen_more_than_it_would(
    tmp_path: Path, action: str, every: int, grows: bool
) -> None:
    run = AlignRun(iterations=300, golden=GoldenConfig(every=every), watch=WatchConfig(action=action))
    assert (why_not_longer(run, tmp_path, 200) is None) == grows


@pytest.mark.parametrize(("schedule", "grows"), [("constant", True), ("cosine", False)])
def test_a_schedule_that_ends_with_the_run_binds_its_length(tmp_path: Path, schedule: str, grows: bool) -> None:
    run = AlignRun(iterations=300, learner=LearnerConfig(schedule=schedule, warmup_updates=5))
    assert (why_not_longer(run, tmp_path, 200) is None) == grows
