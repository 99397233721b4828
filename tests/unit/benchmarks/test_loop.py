"""The loop's benchmark: the plain loop computes what ours does, and the command says how much each has done."""

import math

import pytest
import torch

from benchmarks import loop, plain_loop, ray_overhead
from benchmarks.counting import DECODED, FREE, SCORED, TRAINED
from benchmarks.iteration import SAMPLE, UPDATE
from dina_rl.flow.sampler import replay_step
from dina_rl.flow.sde import step_law
from dina_rl.seeding import normal

SMALL = {"prompts": 1, "group-size": 2, "groups-per-call": 1, "micro-batch-size": 2, "updates": 1, "repeats": 1}
WORDS = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]


@pytest.mark.parametrize("step", [0, 1, 7])
def test_its_stochastic_step_is_ours(step: int):
    sigmas = torch.tensor([1, 0.96, 0.913, 0.858, 0.79, 0.707, 0.602, 0.465, 0.278, 0.009, 0])
    latents, velocity, after = normal((3, 2, 16, 8, 8), "plain step")
    mean, std = plain_loop.sde_step(latents, velocity, sigmas, step, 0.7)
    density, our_mean = replay_step(step_law("flow_sde", sigmas, step, 0.7), latents, after, velocity)
    torch.testing.assert_close(mean, our_mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(plain_loop.log_density(after, mean, std), density, rtol=1e-3, atol=1e-3)


def test_the_command_prints_equal_work_and_a_ratio(tiny_pipeline, capsys):
    loop.main([*WORDS, "--settings", "fast_guided", "--pipeline.path", str(tiny_pipeline)])
    lines = capsys.readouterr().out.splitlines()
    work = {line[:28].strip(): line[28:].split() for line in lines}
    passes = 2 * 2 * 10 + 2 * 3 * 2  # guided rollout, and the base's
    assert work[FREE] == [str(passes)] * 2
    assert work[TRAINED] == ["12", "12"]
    assert work[SCORED] == ["2", "2"]
    assert work[DECODED] == ["0", "2"]
    ratio = [float(value) for line in lines if line.startswith("plain loop / ours") for value in line.split()[-3:]]
    assert all(math.isfinite(value) and value > 0 for value in ratio)


def test_the_cost_of_ray_is_a_table_of_neighbours():
    seconds = {
        ray_overhead.INLINE: [{SAMPLE: 2.0, UPDATE: 2.0}, {SAMPLE: 1.0, UPDATE: 1.0}],
        ray_overhead.RAY: [{SAMPLE: 2.0, UPDATE: 3.0}, {SAMPLE: 1.5, UPDATE: 1.0}],
    }
    measured = ray_overhead.Measured(start={ray_overhead.INLINE: 1.0, ray_overhead.RAY: 20.0}, seconds=seconds)
    first, _, *rows = ray_overhead.report(measured).splitlines()
    assert first == "start: in one process 1.0 s, through Ray 20.0 s"
    assert rows[-1].split()[-3:] == ["1.25", "1.25", "1.25"]
