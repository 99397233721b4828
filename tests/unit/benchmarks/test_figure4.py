"""Figure 4's benchmark counts what the plan counts, and the command runs."""

import pytest
import torch

from benchmarks import figure4, refl_step
from benchmarks.refl_step import AGAIN, APART, ASLEEP, DINA, PLAIN, REWARDS, Step, costs, filled
from dina_rl.alignment.costs import count_costs
from dina_rl.alignment.footprint import learner_footprint
from dina_rl.alignment.skeletons import open_skeletons
from tests.tiny_hpsv3 import save_tiny_hpsv3


@pytest.fixture(scope="module")
def words(tiny_pipeline, tiny_reward, tmp_path_factory):
    hpsv3 = save_tiny_hpsv3(tmp_path_factory.mktemp("hpsv3"))
    return [
        *("--pipeline", str(tiny_pipeline), "--dtype", "float32", "--height", "32", "--width", "32"),
        *("--max-sequence-length", "8", "--dina", str(tiny_reward)),
        *("--hpsv3.path", hpsv3.path, "--hpsv3.processor", hpsv3.processor),
    ]


@pytest.fixture(scope="module")
def step(words):
    run = figure4.load(figure4.BenchmarkRun, words, program="test").align_run()
    with open_skeletons(run) as (local, models):
        yield Step(run=local, models=models)


@pytest.fixture(scope="module")
def counted(step):
    return costs(step)


def test_the_parts_are_those_of_the_plan(step, counted):
    planned, policy = count_costs(step.run, step.models), counted[DINA].policy
    assert policy.forward == planned.forward
    assert policy.forward + policy.backward == planned.trained
    assert planned.score == sum(each.reward.forward for each in counted.values())
    footprint = learner_footprint(step.run, step.models.backbone)
    assert policy.held == footprint.weights + footprint.optimizer
    assert policy.kept == footprint.activations


def test_every_arrangement_needs_less_memory_than_the_one_before(counted):
    for each in counted.values():
        peaks = list(each.peaks().values())
        assert peaks == sorted(peaks, reverse=True)
        assert list(each.peaks()) == [PLAIN, APART, AGAIN, ASLEEP]


@pytest.mark.parametrize("reward", REWARDS)
def test_a_step_runs_on_a_device(step, reward):
    real = filled(step, reward, "cpu")
    real.in_one_graph(reward)
    with refl_step.checkpointed(real.models.transformer):
        real.policy_alone()
    assert real.reward_alone(reward).shape == real.inputs()[0].shape
    assert next(step.models.transformer.parameters()).device == torch.device("meta")


def test_the_command_prints_and_draws(words, tmp_path, capsys):
    figure4.main([*words, "--measure", "False", "--out", str(tmp_path / "new" / "figure4.png")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["DiNa-LRM", "HPSv3", "change", "vs", "graph", "paper"]
    assert [line.split()[-1] for line in lines if "-71.1%" in line or "-46.4%" in line or "-51.4%" in line] == [
        "-71.1%",
        "-46.4%",
        "-51.4%",
    ]
    assert (tmp_path / "new" / "figure4.png").read_bytes().startswith(b"\x89PNG")


def test_a_pipeline_that_is_not_there_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as ending:
        figure4.main(["--pipeline", str(tmp_path / "nowhere")])
    assert ending.value.code == 2
    assert "does not exist" in capsys.readouterr().err
