"""One process at a time in a run directory, and nothing left of a start that came to nothing."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from dina_rl.checkpoint import REPORTS, open_run_dir
from dina_rl.config import FitRun
from dina_rl.run_directory import run_directory
from jobs import cluster, encode
from tests.tiny_reward import write_preferences
from tests.tiny_run import tiny_run

ROOT = Path(__file__).parents[2]
HOLDER = """
import sys, time
from pathlib import Path
from dina_rl.config import FitRun
from dina_rl.run_directory import run_directory
with run_directory(FitRun(), Path(sys.argv[1]), resume=False) as run_dir:
    (run_dir / "work").write_text("")
    print("held", flush=True)
    time.sleep(600)
"""


KILLED = """
import os, signal, sys
from pathlib import Path
from dina_rl import checkpoint
from dina_rl.config import FitRun
from dina_rl.run_directory import run_directory
number, kept = int(sys.argv[2]), checkpoint.os.replace
def replace(source, target):
    global number
    number -= 1
    if number < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    kept(source, target)
checkpoint.os.replace = replace
with run_directory(FitRun(), Path(sys.argv[1]), resume=False):
    raise AssertionError("it was to be killed")
"""


@contextmanager
def held_by_another_process(run_dir: Path) -> Iterator[subprocess.Popen]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", HOLDER, str(run_dir)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def contents(directory: Path) -> dict[str, tuple[int, bytes]]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(file): (file.stat().st_mtime_ns, file.read_bytes()) for file in files}


def test_a_second_process_is_told_who_has_the_directory(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with held_by_another_process(run_dir) as process:
        before = contents(run_dir)
        line = rf"run directory {run_dir} is in use by process {process.pid} on \S+ since \d{{4}}-.*; wait until"
        with pytest.raises(ValueError, match=line), run_directory(FitRun(), run_dir, resume=True):
            pass
        assert contents(run_dir) == before
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert (run_dir / "run.lock").is_file(), "nobody cleared up"
        with run_directory(FitRun(), run_dir, resume=True) as found:
            assert found == run_dir
        assert sorted(path.name for path in run_dir.iterdir()) == ["config.yaml", "versions.json", "work"]


@pytest.mark.parametrize("files", [0, 1])
def test_a_start_that_was_killed_is_no_run_before_its_configuration(tmp_path: Path, files: int) -> None:
    """Killed in the write of its first file, and of its second."""
    run_dir = tmp_path / "run"
    command = [sys.executable, "-c", KILLED, str(run_dir), str(files)]
    killed = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    left = sorted(path.name for path in run_dir.iterdir())
    assert [name.partition("-")[0] for name in left if name.startswith(".")] == [
        (".config.yaml", ".versions.json")[files]
    ]
    if files:
        with pytest.raises(ValueError, match="holds a run already"), run_directory(FitRun(), run_dir, resume=False):
            pass
    with run_directory(FitRun(), run_dir, resume=files == 1) as found:
        (found / "work").write_text("")
    assert sorted(path.name for path in run_dir.iterdir()) == ["config.yaml", "versions.json", "work"]


def test_a_finished_run_is_shown_whoever_has_it_and_left_as_it_is(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with held_by_another_process(run_dir):
        before = contents(run_dir)
        with run_directory(FitRun(), run_dir, resume=True, finished=Path.is_dir) as found:
            assert found == run_dir
        with (
            pytest.raises(ValueError, match="with other values of: seed"),
            run_directory(FitRun(seed=1), run_dir, resume=True, finished=Path.is_dir),
        ):
            pass
        assert contents(run_dir) == before


def start(run_dir: Path, seed: int, *written: str, ends: type[BaseException] = ValueError, resume: bool = False):
    """A run that writes some files and ends badly."""

    def run() -> None:
        with run_directory(FitRun(seed=seed), run_dir, resume=resume):
            for name in written:
                (run_dir / name).parent.mkdir(exist_ok=True)
                (run_dir / name).write_text(name)
            raise ends

    with pytest.raises(ends):
        run()


@pytest.mark.parametrize("ends", [ValueError, SystemExit, KeyboardInterrupt, OSError])
def test_a_start_that_comes_to_nothing_leaves_nothing(tmp_path: Path, ends: type[BaseException]) -> None:
    start(tmp_path / "run", 0, ends=ends)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    start(tmp_path / "mine", 0, "tensorboard/events", ends=ends)
    assert list(tmp_path.rglob("*")) == [tmp_path / "mine"], "which the user made"


def test_reports_of_a_failed_start_stay_until_the_next(tmp_path: Path) -> None:
    start(tmp_path, 0, *REPORTS)
    assert {path.name for path in tmp_path.iterdir()} == set(REPORTS)
    for resume in (True, False):
        start(tmp_path, 1, "skipped.jsonl", resume=resume)
        assert [path.name for path in tmp_path.iterdir()] == ["skipped.jsonl"]


def test_nothing_is_lost_of_what_was_made(tmp_path: Path) -> None:
    start(tmp_path / "made", 0, "latents/shard")
    assert yaml.safe_load((tmp_path / "made" / "config.yaml").read_text())["seed"] == 0
    assert (tmp_path / "made" / "latents" / "shard").is_file()
    open_run_dir(FitRun(), tmp_path / "before", resume=False)  # a run that was killed before it made anything
    start(tmp_path / "before", 0, resume=True)
    assert (tmp_path / "before" / "config.yaml").is_file()
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.txt").write_text("")
    with (
        pytest.raises(ValueError, match="is not empty and holds no run"),
        run_directory(FitRun(), tmp_path / "theirs", resume=False),
    ):
        pass
    assert [path.name for path in (tmp_path / "theirs").iterdir()] == ["thesis.txt"]


def refused(main, argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def test_the_same_encoding_of_the_mended_set_starts_anew(tmp_path: Path, tiny_pipeline: Path, capsys) -> None:
    data, run_dir = tmp_path / "set", tmp_path / "run"
    write_preferences(data, train=2, test=2)
    images = (data / "images").rename(tmp_path / "images")
    argv = ["--inline", "--pipeline.path", str(tiny_pipeline), "--dataset.path", str(data), "--run-dir", str(run_dir)]
    error = refused(encode.main, argv, capsys)
    assert f"4 of 4 records of {data} are malformed" in error
    assert str(run_dir / "skipped.jsonl") in error
    assert {path.name for path in run_dir.iterdir()} <= set(REPORTS)
    images.rename(data / "images")
    encode.main(argv)
    assert (run_dir / "latents" / "store.json").is_file()
    assert not (run_dir / "skipped.jsonl").exists()


ADDRESSES = {
    "http://127.0.0.1:8265": "finds the dashboard; a job started by hand joins the cluster at host:6379",
    "127.0.0.1:1": "no Ray cluster answers there",
    "ray://127.0.0.1:1": "no Ray cluster answers there",
    "head-node": "no address of the form host:port",
    "head-node:many": "no address of the form host:port",
}


@pytest.mark.parametrize("address", ADDRESSES)
def test_a_cluster_that_cannot_be_reached_is_found_out_in_seconds(address: str) -> None:
    with pytest.raises((ConnectionError, ValueError), match=ADDRESSES[address]):
        cluster.check_address(address)


def test_an_alignment_without_its_cluster_is_one_line_and_leaves_nothing(
    tmp_path: Path, tiny_pipeline: Path, tiny_reward: Path
) -> None:
    """In a process of its own: in this one another test may have started Ray."""
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(tiny_run(tmp_path / "run", tiny_pipeline, tiny_reward).model_dump(mode="json")))
    ended = subprocess.run(
        [sys.executable, "-m", "jobs.align", "--config", str(file)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "RAY_ADDRESS": "127.0.0.1:1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: RAY_ADDRESS 127.0.0.1:1: no Ray cluster answers there")
    assert list(tmp_path.iterdir()) == [file]
