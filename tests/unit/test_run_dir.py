"""What a run directory says of the code that ran, and what a resumed run may set differently."""

import os
import subprocess
from pathlib import Path

import pytest
import yaml

from dina_rl import checkpoint
from dina_rl.checkpoint import commit_of, open_run_dir, versions
from dina_rl.config import EvaluateRun, FitRun


def git(directory: Path, *words: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    return subprocess.run(
        ["git", "-C", str(directory), *identity, *words], check=True, capture_output=True, text=True
    ).stdout.strip()


def test_a_checkout_has_a_commit_and_says_when_it_differs_from_it(tmp_path: Path) -> None:
    git(tmp_path, "init", "--quiet")
    (tmp_path / "file.py").write_text("1")
    git(tmp_path, "add", "file.py")
    git(tmp_path, "commit", "--quiet", "-m", "first")
    commit_of.cache_clear()
    assert commit_of(tmp_path) == git(tmp_path, "rev-parse", "HEAD")
    (tmp_path / "file.py").write_text("2")
    commit_of.cache_clear()
    assert commit_of(tmp_path) == git(tmp_path, "rev-parse", "HEAD") + "-dirty"
    (tmp_path / "inside").mkdir()  # as a package in a virtual environment that lies in a repository
    assert commit_of(tmp_path / "inside") is None


@pytest.mark.parametrize("script", ["exec sleep 60", "exit 1", None])
def test_no_trouble_with_git_is_a_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None) -> None:
    """One that hangs, one that fails, and none at all."""
    (tmp_path / ".git").mkdir()
    (tmp_path / "bin").mkdir()
    if script is not None:
        (tmp_path / "bin" / "git").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "bin" / "git").chmod(0o755)
    path = str(tmp_path / "bin") + (os.pathsep + os.environ["PATH"] if script is not None else "")
    monkeypatch.setenv("PATH", path)
    monkeypatch.setattr(checkpoint, "GIT_TIMEOUT_S", 0.2)
    commit_of.cache_clear()
    assert commit_of(tmp_path) is None


def test_absent_packages_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "PACKAGES", ("torch", "no-such-package"))
    found = versions()
    assert set(found) == {"dina_rl", "commit", "python", "torch", "no-such-package"}
    assert found["torch"] is not None
    assert found["no-such-package"] is None


def test_a_resumed_run_may_have_other_processes_and_places(tmp_path: Path) -> None:
    run = FitRun(run_dir=tmp_path / "run")
    open_run_dir(run, run.run_dir, resume=False)
    fit = {"num_workers": 4, "micro_batch_size": 2, "gradient_checkpointing": True}
    other = FitRun.model_validate({"inline": True, "dataset": {"max_skipped": 0.5}, "fit": fit, "resume": True})
    moved = open_run_dir(other, (tmp_path / "run").rename(tmp_path / "moved"), resume=True)
    assert yaml.safe_load((moved / "config.yaml").read_text())["fit"]["num_workers"] == 4
    for values in ({"dataset": {"batches_per_shard": 2}}, {"fit": {"evaluate_every": 5}}, {"latents": "there"}):
        with pytest.raises(ValueError, match="with other values of: (dataset.batches_per_shard|fit.evaluate|latents)"):
            open_run_dir(FitRun.model_validate(values), moved, resume=True)


def test_a_resumed_evaluation_tells_anew_from_what_is_kept(tmp_path: Path) -> None:
    run = EvaluateRun(run_dir=tmp_path / "run")
    open_run_dir(run, run.run_dir, resume=False)
    other = EvaluateRun.model_validate({"cache": "elsewhere", "workers": {"num_workers": 9}})
    open_run_dir(other, run.run_dir, resume=True)
    with pytest.raises(ValueError, match="with other values of: bins"):
        open_run_dir(EvaluateRun(bins=3), run.run_dir, resume=True)
    open_run_dir(EvaluateRun(bins=3), run.run_dir, resume=True, may_change=("bins",))


def test_a_directory_whose_configuration_is_none_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("just words\n")
    with pytest.raises(ValueError, match="config.yaml holds no configuration; was it edited"):
        open_run_dir(FitRun(), tmp_path, resume=True)
