"""The same run in one process, on Ray, on more actors, with actors killed under it, and on DeepSpeed ranks."""

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import ray
import torch

from actors.alignment import open_actors
from actors.experience import RayExperience
from actors.learner_gang import RayLearner
from actors.placement import Placement
from actors.remote import RemoteRollout
from actors.shifts import Shifts
from dina_rl.alignment.inline import InlineExperience
from dina_rl.alignment.loop import align, plan
from dina_rl.alignment.prompts import load_prompts
from dina_rl.alignment.record import Recorder
from dina_rl.checkpoint import load_tensors
from dina_rl.config import AlignRun
from dina_rl.errors import RunStopped
from jobs.align import align_generator, exporter
from tests.processes import title_of
from tests.tensors import assert_same_tensors
from tests.tiny_run import tiny_run

pytestmark = pytest.mark.usefixtures("ray_local")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    history: list[dict]
    weights: dict[str, torch.Tensor]


def outcome(recorder: Recorder) -> Outcome:
    (file,) = recorder.exported.glob("*.safetensors")
    return Outcome(history=recorder.history.entries, weights=load_tensors(file))


def finish(run: AlignRun) -> Outcome:
    return outcome(align_generator(run, load_prompts(run.prompts), run.run_dir))


@pytest.fixture(scope="module")
def make_run(tiny_pipeline, tiny_reward) -> Callable[..., AlignRun]:
    def make(run_dir: Path, **changes: dict | int) -> AlignRun:
        # Ample: the machine may be busy with other things, and nothing here waits for a timeout to pass.
        workers = {"start_timeout_s": 300, **changes.pop("workers", {})}
        return tiny_run(run_dir, tiny_pipeline, tiny_reward, workers=workers, **changes)

    return make


@pytest.fixture(scope="module")
def inline(make_run, tmp_path_factory) -> Outcome:
    run = make_run(tmp_path_factory.mktemp("inline"), inline=True)
    return finish(run)


def assert_same(ours: Outcome, theirs: Outcome) -> None:
    assert ours.history == theirs.history
    assert_same_tensors(ours.weights, theirs.weights)


class Killer(threading.Thread):
    """SIGKILLs the first of this session's worker processes that is seen to run `title` (Ray names them so).

    An actor alone, whatever it does, stands for calls that are too short to be seen.
    """

    def __init__(self, title: str) -> None:
        super().__init__(daemon=True)
        self.title = title
        self.killed = False
        self._deadline = time.monotonic() + 200

    def run(self) -> None:
        workers = psutil.Process().children(recursive=True)  # this test worker's own, not those of the one beside it
        while not self.killed and time.monotonic() < self._deadline:
            for process in workers:
                if not self.killed and title_of(process).startswith(self.title):
                    os.kill(process.pid, signal.SIGKILL)
                    self.killed = True
            time.sleep(0.001)


class Sabotaged:
    """A real experience and learner; from iteration 2 on, actors are killed in the middle of the calls `titles`.

    The learner has made a snapshot before iteration 1, and of its update it knows the arguments alone.
    """

    def __init__(self, experience: RayExperience, learner: RayLearner, titles: Sequence[str]) -> None:
        self._experience = experience
        self._titles = titles
        self.publish, self.measure = experience.publish, experience.measure
        self.update, self.policy, self.average = learner.update, learner.policy, learner.average
        self.state, self.load_state = learner.state, learner.load_state
        self.killers: list[Killer] = []

    def collect(self, items):
        if items[0].iteration == 1:
            self.state()
        if items[0].iteration == 2:
            self.killers = [Killer(f"ray::{title}") for title in self._titles]
            for killer in self.killers:
                killer.start()
        return self._experience.collect(items)


def assert_close(ours: Outcome, theirs: Outcome) -> None:
    """Equal up to the order of sums, which ranks change."""
    assert set(ours.weights) == set(theirs.weights) != set()
    for name, tensor in theirs.weights.items():
        torch.testing.assert_close(ours.weights[name], tensor, atol=1e-6, rtol=0)
    assert len(ours.history) == len(theirs.history)
    for mine, other in zip(ours.history, theirs.history, strict=True):
        numbers = {name: value for name, value in other.items() if isinstance(value, float)}
        assert {name: mine[name] for name in numbers} == pytest.approx(numbers, abs=1e-5)


REFL = {
    "iterations": 2,
    "algorithm": "refl",
    "refl": {"stop_range": [1, 3], "kl_weight": 0.1},
    "rollout": {"groups_per_call": 2},
}


def test_refl_on_deepspeed_ranks_with_gradients_of_the_scorers_equals_the_in_process_run(make_run, tmp_path):
    """All weights, at stage 3: about 10 MiB, which travel in parts. Ranks train an adapter below, at stage 2."""
    learner = {"updates_per_iteration": 1, "lora": None}
    inline = finish(make_run(tmp_path / "inline", inline=True, learner=learner, **REFL))
    workers = {"learner_ranks": 2, "weights_part_mib": 1}
    run = make_run(tmp_path / "ranks", learner={**learner, "zero_stage": 3}, workers=workers, **REFL)
    assert_close(finish(run), inline)


def test_a_rank_that_cannot_go_on_says_why_to_the_driver(make_run, tmp_path):
    """A learning rate that makes the second gradient overflow."""
    run = make_run(tmp_path, learner={"engine": "torch", "learning_rate": 1e30})
    learner = RayLearner(run, Placement(run.workers), Shifts(run.workers))
    sampled = [
        group.handle.rollout for group in InlineExperience(run).collect(plan(run, load_prompts(run.prompts).train, 0))
    ]
    handles = [RemoteRollout(call=ray.put([rollout]), gradients=None, number=0) for rollout in sampled]
    advantages = torch.linspace(-1, 1, 3).expand(len(handles), 3)
    with pytest.raises(RunStopped, match="the gradient norm is nan at policy version 1; the update is void"):
        learner.update(0, handles, advantages, 1.0)
    learner.shutdown()


NFT = {
    "algorithm": "nft",
    "nft": {"levels": 2, "old_rate": 0.1},
    "rollout": {"groups_per_call": 2},
    "golden": {"guidances": [2.0]},
}


EACH_KIND = ("TextActor", "RolloutActor.rollout", "ScorerActor.score", "LearnerActor.update")


BETWEEN_SNAPSHOTS = {"checkpoint_every": 3}  # whose states are snapshots too


def finish_sabotaged(run: AlignRun, titles: Sequence[str], caplog: pytest.LogCaptureFixture) -> Outcome:
    """The run's outcome although an actor is killed under it in each of the calls `titles`."""
    recorder = Recorder(run, run.run_dir, exporter(run))
    with open_actors(run) as (experience, learner):
        sabotaged = Sabotaged(experience, learner, titles)
        align(run, load_prompts(run.prompts), sabotaged, sabotaged, recorder)
        assert [killer.killed for killer in sabotaged.killers] == [True] * len(titles)
        pools = experience.texts, experience.rollouts, experience.scorers, learner
        restarts = tuple(each.restarts for each in pools)
        assert restarts == tuple(int(title in titles) for title in EACH_KIND)
    assert "building the learner anew from its last snapshot and making updates again: 1" in caplog.text
    return outcome(recorder)


def test_more_actors_and_killed_ones_change_nothing(make_run, inline, tmp_path, caplog):
    workers = {"rollout_workers": 2, "max_restarts": 1, "snapshot_every": 2}
    run = make_run(tmp_path, learner={"engine": "torch"}, workers=workers, **BETWEEN_SNAPSHOTS)
    assert_same(finish_sabotaged(run, EACH_KIND[1:], caplog), inline)


def test_actors_that_take_turns_at_two_gpus_change_nothing(make_run, tmp_path, caplog):
    """DiffusionNFT; a text actor and a rank are killed. Where the lost come back to is in test_placement."""
    inline = finish(make_run(tmp_path / "inline", inline=True, **NFT))
    numbers = {"rollout_workers": 2, "scorers": 2, "learner_ranks": 2}
    workers = {"gpus": 2, "sleep": True, "max_restarts": 1, **numbers}
    run = make_run(tmp_path / "turns", learner={"zero_stage": 2}, workers=workers, **NFT, **BETWEEN_SNAPSHOTS)
    assert_close(finish_sabotaged(run, ("TextActor", "LearnerActor.update"), caplog), inline)
