"""A run that is left early, by a loss, by SIGTERM or for its disk, goes on and ends like one that was not."""

import errno
import os
import signal
import threading
from contextlib import ExitStack

import pytest

from dina_rl import storage
from dina_rl.alignment.checkpoints import Checkpoints
from dina_rl.alignment.inline import InlineExperience, InlineLearner
from dina_rl.alignment.loop import align
from dina_rl.alignment.prompts import load_prompts
from dina_rl.alignment.record import Recorder
from dina_rl.checkpoint import load_tensors
from dina_rl.cli import EXIT_INTERRUPTED, EXIT_TERMINATED, interruptible
from dina_rl.errors import RunStopped, WorkLost
from dina_rl.kept import number_of
from dina_rl.storage import StorageFailed
from dina_rl.termination import Terminated, deferred, heard, listening
from jobs.align import exporter
from tests.full_disk import away, full, mounted
from tests.tensors import assert_same_tensors
from tests.tiny_run import tiny_run
from tests.waiting import wait_until


class Struck:
    """A real experience and learner, on which `strike` falls in the call `stage` for the `time`th time."""

    def __init__(self, run, stage, time, strike):
        experience, learner = InlineExperience(run), InlineLearner(run)
        self.publish = experience.publish
        self.policy, self.average = learner.policy, learner.average
        self.state, self.load_state = learner.state, learner.load_state
        self.calls = {"collect": experience.collect, "measure": experience.measure, "update": learner.update}
        self.left, self.stage, self.strike = time, stage, strike

    def _call(self, stage, *arguments):
        self.left -= stage == self.stage
        if stage == self.stage and self.left == 0:
            self.strike()
        return self.calls[stage](*arguments)

    def collect(self, items):
        return self._call("collect", items)

    def measure(self, items):
        return self._call("measure", items)

    def update(self, *arguments):
        return self._call("update", *arguments)


def lose():
    raise WorkLost("a value was lost with its node")


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def make(run_dir, pipeline, reward, checkpoint_every=10):
    few = {
        "rollout": {"prompts_per_iteration": 2, "num_steps": 3},
        "golden": {"every": 1, "dev_samples": 2, "test_samples": 2, "guidances": [2.0], "num_steps": 2},
    }
    return tiny_run(run_dir, pipeline, reward, iterations=2, checkpoint_every=checkpoint_every, **few)


def perform(run, both=None):
    experience, learner = (both, both) if both else (InlineExperience(run), InlineLearner(run))
    recorder = Recorder(run, run.run_dir, exporter(run))
    align(run, load_prompts(run.prompts), experience, learner, recorder)
    return recorder


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_pipeline, tiny_reward):
    run = make(tmp_path_factory.mktemp("whole"), tiny_pipeline, tiny_reward)
    return perform(run)


@pytest.mark.parametrize(
    ("stage", "time", "strike"),
    [
        ("collect", 2, lose),
        ("update", 2, lose),
        ("measure", 3, terminate),
    ],  # measured: base, start
    ids=["lost while sampling", "lost while learning", "terminated while measuring"],
)
def test_what_was_learnt_is_kept_and_the_next_attempt_ends_alike(
    whole, tmp_path, tiny_pipeline, tiny_reward, stage, time, strike
):
    run = make(tmp_path, tiny_pipeline, tiny_reward)
    with listening(), pytest.raises((WorkLost, Terminated)):
        perform(run, Struck(run, stage, time, strike))
    recorder = Recorder(run, run.run_dir, exporter(run))
    assert recorder.checkpoints.done() == 1
    assert_ended_alike(perform(run), whole)


@pytest.mark.parametrize("trouble", [full, away])
@pytest.mark.parametrize(("stage", "time"), [("update", 2), ("measure", 3)])
def test_a_disk_that_fills_or_goes_away_costs_no_number(
    whole, tmp_path, tiny_pipeline, tiny_reward, monkeypatch, trouble, stage, time
):
    monkeypatch.setattr(storage, "WAITS_S", (0.01,))
    with mounted(tmp_path / "disk") as disk, ExitStack() as troubled:
        run = make(disk / "run", tiny_pipeline, tiny_reward, checkpoint_every=1)
        first = run.run_dir / "checkpoints" / "iteration_000001"

        def strike():
            if stage == "update":
                wait_until(first.is_dir)  # it is written while the run goes on
            troubled.enter_context(trouble(disk))

        with pytest.raises(StorageFailed, match="No space left" if trouble is full else "No such file|not there any"):
            perform(run, Struck(run, stage, time, strike))
        troubled.close()
        assert Recorder(run, run.run_dir, exporter(run)).checkpoints.done() == (1 if stage == "update" else 0)
        assert_ended_alike(perform(run), whole)


def test_the_run_goes_on_while_a_checkpoint_is_written(whole, tmp_path, tiny_pipeline, tiny_reward, monkeypatch):
    run = make(tmp_path, tiny_pipeline, tiny_reward, checkpoint_every=1)
    goes_on, save = threading.Event(), Checkpoints.save

    def save_then(checkpoints, checkpoint):
        assert goes_on.wait(60), "the second iteration waits for the first one's checkpoint"
        save(checkpoints, checkpoint)

    monkeypatch.setattr(Checkpoints, "save", save_then)
    recorder = perform(run, Struck(run, "collect", 2, goes_on.set))
    assert [number_of(each) for each in sorted((run.run_dir / "checkpoints").iterdir())] == [1, 2]
    assert [entry["iteration"] for entry in recorder.checkpoints.last().history][-1] == 2
    assert_ended_alike(recorder, whole)


def test_why_a_run_ends_is_not_lost_behind_a_checkpoint_that_could_not_be_written(
    tmp_path, tiny_pipeline, tiny_reward, monkeypatch, capfd
):
    run = make(tmp_path, tiny_pipeline, tiny_reward, checkpoint_every=1)
    goes_on = threading.Event()

    def refuse(checkpoints, checkpoint):
        assert goes_on.wait(60)
        raise StorageFailed("cannot write: no room", errno.ENOSPC)

    def stop():
        goes_on.set()
        raise RunStopped("the gradient norm is nan")

    monkeypatch.setattr(Checkpoints, "save", refuse)
    with pytest.raises(RunStopped, match="the gradient norm is nan"):
        perform(run, Struck(run, "collect", 2, stop))
    assert "  cannot write: no room\n" in "".join(capfd.readouterr())


def assert_ended_alike(again, whole):
    assert again.history.entries == whole.history.entries
    (ours,), (theirs,) = (each.exported.glob("*.safetensors") for each in (again, whole))
    assert_same_tensors(load_tensors(ours), load_tensors(theirs))


def test_sigterm_interrupts_unless_deferred_and_ends_a_program_with_its_own_code(tmp_path, capsys):
    before = signal.getsignal(signal.SIGTERM)
    said = []

    def work():
        terminate()
        said.append("deferred")
        with heard():
            said.append("not reached")

    with pytest.raises(SystemExit) as end, interruptible(tmp_path), deferred():
        work()
    assert (said, end.value.code) == (["deferred"], EXIT_TERMINATED)
    assert capsys.readouterr().err == f"\nterminated; add --resume to continue {tmp_path}\n"
    assert signal.getsignal(signal.SIGTERM) == before
    with pytest.raises(Terminated), listening():
        terminate()


def terminate_in_a_compiled_call():
    """As Ray's, which has its result when the signal comes."""
    try:
        terminate()
    except Terminated as raised:
        raise SystemError("returned a result with an exception set") from raised


def test_sigterm_is_heard_out_of_a_compiled_call_that_returns_all_the_same(tmp_path, capsys):
    with pytest.raises(SystemExit) as end, interruptible(tmp_path):
        terminate_in_a_compiled_call()
    assert (end.value.code, capsys.readouterr().err.count("\n")) == (EXIT_TERMINATED, 2)
    with pytest.raises(Terminated), listening(), deferred(), heard():
        terminate_in_a_compiled_call()
    with pytest.raises(SystemError), listening():
        raise SystemError("of another kind")
    with pytest.raises(SystemExit) as end, interruptible(tmp_path):
        raise SystemError("returned a result with an exception set") from KeyboardInterrupt()
    assert end.value.code == EXIT_INTERRUPTED
