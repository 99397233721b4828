"""The in-process run: what it records, and that a resumed run is the uninterrupted one, bit for bit."""

import json
import re
from dataclasses import replace

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors import safe_open
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dina_rl.alignment.comparison import read_runs
from dina_rl.alignment.disk import disk_use
from dina_rl.alignment.inline import InlineExperience, InlineLearner
from dina_rl.alignment.loop import ScoredGroup, align, plan
from dina_rl.alignment.planning import describe
from dina_rl.alignment.prompts import load_prompts
from dina_rl.alignment.record import Recorder
from dina_rl.alignment.result import finished as is_finished
from dina_rl.checkpoint import load_tensors, open_run_dir
from dina_rl.runtime import open_pipeline
from jobs.align import exporter, opened, preflight
from jobs.export import main as export
from tests.tensors import assert_same_tensors
from tests.tiny_run import TINY, tiny_run
from tests.waiting import wait_until

LORA = TINY["learner"]["lora"]

RATES = {"learning_rate": 1e-3, "warmup_updates": 2, "schedule": "linear"}


def perform(run, experience=None):
    """Run the loop in this process; returns its recorder."""
    recorder = Recorder(run, run.run_dir, exporter(run))
    align(run, load_prompts(run.prompts), experience or InlineExperience(run), InlineLearner(run), recorder)
    return recorder


def adapter_of(run):
    return load_tensors(run.run_dir / "adapter" / "pytorch_lora_weights.safetensors")


def same_evolution(*runs):
    return len({(run.run_dir / "evolution.png").read_bytes() for run in runs}) == 1


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_pipeline, tiny_reward):
    run = tiny_run(tmp_path_factory.mktemp("whole"), tiny_pipeline, tiny_reward, learner=RATES)
    return run, perform(run)


def test_everything_a_user_looks_for_is_there(finished, tiny_pipeline):
    run, recorder = finished
    for name in ("curves.png", "samples.png", "evolution.png", "history.jsonl", "measurements/base.json"):
        assert (run.run_dir / name).stat().st_size > 0
    assert [point["iteration"] for point in recorder.history.points()] == [0, 2, 3]
    assert set(recorder.table("base")) == {1.0, 2.0}
    board = run.run_dir / "tensorboard"
    events = EventAccumulator(str(board)).Reload()
    assert {"update/ratio_mean", "learner/learning_rate"} <= set(events.Tags()["scalars"])
    assert {"samples/dev", "evolution"} <= set(events.Tags()["images"])
    for curve in ("golden", "proxy"):
        points = EventAccumulator(str(board / curve)).Reload().Scalars(f"{curve}/dev")
        assert [event.step for event in points] == [0, 2, 3]
    assert [entry["first_ratio_gap"] for entry in recorder.history.iterations()] == [0, 0, 0]
    StableDiffusion3Pipeline.from_pretrained(tiny_pipeline).load_lora_weights(run.run_dir / "adapter")


def test_a_checkpoint_takes_what_the_plan_says(finished):
    run, recorder = finished
    use = disk_use(run, open_pipeline(run.pipeline))
    counters = {"version", "ema_updates", "optimizer/step"}
    state = recorder.checkpoints.last().state
    assert use.checkpoint == sum(tensor.nbytes for name, tensor in state.items() if name not in counters)
    assert use.result == sum(tensor.nbytes for tensor in adapter_of(run).values())
    assert f"checkpoints {3 * use.checkpoint / 2**20:.1f} MiB" in use.words


def test_a_run_with_probes_is_the_one_without_to_the_last_bit(finished, tmp_path, tiny_pipeline, tiny_reward):
    whole, recorder = finished
    run = tiny_run(tmp_path, tiny_pipeline, tiny_reward, learner=RATES, probes={"grid_margin": 0.0, "patience": 1})
    probed = perform(run)
    assert_same_tensors(adapter_of(run), adapter_of(whole))
    readings = [point.pop("probes") for point in probed.history.points()]
    assert [list(each) for each in readings] == [["guard/grid"]] * 3
    drifts = [entry for entry in probed.history.entries if entry["kind"] == "drifted"]
    assert [e for e in probed.history.entries if e not in drifts] == recorder.history.entries
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.value for event in events.Scalars("guard/grid")] == pytest.approx(
        [each["guard/grid"] for each in readings]
    )


class Killed(Exception):
    pass


class DiesAt:
    """A real experience that is killed when asked to roll out an iteration."""

    def __init__(self, run, iteration):
        self._inner = InlineExperience(run)
        self._iteration = iteration
        self.publish = self._inner.publish
        self.measure = self._inner.measure

    def collect(self, items) -> list[ScoredGroup]:
        if items[0].iteration == self._iteration:
            raise Killed
        return self._inner.collect(items)


def as_version_01_left_it(run_dir):
    """Rename in a run directory what was called a step before version 0.2."""
    for directory in (run_dir / "checkpoints").iterdir():
        (directory / "SHA256SUMS").unlink()
        file = directory / "state.json"
        file.write_text(file.read_text().replace('"iteration": ', '"step": '))
        directory.rename(directory.with_name(directory.name.replace("iteration", "step")))
    config = run_dir / "config.yaml"
    saved = re.sub(r"^iterations:", "steps:", config.read_text(), flags=re.MULTILINE)
    saved = saved.replace("per_iteration:", "per_step:")
    config.write_text(re.sub(r"^nft:\n( .*\n)+", "", saved, flags=re.MULTILINE))


@pytest.mark.parametrize("version", ["today's", "0.1's", "today's, with a broken checkpoint"])
def test_resumed_run_equals_the_uninterrupted_one(tmp_path, tiny_pipeline, tiny_reward, finished, version):
    whole, recorder = finished
    run = tiny_run(tmp_path, tiny_pipeline, tiny_reward, learner=RATES)
    open_run_dir(run, run.run_dir, resume=False)
    with pytest.raises(Killed):
        perform(run, DiesAt(run, iteration=2))
    if version == "0.1's":
        as_version_01_left_it(tmp_path)
    if version.endswith("broken checkpoint"):
        newest = tmp_path / "checkpoints" / "iteration_000002" / "state.safetensors"
        newest.write_bytes(newest.read_bytes()[:-1] + b"?")
    open_run_dir(run, run.run_dir, resume=True)
    resumed = perform(run)
    assert_same_tensors(adapter_of(run), adapter_of(whole))
    assert resumed.history.entries == recorder.history.entries
    assert same_evolution(run, whole)
    lines = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert lines == recorder.history.entries
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/reward_mean")] == [1, 2, 3]
    rates = [event.value for event in events.Scalars("learner/learning_rate")]
    assert rates == pytest.approx([1e-3, 0.75e-3, 0.25e-3]), "of updates 2, 4 and 6"


def test_a_finished_run_that_is_made_longer_equals_the_one_that_was_longer(
    tmp_path, tiny_pipeline, tiny_reward, capsys
):
    whole = tiny_run(
        tmp_path / "whole", tiny_pipeline, tiny_reward
    )  # at a constant rate, which does not bind the length
    recorder = perform(whole)
    shorter = tiny_run(tmp_path / "run", tiny_pipeline, tiny_reward, iterations=2)
    prompts = load_prompts(shorter.prompts)
    with opened(shorter, prompts):
        perform(shorter)
    (shorter.run_dir / "result.json").unlink()  # as version 0.1 left it
    of_the_shorter = adapter_of(shorter)
    assert is_finished(shorter, shorter.run_dir)
    run = tiny_run(tmp_path / "run", tiny_pipeline, tiny_reward, resume=True)
    assert not is_finished(run, run.run_dir)
    with opened(run, prompts), pytest.raises(Killed):
        perform(run, DiesAt(run, iteration=2))
    assert_same_tensors(adapter_of(run), of_the_shorter)
    assert not is_finished(run, run.run_dir)
    with opened(run, prompts):
        longer = perform(run)
    assert is_finished(run, run.run_dir)
    assert_same_tensors(adapter_of(run), adapter_of(whole))
    assert longer.history.entries == recorder.history.entries
    assert same_evolution(run, whole)
    with (
        pytest.raises(ValueError, match="iterations 2: it has 3, which can only grow"),
        opened(run.model_copy(update={"iterations": 2}), prompts),
    ):
        pass
    moments_are_read_as_they_were_recorded(run, longer)
    exports_are_what_the_run_keeps(run, longer, capsys)


def moments_are_read_as_they_were_recorded(run, recorder):
    (read,) = read_runs([str(run.run_dir)])
    points = [(moment.iteration, moment.golden, moment.proxy) for moment in read.moments]
    assert points == [(point["iteration"], point["golden"], point["proxy"]) for point in recorder.history.points()]
    seconds = [moment.seconds for moment in read.moments]
    assert seconds == sorted(seconds)
    assert seconds[-1] == sum(recorder.seconds[stage] for stage in ("rollout", "update", "publish"))


def exports_are_what_the_run_keeps(run, recorder, capsys):
    """All in the form of the run's own export; what there is not is one line."""
    state = recorder.checkpoints.last().state
    kept = {"best": recorder.checkpoints.best_weights().tensors}
    kept |= {"average": part(state, "ema/"), "last": part(state, "policy/"), "3": part(state, "ema/")}
    for which, tensors in kept.items():
        out = run.run_dir / "exports" / which
        export([str(run.run_dir), "--which", which, "--out", str(out)])
        exporter(run)(run.run_dir / "expected", tensors)
        name = "pytorch_lora_weights.safetensors"
        found, expected = (safe_open(place / name, "pt") for place in (out, run.run_dir / "expected"))
        assert found.metadata() == expected.metadata()
        assert_same_tensors(load_tensors(out / name), load_tensors(run.run_dir / "expected" / name))
    assert_same_tensors(load_tensors(run.run_dir / "exports" / "average" / name), adapter_of(run))
    export([str(run.run_dir), "--which", "2"])
    assert str(run.run_dir / "adapter_iteration_000002" / name) in capsys.readouterr().out
    assert not torch.equal(state["ema/" + next(iter(tensors))], state["policy/" + next(iter(tensors))])
    for words, line in (
        ([str(run.run_dir), "--which", "1"], "keeps no checkpoint 1: there are 2, 3"),
        ([str(run.run_dir), "--which", "worst"], "which: 'worst' is none of best, last, average"),
        ([str(run.run_dir), "--out", str(out)], "is there already; name a new or empty directory"),
        ([str(run.run_dir / "adapter")], "holds no run: it has no config.yaml"),
    ):
        with pytest.raises(SystemExit, match="2"):
            export(words)
        error = capsys.readouterr().err
        assert line in error
        assert len(error.splitlines()) == 1


def part(state, prefix):
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def test_a_run_may_start_from_the_adapter_of_another(tmp_path, tiny_pipeline, tiny_reward, finished, capsys):
    """What is called base is of that adapter, and says so; the KL is to the base without it."""
    before, recorder = finished
    init = before.run_dir / "adapter"
    run = tiny_run(tmp_path, tiny_pipeline, tiny_reward, iterations=1, learner={"lora": {**LORA, "init": init}})
    preflight(run)
    assert_same_tensors(InlineLearner(run).policy().tensors, part(recorder.checkpoints.last().state, "ema/"))
    following = perform(run)
    assert following.table("base")[2.0] == recorder.table("aligned")[2.0]
    assert f"called base in measurements and charts is the start ({init})" in capsys.readouterr().out
    assert following.history.iterations()[0]["kl"] > recorder.history.iterations()[0]["kl"] > 0
    assert f"begins at the start ({init}); the KL is to the base without it" in describe(run)
    other = tiny_run(tmp_path, tiny_pipeline, tiny_reward, learner={"lora": {"rank": 4, "alpha": 4, "init": init}})
    with pytest.raises(ValueError, match=r"has rank 2, learner\.lora\.rank is 4"):
        preflight(other)


def test_another_seed_is_another_run(tmp_path, tiny_pipeline, tiny_reward, finished):
    run = tiny_run(tmp_path, tiny_pipeline, tiny_reward, seed=1, iterations=1)
    other = perform(run)
    assert other.history.points()[0]["golden"] == finished[1].history.points()[0]["golden"], "evaluation noise is fixed"
    assert other.history.iterations()[0]["reward_mean"] != finished[1].history.iterations()[0]["reward_mean"]


class LosesRewards(DiesAt):
    """A real experience whose rewards of chosen groups come back as NaN."""

    def __init__(self, run, groups):
        super().__init__(run, iteration=-1)
        self._groups = groups

    def collect(self, items):
        scored = self._inner.collect(items)
        for number in self._groups:
            scored[number].scores["dina"][0] = float("nan")
        return scored


def test_failed_rewards_drop_their_group_and_too_many_stop_the_run(tmp_path, tiny_pipeline, tiny_reward):
    run = tiny_run(tmp_path / "few", tiny_pipeline, tiny_reward, iterations=1, rollout={"max_failed": 0.25})
    recorder = perform(run, LosesRewards(run, [1]))
    assert recorder.history.iterations()[0]["groups_failed"] == 1
    run = tiny_run(tmp_path / "many", tiny_pipeline, tiny_reward, iterations=1, rollout={"max_failed": 0.25})
    with pytest.raises(RuntimeError, match="2 of 4 groups have a reward that is not finite"):
        perform(run, LosesRewards(run, [1, 2]))


class FallsAfter(DiesAt):
    """A real experience whose golden metric falls from the third measurement on, while its proxy rises."""

    def __init__(self, run):
        super().__init__(run, iteration=-1)
        self._count = 0
        self.measure = self._falling

    def _falling(self, items):
        found = self._inner.measure(items)
        if items[0].split == "test":
            return found
        self._count += 1
        golden = 0.5 - 0.1 * abs(self._count - 2)
        size = len(found.golden)
        return replace(found, golden=(golden,) * size, proxy=(float(self._count),) * size)


FALLING = {"iterations": 5, "golden": {"every": 1}}


@pytest.fixture(scope="module")
def left_alone(tmp_path_factory, tiny_pipeline, tiny_reward):
    """A run that diverges and is only marked."""
    changes = {**FALLING, "watch": {"action": "none"}}
    run = tiny_run(tmp_path_factory.mktemp("left"), tiny_pipeline, tiny_reward, **changes)
    return run, perform(run, FallsAfter(run))


@pytest.mark.parametrize("action", ["none", "stop"])
def test_a_diverged_run_is_marked_and_may_stop_at_its_best_adapter(
    tmp_path, tiny_pipeline, tiny_reward, left_alone, action
):
    run, recorder = left_alone
    if action == "stop":
        run = tiny_run(tmp_path, tiny_pipeline, tiny_reward, **FALLING, watch={"action": "stop"})
        recorder = perform(run, FallsAfter(run))
    assert recorder.watch.diverged_at == 3
    assert len(recorder.history.iterations()) == (3 if action == "stop" else 5)
    events = EventAccumulator(str(run.run_dir / "tensorboard")).Reload()
    assert [event.value for event in events.Scalars("watch/diverged")][:4] == [0, 0, 0, 1]
    best = recorder.checkpoints.best_weights()
    assert best.version == 2, "after the first iteration's two updates"
    exported = adapter_of(run)
    scale = run.learner.lora.alpha / run.learner.lora.rank  # the export has it in B
    expected = [tensor * scale if ".lora_B." in name else tensor for name, tensor in best.tensors.items()]
    found = [any(torch.equal(tensor, other) for other in exported.values()) for tensor in expected]
    assert len(found) == len(exported)
    assert all(found) == (action == "stop")
    again = Recorder(run, run.run_dir, exporter(run))
    again.restore()
    assert again.watch.diverged_at == 3


class KeepsCheckpoint(FallsAfter):
    """Also reads the checkpoint that iteration 3 starts from; the run itself keeps the last one alone."""

    def __init__(self, run):
        super().__init__(run)
        self._checkpoint = run.run_dir / "checkpoints" / "iteration_000003" / "state.safetensors"

    def collect(self, items):
        if items[0].iteration == 3:
            wait_until(self._checkpoint.is_file)  # it is written while the run goes on
            self.state = load_tensors(self._checkpoint)
        return super().collect(items)


def test_the_watch_rolls_back_to_the_best_state_and_goes_on(tmp_path, tiny_pipeline, tiny_reward):
    changes = {"golden": {"every": 1}, "watch": {"action": "roll_back"}}
    run = tiny_run(tmp_path, tiny_pipeline, tiny_reward, iterations=4, **changes)
    experience = KeepsCheckpoint(run)
    recorder = perform(run, experience)
    assert (recorder.watch.best["iteration"], recorder.history.alarms()) == (1, [3])
    assert len(recorder.history.iterations()) == 4
    best = recorder.checkpoints.best_state()
    assert int(best["version"]) == 2
    # The learner that iteration 3 starts from is the one after iteration 0: the same rollouts' policy, once more.
    assert_same_tensors(experience.state, best)


class OnlyFalls(FallsAfter):
    """Golden falls from the base on."""

    def _falling(self, items):
        found = super()._falling(items)
        return found if items[0].split == "test" else replace(found, golden=tuple(-v for v in found.proxy))


def test_rolled_back_to_the_base_the_run_begins_anew(tmp_path, tiny_pipeline, tiny_reward):
    """No moment of the optimizer survives: the next update is that of a fresh learner on the same groups."""
    changes = {"golden": {"every": 1}, "watch": {"action": "roll_back"}, "iterations": 2}
    run = tiny_run(tmp_path, tiny_pipeline, tiny_reward, **changes)
    experience, learner = OnlyFalls(run), InlineLearner(run)
    recorder = Recorder(run, run.run_dir, exporter(run))
    align(run, load_prompts(run.prompts), experience, learner, recorder)
    assert (recorder.watch.best["iteration"], recorder.history.alarms()) == (0, [2])
    fresh = InlineLearner(run)
    groups = InlineExperience(run).collect(plan(run, load_prompts(run.prompts).train, 0))
    advantages = torch.stack([group.scores["dina"] for group in groups])
    for each in (learner, fresh):
        each.update(0, [group.handle for group in groups], advantages, 1.0)
    assert_same_tensors(learner.state(), fresh.state())


def test_the_watch_raises_the_kl_weight(tmp_path, tiny_pipeline, tiny_reward, left_alone):
    run = tiny_run(tmp_path, tiny_pipeline, tiny_reward, **FALLING, watch={"action": "raise_kl", "kl_factor": 1e4})
    raised = perform(run, FallsAfter(run))
    assert raised.history.alarms() == [3, 5], "and again two measurements later"
    events = EventAccumulator(str(run.run_dir / "tensorboard")).Reload()
    assert [event.value for event in events.Scalars("watch/kl_scale")][:5] == [1, 1, 1, 1e4, 1e4]
    ours, theirs = raised.history.iterations(), left_alone[1].history.iterations()
    assert ours[:3] == theirs[:3]
    assert ours[4]["kl"] < theirs[4]["kl"], "a KL that weighs ten thousand times more is smaller"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_first_ratio_is_one_on_a_gpu(tmp_path, tiny_pipeline, tiny_reward, dtype):
    """Rollout and learner use the same forward geometry, so not even bf16 kernels may tell them apart."""
    run = tiny_run(tmp_path, tiny_pipeline, tiny_reward, iterations=1, pipeline={"dtype": dtype})
    assert perform(run).history.iterations()[0]["first_ratio_gap"] == 0
