"""The result of a run in its directory: where it lies, whether it is there, and whether the run may be made longer.

A longer run must be the one that had its length from the start: what is done does not change with it. Whoever lets a
setting act by the total length, a schedule for instance, makes `why_not_longer` say so.
"""

from pathlib import Path

from typing_extensions import TypedDict  # typing's own cannot be read from a file before Python 3.12

from dina_rl.alignment.checkpoints import Checkpoints
from dina_rl.alignment.history import History
from dina_rl.alignment.watch import DivergenceWatch
from dina_rl.checkpoint import CONFIG_FILE, saved_config, write_json
from dina_rl.config import AlignRun
from dina_rl.textfiles import read_record

ADAPTER, TRANSFORMER = "adapter", "transformer"
RESULT_FILE = "result.json"
"""How many iterations the run was to have whose result lies there, written last."""


class _Result(TypedDict):
    iterations: int


def saved_run(run_dir: Path) -> AlignRun:
    """The run that a directory holds. Raises ValueError where it holds no alignment run."""
    file = run_dir / CONFIG_FILE
    inner = run_dir / "align"  # of `python -m dina_rl.local`
    if (inner / CONFIG_FILE).is_file():
        raise ValueError(f"run directory {run_dir} holds a whole loop; name its alignment, {inner}")
    if not run_dir.is_dir():
        raise ValueError(f"run directory {run_dir} does not exist")
    if not file.is_file():
        raise ValueError(f"run directory {run_dir} holds no run: it has no {CONFIG_FILE}")
    try:
        return saved_config(AlignRun, file)
    except ValueError as error:
        raise ValueError(f"run directory {run_dir} holds no alignment run: {error}") from error


def exported(run: AlignRun, run_dir: Path) -> Path:
    """Where the result of a run lies: the adapter, or after full fine-tuning the transformer."""
    return run_dir / (TRANSFORMER if run.learner.lora is None else ADAPTER)


def finished(run: AlignRun, run_dir: Path) -> bool:
    """Whether the run in a directory has exported its weights, the last thing it does, and was as long as `run`."""
    return _result_exists(run, run_dir) and _exported_length(run, run_dir) >= run.iterations


def note_finished(iterations: int, run_dir: Path) -> None:
    """Say that the result which lies in the directory is that of a run of `iterations`."""
    write_json(run_dir / RESULT_FILE, {"iterations": iterations})


def keep_length(run: AlignRun, run_dir: Path) -> None:
    """Before a finished run goes on: note how long it was, where the version that wrote it did not."""
    if _result_exists(run, run_dir) and not (run_dir / RESULT_FILE).is_file():
        note_finished(Checkpoints(run_dir).done(), run_dir)


def why_not_longer(run: AlignRun, run_dir: Path, before: int) -> str | None:
    """What speaks against making the run of `before` iterations in a directory the longer `run`; None: nothing."""
    if _result_exists(run, run_dir) and not Checkpoints(run_dir).done():
        return f"its last checkpoint is not in {run_dir / 'checkpoints'} any more"
    if run.learner.rate_depends_on_length:
        return f"a {run.learner.schedule} learner.schedule had other rates from its start, had it been longer"
    if run.watch.action != "none" and before % run.golden.every:
        return (
            f"it was to measure at its end, which is no multiple of golden.every ({run.golden.every}); a longer run "
            f"would not have, and watch.action {run.watch.action} goes by measurements"
        )
    return None


def _result_exists(run: AlignRun, run_dir: Path) -> bool:
    return any(exported(run, run_dir).glob("*.safetensors"))


def _exported_length(run: AlignRun, run_dir: Path) -> int:
    file = run_dir / RESULT_FILE
    if file.is_file():
        return read_record(_Result, file)["iterations"]
    checkpoints, history = Checkpoints(run_dir), History()  # of a version that wrote no such file
    history.restore(checkpoints.history())
    return run.iterations if DivergenceWatch(run.watch, history).stopped else checkpoints.done()
