"""The clipped objective and the EMA against float64 numpy."""

import numpy as np
import pytest
import torch

from dina_rl.alignment.algorithms.clipping import clipped_policy_loss, ratio_gate, regulated_log_ratio
from dina_rl.alignment.ema import WeightsEMA
from dina_rl.flow.sde import log_prob as step_log_prob

LOG_PROB = torch.tensor([0.10, -0.20, 0.30, -0.05, 0.0], dtype=torch.float64)
ADVANTAGES = torch.tensor([1.0, 1.0, -1.0, -2.0, 0.5], dtype=torch.float64)


def test_clipped_objective_and_its_gradient_match_numpy():
    clip = 0.08
    log_prob = LOG_PROB.clone().requires_grad_()
    result = clipped_policy_loss(log_prob, ADVANTAGES, clip)
    ratio, advantages = np.exp(LOG_PROB.numpy()), ADVANTAGES.numpy()
    expected = -np.minimum(advantages * ratio, advantages * np.clip(ratio, 1 - clip, 1 + clip))
    assert np.allclose(result.loss.detach().numpy(), expected)
    result.loss.sum().backward()
    bound = advantages * ratio > advantages * np.clip(ratio, 1 - clip, 1 + clip)
    assert np.allclose(log_prob.grad.numpy(), np.where(bound, 0, -advantages * ratio))
    assert result.clipped_high.tolist() == [True, False, False, False, False]
    assert result.clipped_low.tolist() == [False, False, False, False, False]


def test_gradient_at_ratio_one_is_the_plain_policy_gradient():
    log_prob = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    clipped_policy_loss(log_prob - log_prob.detach(), ADVANTAGES, 1e-4).loss.sum().backward()
    assert torch.equal(log_prob.grad, -ADVANTAGES)


def test_ema_follows_the_recursion_with_warm_up():
    values = np.random.default_rng(0).normal(size=(30, 3))
    ema = WeightsEMA({"a": torch.zeros(3, dtype=torch.float64)}, decay=0.7)
    expected = np.zeros(3)
    for n, value in enumerate(values):
        decay = min((1 + n) / (10 + n), 0.7)
        expected = decay * expected + (1 - decay) * value
        ema.update({"a": torch.tensor(value)})
    assert np.allclose(ema.state["a"].numpy(), expected)
    assert ema.updates == 30


def test_ema_does_not_alias_the_policy():
    policy = {"a": torch.ones(2)}
    ema = WeightsEMA(policy, decay=0.9)
    policy["a"].add_(5)
    assert ema.state["a"].tolist() == pytest.approx([1.0, 1.0])


def test_the_guards_log_ratio_is_the_projection_of_the_move_on_the_noise():
    """x = old_mean + std eps, d = mean - old_mean: what is left of the log-ratio is mean(eps d), whatever std is."""
    rng = np.random.default_rng(1)
    old, move, eps = (rng.normal(size=(6, 4, 3, 2)) for _ in range(3))
    means = torch.tensor(old + 0.3 * move), torch.tensor(old)
    for std in (0.05, 0.7, 1.3):
        sample = torch.tensor(old + std * eps)
        log_ratio = step_log_prob(sample, means[0], std) - step_log_prob(sample, means[1], std)
        regulated = regulated_log_ratio(log_ratio, *means, std)
        assert np.allclose(regulated.numpy(), (eps * 0.3 * move).mean((1, 2, 3)), atol=1e-12)


def test_the_guard_is_the_plain_log_ratio_at_zero_bias_and_unit_std():
    mean = torch.randn(5, 2, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(regulated_log_ratio(LOG_PROB, mean, mean, 1.0), LOG_PROB)


def test_the_bias_is_each_samples_own():
    """flow_grpo averaged it over the batch at first (its issue 244)."""
    old = torch.zeros(2, 1, 1, 1, dtype=torch.float64)
    mean = torch.tensor([0.0, 2.0], dtype=torch.float64).view(2, 1, 1, 1)
    zero = torch.zeros(2, dtype=torch.float64)
    assert regulated_log_ratio(zero, mean, old, 0.5).tolist() == pytest.approx([0.0, 4.0])


def test_the_ratio_gate_names_both_numbers():
    assert ratio_gate(1e-4, 1e-5, 1e-5) is None
    closed = ratio_gate(3e-6, 4.7e-4, 4.5e-4)
    assert "4.7e-04" in closed
    assert "4.5e-04" in closed
    assert "recompute" in closed
