"""DiffusionNFT's loss against its derivation and the published formulas in float64, and what surrounds it."""

import numpy as np
import pytest
import torch

from dina_rl.alignment.algorithms.nft import (
    DiffusionNFT,
    FinishedGroup,
    contrastive_loss,
    following_share,
    noised_batches,
    training_levels,
)
from dina_rl.config import AlignRun
from dina_rl.types import PromptEmbeds, TrainingGroup, WorkItem

BOUND = 5.0
RUN = AlignRun.model_validate({"algorithm": "nft", "nft": {"levels": 4}, "rollout": {"num_steps": 5, "group_size": 36}})
SIGMAS = torch.tensor([1.0, 0.9, 0.7, 0.4, 0.2, 0.0])


def mean(values):
    return values.mean((1, 2, 3))


@pytest.fixture
def drawn():
    """x0, noise, v_theta, v_old [M, C, H, W], advantages and levels [M], float64."""
    rng = np.random.default_rng(0)
    return *rng.normal(size=(4, 6, 2, 3, 4)), np.array([-5.0, -1.3, 0.0, 0.4, 2.0, 5.0]), rng.uniform(0.1, 1, size=6)


def loss_and_gradient(drawn, **settings):
    clean, noise, velocity, old, advantages, levels = (torch.tensor(each) for each in drawn)
    velocity.requires_grad_()
    worth = 0.5 + advantages / (2 * BOUND)
    loss = contrastive_loss(velocity, old, noise - clean, worth, levels, bound=BOUND, **settings)
    loss.sum().backward()
    return loss.detach().numpy(), velocity.grad.numpy()


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_the_plain_loss_is_a_slope_along_the_advantage_and_a_pull_back(drawn, beta):
    """With d = v_theta - v_old and e = v - v_old: C beta |d|^2 - 2 A d.e + C / beta |e|^2."""
    clean, noise, velocity, old, advantages, _ = drawn
    moved, target = velocity - old, noise - clean - old
    loss, gradient = loss_and_gradient(drawn, beta=beta, weighting="velocity")
    slope = 2 * advantages * mean(moved * target)
    assert np.allclose(loss, BOUND * beta * mean(moved**2) - slope + BOUND / beta * mean(target**2))
    signed = advantages[:, None, None, None] * target
    assert np.allclose(gradient, 2 * (BOUND * beta * moved - signed) / moved[0].size)
    least = clean, noise, old + signed / (BOUND * beta), old, advantages, drawn[-1]
    assert np.abs(loss_and_gradient(least, beta=beta, weighting="velocity")[1]).max() < 1e-12


def published(drawn, velocity, beta, weights=None):
    """(loss [M], its two weights [M]) as the released code writes it: in x0, each branch over its own mean error."""
    clean, noise, _, old, advantages, levels = drawn
    t = levels[:, None, None, None]
    noisy = (1 - t) * clean + t * noise
    worth = np.clip(0.5 + advantages / 10, 0, 1)
    errors = [
        noisy - t * (beta * velocity + (1 - beta) * old) - clean,
        noisy - t * ((1 + beta) * old - beta * velocity) - clean,
    ]
    weights = weights or [np.maximum(mean(np.abs(error)), 1e-5) for error in errors]
    better, worse = (mean(error**2) / weight for error, weight in zip(errors, weights, strict=True))
    return 5 * (worth * better / beta + (1 - worth) * worse / beta), weights


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_the_adaptive_loss_and_its_gradient_are_the_published_ones(drawn, beta):
    loss, gradient = loss_and_gradient(drawn, beta=beta, weighting="adaptive")
    velocity = drawn[2]
    expected, weights = published(drawn, velocity, beta)
    assert np.allclose(loss, expected)
    along, step = np.random.default_rng(1).normal(size=velocity.shape), 1e-4
    ahead, behind = (published(drawn, velocity + s * step * along, beta, weights)[0] for s in (1, -1))
    assert np.allclose((gradient * along).sum((1, 2, 3)), (ahead - behind) / (2 * step))


def test_a_perfect_prediction_has_no_loss_and_no_gradient(drawn):
    target = drawn[1] - drawn[0]
    loss, gradient = loss_and_gradient((*drawn[:2], target, target, *drawn[4:]), beta=1.0, weighting="adaptive")
    assert not loss.any()
    assert not gradient.any()


def test_samples_are_worth_half_and_their_share_of_the_clip():
    scores = torch.tensor([[0.0, 1.0, 2.0], [3.0, 3.0, 3.0], [float("nan"), 0.0, 1.0], [0.0, 0.0, 90.0]])
    nft = {"algorithm": "nft", "nft": {"advantage_clip": 1.5}}
    worth = DiffusionNFT(AlignRun.model_validate({**nft, "rollout": {"group_size": 36}})).weigh({"dina": scores})
    assert (worth.kept.tolist(), worth.failed, worth.constant) == ([True, False, False, True], 1, 1)
    kept = scores[worth.kept].double().numpy()
    relative = (kept - kept.mean(1, keepdims=True)) / (kept.std() + 1e-4)
    assert relative.max() > 1.5
    expected = np.clip(0.5 + relative / 3, 0, 1)
    np.testing.assert_allclose(worth.values[worth.kept].numpy(), expected, atol=1e-6)


def test_the_sampling_copy_follows_on_the_published_schedules():
    plain = {"delay": 0, "rate": 0.001, "most": 0.5}
    late = {"delay": 75, "rate": 0.0075, "most": 0.999}
    assert [following_share(s, **plain) for s in (0, 10, 500, 900)] == pytest.approx([0, 0.01, 0.5, 0.5])
    assert [following_share(s, **late) for s in (0, 75, 76, 175, 300)] == pytest.approx([0, 0, 0.0075, 0.75, 0.999])


def group(prompt_id, size=5, iteration=0):
    item = WorkItem(iteration=iteration, prompt_id=prompt_id, prompt="a circle", group_size=size)
    numbers = torch.arange(size, dtype=torch.float32) + 10 * prompt_id
    rollout = FinishedGroup(
        item=item,
        policy_version=0,
        latents=numbers.view(-1, 1, 1, 1).expand(-1, 2, 3, 3),
        prompt=PromptEmbeds(embeds=torch.full((1, 2, 2), prompt_id), pooled=torch.zeros(1, 2)),
        sigmas=SIGMAS,
    )
    return TrainingGroup(rollout=rollout, advantages=numbers)


def test_levels_are_the_samplers_own_without_repeats_and_keyed_by_iteration_and_prompt():
    levels = training_levels(RUN, group(3).rollout.item, SIGMAS)
    assert levels.shape == (4, 5)
    for own in levels.T.tolist():
        assert len(set(own)) == 4
        assert set(own) <= set(SIGMAS[:-1].tolist())
    assert len({tuple(own) for own in levels.T.tolist()}) > 1, "each sample has an order of its own"
    assert torch.equal(levels, training_levels(RUN, group(3).rollout.item, SIGMAS))
    for other in (group(4), group(3, iteration=1)):
        assert not torch.equal(levels, training_levels(RUN, other.rollout.item, SIGMAS))


def test_what_a_sample_is_trained_at_knows_neither_forward_nor_rank_nor_neighbours():
    def trained(groups, size, ranks, chosen=None):
        chosen = torch.arange(5 * len(groups)) if chosen is None else torch.tensor(chosen)
        found = set()
        for rank in range(ranks):
            for batch in noised_batches(RUN, groups, chosen, size, rank, ranks):
                assert len(batch.weights) == size
                rows = zip(batch.worth, batch.sigma, batch.noise, batch.inputs.latents, batch.weights, strict=True)
                found |= {
                    (float(worth), float(sigma), float(noise.sum()), float(noisy.sum()))
                    for worth, sigma, noise, noisy, weight in rows
                    if weight
                }
        return found

    whole = trained([group(1), group(2)], 10, 1)
    assert len(whole) == 2 * 5 * RUN.nft.levels
    assert whole == trained([group(2), group(1)], 2, 2)
    assert trained([group(2)], 3, 1) < whole
    some = trained([group(1), group(2)], 2, 1, chosen=[1, 5, 9])
    assert some < whole
    assert {worth for worth, *_ in some} == {11, 20, 24}
