"""The noise of the reward: shared inside a group or not, averaged over draws, with a price on disagreement."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from dina_rl.alignment.rewards import ScoringWorker
from dina_rl.scorers.dina import cautious_mean
from dina_rl.types import WorkItem
from tests.rollouts import Rollouts
from tests.tiny_run import tiny_run


@pytest.fixture(scope="module")
def trajectories(tmp_path_factory, tiny_pipeline, tiny_reward):
    worker = Rollouts(tiny_run(tmp_path_factory.mktemp("run"), tiny_pipeline, tiny_reward))
    return worker.rollout(
        [WorkItem(iteration=0, prompt_id=i, prompt="a small red circle on blue", group_size=3) for i in range(2)]
    )


def scores(tmp_path, tiny_pipeline, tiny_reward, trajectories, **scorer):
    run = tiny_run(tmp_path, tiny_pipeline, tiny_reward, rewards={"dina": {"path": str(tiny_reward), **scorer}})
    return ScoringWorker(run).score(trajectories)["dina"]


def alike(trajectory):
    """The group with its first sample in every place."""
    return replace(trajectory, latents=trajectory.latents[:1].repeat(3, 1, 1, 1))


def test_equal_samples_of_a_group_score_alike_under_shared_noise_only(
    tmp_path, tiny_pipeline, tiny_reward, trajectories
):
    groups = [alike(each) for each in trajectories]
    shared = scores(tmp_path, tiny_pipeline, tiny_reward, groups, noise="shared")
    assert torch.allclose(shared, shared[:, :1].expand(2, 3), atol=1e-5)
    independent = scores(tmp_path, tiny_pipeline, tiny_reward, groups, noise="independent")
    assert (independent.std(1) > 1e-4).all()


def test_draws_are_averaged_and_their_spread_is_subtracted(tmp_path, tiny_pipeline, tiny_reward, trajectories):
    plain = scores(tmp_path, tiny_pipeline, tiny_reward, trajectories, draws=4)
    cautious = scores(tmp_path, tiny_pipeline, tiny_reward, trajectories, draws=4, uncertainty_weight=2.0)
    assert (cautious < plain).all()
    again = scores(tmp_path, tiny_pipeline, tiny_reward, trajectories, draws=4, uncertainty_weight=2.0)
    assert torch.equal(again, cautious), "noise is fixed by the seed"


def test_cautious_mean_matches_numpy():
    draws = np.random.default_rng(0).normal(size=(5, 7))
    expected = draws.mean(0) - 0.3 * draws.std(0)
    assert np.allclose(cautious_mean(torch.tensor(draws), 0.3).numpy(), expected)
