"""The clipped objective and the EMA against float64 numpy."""

import numpy as np
import pytest
import torch

from dina_rl.alignment.ema import AdapterEMA
from dina_rl.alignment.flow_grpo import clipped_policy_loss

LOG_PROB = torch.tensor([0.10, -0.20, 0.30, -0.05, 0.0], dtype=torch.float64)
ADVANTAGES = torch.tensor([1.0, 1.0, -1.0, -2.0, 0.5], dtype=torch.float64)


def test_clipped_objective_and_its_gradient_match_numpy():
    clip = 0.08
    log_prob = LOG_PROB.clone().requires_grad_()
    result = clipped_policy_loss(log_prob, torch.zeros(5, dtype=torch.float64), ADVANTAGES, clip)
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
    clipped_policy_loss(log_prob, log_prob.detach(), ADVANTAGES, 1e-4).loss.sum().backward()
    assert torch.equal(log_prob.grad, -ADVANTAGES)


def test_ema_follows_the_recursion_with_warm_up():
    values = np.random.default_rng(0).normal(size=(30, 3))
    ema = AdapterEMA({"a": torch.zeros(3, dtype=torch.float64)}, decay=0.7)
    expected = np.zeros(3)
    for n, value in enumerate(values):
        decay = min((1 + n) / (10 + n), 0.7)
        expected = decay * expected + (1 - decay) * value
        ema.update({"a": torch.tensor(value)})
    assert np.allclose(ema.state["a"].numpy(), expected)
    assert ema.updates == 30


def test_ema_does_not_alias_the_policy():
    policy = {"a": torch.ones(2)}
    ema = AdapterEMA(policy, decay=0.9)
    policy["a"].add_(5)
    assert ema.state["a"].tolist() == pytest.approx([1.0, 1.0])
