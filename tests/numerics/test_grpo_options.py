"""What the learner does with the options of Flow-GRPO, on real rollouts of the tiny pipeline."""

from dataclasses import replace

import pytest
import torch

from dina_rl.alignment.algorithms.grpo import window_start
from dina_rl.alignment.engine import TorchEngine
from dina_rl.alignment.learner import PolicyLearner
from dina_rl.flow.sde import step_law
from dina_rl.types import TrainingGroup, WorkItem
from tests.rollouts import Rollouts
from tests.tensors import assert_same_tensors
from tests.tiny_run import tiny_run

ADVANTAGES = torch.tensor([1.0, 0.0, -1.0])


@pytest.fixture(scope="module")
def rollouts():
    """Trajectories of the first policy, made once for all runs whose rollouts are alike."""
    made = {}

    def roll_out(run, policy, iteration):
        key = run.rollout.model_dump_json(), run.learner.guidance_in_loss, iteration
        if key not in made:
            worker = Rollouts(run)
            worker.load_weights(policy)
            items = [
                WorkItem(iteration=iteration, prompt_id=i, prompt=f"a small red circle {i}", group_size=3)
                for i in range(4)
            ]
            made[key] = [trajectory for item in items for trajectory in worker.rollout([item])]
        return made[key]

    return roll_out


@pytest.fixture
def make(tmp_path, tiny_pipeline, tiny_reward, rollouts):
    """(learner, its groups) of a run with some sections changed."""

    def build(iteration=0, disturb=0.0, **changes):
        run = tiny_run(tmp_path, tiny_pipeline, tiny_reward, **changes)
        learner = PolicyLearner(run, lambda module: TorchEngine(module, run.learner))
        trajectories = rollouts(run, learner.policy(), iteration)
        trajectories = [replace(each, log_probs=each.log_probs + disturb) for each in trajectories]
        return learner, [TrainingGroup(rollout=each, advantages=ADVANTAGES) for each in trajectories]

    return build


def test_recomputed_log_probs_are_the_rollouts_in_fp32_bit_for_bit(make):
    adapters = []
    for source in ("rollout", "recompute"):
        learner, groups = make(grpo={"old_log_probs": source})
        metrics = learner.update(0, groups)
        assert metrics["first_ratio_gap"] == metrics["first_log_prob_noise"] == 0
        adapters.append(learner.policy().tensors)
    assert_same_tensors(*adapters)


def test_recomputing_takes_the_rollouts_noise_out_of_the_ratio(make):
    learner, groups = make(disturb=0.01, grpo={"old_log_probs": "recompute"})
    metrics = learner.update(0, groups)
    assert metrics["first_ratio_gap"] == 0
    assert metrics["first_log_prob_noise"] == pytest.approx(0.01, rel=1e-3)
    learner, groups = make(disturb=0.01, grpo={"old_log_probs": "rollout"})
    metrics = learner.update(0, groups)
    assert metrics["first_ratio_gap"] == pytest.approx(1 - 1 / 1.01005, rel=1e-2)


def test_a_strict_gate_stops_before_the_update(make):
    learner, groups = make(disturb=0.01, grpo={"old_log_probs": "rollout", "ratio_gate": "strict"})
    before = learner.policy()
    with pytest.raises(RuntimeError, match="clipping sees noise"):
        learner.update(0, groups)
    after = learner.policy()
    assert after.version == before.version
    assert_same_tensors(after.tensors, before.tensors)


def test_a_guided_loss_starts_at_ratio_one_too_and_differs_from_the_conditional_one(make):
    adapters = []
    for guided in (False, True):
        learner, groups = make(grpo={"kl_weight": 0.1}, learner={"guidance_in_loss": guided})
        metrics = learner.update(0, groups)
        assert metrics["first_ratio_gap"] == 0
        adapters.append(learner.policy().tensors)
    assert any(not torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])


def test_the_kl_is_zero_at_the_start_and_not_later(make):
    learner, groups = make(learner={"updates_per_iteration": 1})
    assert learner.update(0, groups)["kl"] == 0
    learner, groups = make(learner={"updates_per_iteration": 1, "epochs": 2})
    assert learner.update(0, groups)["kl"] > 0


@pytest.mark.parametrize("dynamics", ["flow_sde", "cps"])
def test_a_released_kl_leaves_out_the_length_of_a_step_where_its_law_has_one(make, dynamics):
    found = {}
    for unit in ("exact", "released"):
        learner, groups = make(
            rollout={"window_start": 1, "window_steps": 1, "dynamics": dynamics},
            grpo={"kl": unit, "clip_range": 1.0},
            learner={"updates_per_iteration": 1, "epochs": 2, "max_grad_norm": 1e-6},
        )
        found[unit] = learner.update(0, groups)["kl"]
    sigmas = groups[0].rollout.sigmas
    factor = float(sigmas[1] - sigmas[2]) if dynamics == "flow_sde" else 1.0
    assert found["exact"] > 0
    assert found["released"] / found["exact"] == pytest.approx(factor, rel=1e-3)


def test_each_epoch_updates_on_every_minibatch(make):
    learner, groups = make(learner={"updates_per_iteration": 2, "epochs": 3}, grpo={"old_log_probs": "recompute"})
    metrics = learner.update(0, groups)
    assert metrics["updates"] == 6
    assert learner.version == 6
    assert metrics["first_ratio_gap"] == 0
    assert metrics["largest_ratio_gap"] > 0


@pytest.mark.parametrize("dynamics", ["flow_sde", "dance"])
def test_on_policy_the_guard_scales_a_steps_gradient_by_std_over_dt(make, dynamics):
    norms = {}
    for guard in (False, True):
        learner, groups = make(
            rollout={"window_start": 1, "window_steps": 1, "dynamics": dynamics},
            grpo={"guard": guard, "kl_weight": 0.0},
            learner={"updates_per_iteration": 1},
        )
        norms[guard] = learner.update(0, groups)["grad_norm"]
    sigmas = groups[0].rollout.sigmas
    law = step_law(dynamics, sigmas, 1, 0.7)
    assert norms[True] / norms[False] == pytest.approx(law.std / float(sigmas[1] - sigmas[2]), rel=1e-4)


def test_statistics_of_each_step_average_to_those_of_the_window(make):
    learner, groups = make()
    metrics = learner.update(0, groups)
    for name in ("ratio_mean", "clip_low", "clip_high"):
        steps = [metrics[f"step_{number}/{name}"] for number in (0, 1)]
        assert sum(steps) / 2 == pytest.approx(metrics[name])


def test_a_drawn_window_is_one_for_all_groups_of_an_iteration_and_stays_in_its_range(make, tmp_path):
    changes = {"rollout": {"num_steps": 8, "window_steps": 2, "window_range": [1, 6]}}
    learner, groups = make(iteration=5, **changes)
    assert {group.rollout.window_start for group in groups} == {window_start(learner.run, 5)}
    assert learner.update(5, groups)["first_ratio_gap"] == 0
    assert {window_start(learner.run, i) for i in range(50)} == {1, 2, 3, 4}
