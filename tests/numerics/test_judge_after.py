"""Rollouts that end on their way, to be judged as they are there (`grpo.judge_after`)."""

import pytest
import torch

from dina_rl.alignment.inline import InlineExperience, InlineLearner
from dina_rl.alignment.rewards import ScoringWorker
from dina_rl.flow.sampler import denoise
from dina_rl.reward.checkpoint import load_reward
from dina_rl.runtime import open_pipeline
from dina_rl.types import WorkItem
from tests.rollouts import Rollouts
from tests.tiny_run import tiny_run

ITEMS = [WorkItem(iteration=0, prompt_id=i, prompt="a small red circle on blue", group_size=3) for i in range(2)]


@pytest.fixture
def make(tmp_path, tiny_pipeline, tiny_reward):
    def build(judge_after, **changes):
        return tiny_run(tmp_path, tiny_pipeline, tiny_reward, grpo={"judge_after": judge_after}, **changes)

    return build


def test_a_rollout_is_the_first_steps_of_a_finished_one(make):
    whole, part = (Rollouts(make(judged)).rollout(ITEMS) for judged in (None, 2))  # of 4 steps, the first two trained
    for finished, left in zip(whole, part, strict=True):
        assert torch.equal(left.states, finished.states)
        assert torch.equal(left.log_probs, finished.log_probs)
        assert torch.equal(left.latents, left.states[-1])
        assert finished.latents_sigma == 0
        assert left.latents_sigma == float(left.sigmas[2])


def test_stopping_makes_the_first_steps_alone_and_going_on_ends_alike():
    met = []

    def velocity(latents, sigma):
        met.append(latents)
        return latents * 0.5 + sigma.view(-1, 1, 1, 1), latents * 0.7

    sigmas, noise = torch.linspace(1, 0, 7), torch.randn(3, 2, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    settings = {"window_start": 1, "noise_level": 0.7, "window_noise": noise[1:]}
    whole = denoise(noise[0], sigmas, velocity, **settings)
    seen = met.copy()
    for stop in (3, 4, 5):
        met.clear()
        part = denoise(noise[0], sigmas, velocity, **settings, stop=stop)
        assert len(met) == stop
        assert torch.equal(part.latents, seen[stop])
        assert torch.equal(part.states, whole.states)
        assert torch.equal(part.log_probs, whole.log_probs)


def test_a_state_is_scored_as_it_is_at_its_own_level(make, tiny_pipeline, tiny_reward):
    run = make(3, rewards={"dina": {"path": str(tiny_reward), "levels": [0.2, 0.7], "draws": 2}})
    trajectories = Rollouts(run).rollout(ITEMS)
    scores = ScoringWorker(run).score(trajectories)["dina"]
    model = load_reward(tiny_reward, open_pipeline(run.pipeline))
    for group, own in zip(trajectories, scores, strict=True):
        levels = torch.full((3,), group.latents_sigma)
        with torch.no_grad():
            expected = model.score(group.latents, levels, group.prompt.repeat(3))
        assert torch.allclose(own, expected, atol=1e-5)
    assert scores.std() > 0


def test_the_first_ratio_is_one_and_the_update_moves_the_policy(make):
    run = make(3, learner={"updates_per_iteration": 1})
    learner, experience = InlineLearner(run), InlineExperience(run)
    before = learner.policy()
    experience.publish(before)
    handles = [group.handle for group in experience.collect(ITEMS)]
    metrics = learner.update(0, handles, torch.tensor([[1.0, 0.0, -1.0]] * 2), 1.0)
    assert metrics["first_ratio_gap"] == 0
    after = learner.policy().tensors
    assert any(not torch.equal(tensor, after[name]) for name, tensor in before.tensors.items())
