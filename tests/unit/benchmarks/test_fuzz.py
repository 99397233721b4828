"""Bad inputs: a few fixed trials of the kinds whose whole inputs are made at once, and what counts as a find."""

import os
import pickle
import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.fuzz import __main__ as fuzz
from benchmarks.fuzz import watch
from benchmarks.fuzz.kinds import KINDS
from benchmarks.fuzz.mutations import Damage
from benchmarks.fuzz.watch import Outcome, Places
from dina_rl.cli import fail

ROOM = {"free_reading": False, "seconds": 5, "memory_mib": 256}


def forked(task: Callable[[], object], directory: Path) -> Outcome:
    """What a trial's process tells of a task."""
    for name in ("root", "beside", "world"):
        (directory / name).mkdir()
    (directory / "beside" / "decoy.txt").write_text("a")
    pid = os.fork()
    if not pid:
        places = Places(
            root=directory / "root", beside=directory / "beside", world=directory / "world", said=directory / "said"
        )
        try:
            watch.write_outcome(directory / "outcome", watch.run(task, places, **ROOM))
        finally:
            os._exit(0)
    return watch.read_outcome(directory / "outcome", os.waitpid(pid, 0)[1])


def endless() -> None:
    while True:
        pass


@pytest.mark.parametrize(
    ("task", "ending"),
    [
        (lambda: None, "result"),
        (lambda: print("4 records, 1 malformed"), "counted skips"),
        (lambda: fail("a line"), "one line"),
        (lambda: [][0], "traceback"),
        (lambda: os._exit(7), "traceback"),
        (lambda: bytearray(2**30), "memory"),
        (lambda: Path("../beside/decoy.txt").read_bytes(), "outside"),
        (lambda: os.open("../beside/decoy.txt", os.O_RDONLY), "outside"),
        (lambda: Path("../new").mkdir(), "outside"),
        (lambda: subprocess.run(["true"], check=True), "executed"),
        (lambda: pickle.loads(pickle.dumps(Path)), "executed"),
    ],
)
def test_an_ending_is_called_what_it_is(task: Callable[[], object], ending: str, tmp_path: Path) -> None:
    assert forked(task, tmp_path).ending == ending


def test_what_never_ends_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ROOM, "seconds", 1)
    assert forked(endless, tmp_path).ending == "hang"


def test_a_trial_is_the_same_again(tmp_path: Path) -> None:
    made = []
    for name in ("a", "b"):
        root = tmp_path / name
        root.mkdir()
        rng = random.Random("0:configs-00003")
        KINDS["configs"].damaged(rng, Damage(rng, tmp_path / "beside"), tmp_path, root)
        made.append((root / "config.yaml").read_bytes())
    assert made[0] == made[1]


def test_fixed_trials_have_no_finds(capfd: pytest.CaptureFixture) -> None:
    for only in ("prompts", "manifests"):
        fuzz.main(["--trials", "12", "--only", only, "--processes", "1"])
        assert "| all | 12 |" in capfd.readouterr().out


def test_a_kind_that_is_none_is_one_line(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ending:
        fuzz.main(["--only", "nothing"])
    assert ending.value.code == 2
    assert "no kind is called so" in capsys.readouterr().err
