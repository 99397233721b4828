import math

import pytest
import torch

from dina_rl.config import ThurstoneConfig
from dina_rl.reward.thurstone import (
    PROBABILITY_FLOOR,
    comparison_variance,
    fidelity_loss,
    matched_fidelity_loss,
    preference_probability,
)


def test_variance_grows_with_the_noise_level() -> None:
    config = ThurstoneConfig(k=2.0, sigma_u=0.1)
    variance = comparison_variance(torch.tensor([0.0, 0.5, 1.0]), config)
    torch.testing.assert_close(variance, torch.tensor([0.01, 0.51, 2.01]))


def test_fixed_variance_is_the_same_at_every_level() -> None:
    config = ThurstoneConfig(variance="fixed", sigma_u=0.5)
    variance = comparison_variance(torch.tensor([0.0, 0.5, 1.0]), config)
    torch.testing.assert_close(variance, torch.full((3,), 0.25))


def test_clean_samples_give_equation_5() -> None:
    margin, sigma_u = torch.tensor([-0.3, 0.0, 0.2], dtype=torch.float64), 0.1
    variance = comparison_variance(torch.zeros(3, dtype=torch.float64), ThurstoneConfig(sigma_u=sigma_u))
    expected = torch.distributions.Normal(0.0, 1.0).cdf(margin / math.sqrt(sigma_u**2 + sigma_u**2))
    torch.testing.assert_close(preference_probability(margin, variance), expected)


def test_loss_interpolates_the_label() -> None:
    margin, variance = torch.tensor([0.4]), torch.tensor([1.0])
    p = preference_probability(margin, variance).item()
    for label in (0.0, 0.3, 1.0):
        expected = 1 - math.sqrt(label * p + (1 - label) * (1 - p))
        assert fidelity_loss(margin, variance, torch.tensor([label])).item() == pytest.approx(expected, abs=1e-6)


def test_loss_is_symmetric_under_exchange_of_the_images() -> None:
    margin, variance = torch.tensor([-3.0, 0.2, 5.0]), torch.full((3,), 0.3)
    label = torch.tensor([1.0, 0.25, 0.0])
    torch.testing.assert_close(fidelity_loss(margin, variance, label), fidelity_loss(-margin, variance, 1 - label))


def test_hopeless_and_certain_pairs_have_finite_loss_and_gradient() -> None:
    margin = torch.tensor([-1e4, -30.0, 30.0, 1e4], requires_grad=True)
    loss = fidelity_loss(margin, torch.full((4,), 0.01), torch.ones(4))
    loss.sum().backward()
    torch.testing.assert_close(loss, torch.tensor([1.0, 1.0, 0.0, 0.0]), atol=2 * math.sqrt(PROBABILITY_FLOOR), rtol=0)
    assert margin.grad.isfinite().all()


def test_small_probabilities_keep_their_gradient_in_single_precision() -> None:
    # z = -6: p = 1e-9, which (1 + erf(z / sqrt 2)) / 2 rounds to 0 in fp32.
    margin = torch.tensor([-6 * math.sqrt(2)], requires_grad=True)
    fidelity_loss(margin, torch.ones(1), torch.ones(1)).backward()
    assert margin.grad.item() < 0


MARGINS = torch.tensor([-1.3, -0.2, 0.0, 0.4, 2.0], dtype=torch.float64)
VARIANCE = torch.tensor([0.3, 0.01, 1.0, 0.5, 2.01], dtype=torch.float64)


@pytest.mark.parametrize("y", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_a_soft_label_scales_the_gradient_of_equation_9(y: float) -> None:
    """d/dm [1 - sqrt(q)] with q = y p + (1 - y)(1 - p) is -(2 y - 1) p' / (2 sqrt(q)): of one sign for every margin."""
    margin, scale = MARGINS.clone().requires_grad_(), torch.sqrt(2 * VARIANCE)
    fidelity_loss(margin, VARIANCE, torch.full_like(MARGINS, y)).sum().backward()
    normal = torch.distributions.Normal(0.0, 1.0)
    p = normal.cdf(MARGINS / scale)
    slope = normal.log_prob(MARGINS / scale).exp() / scale
    expected = -(2 * y - 1) * slope / (2 * torch.sqrt(y * p + (1 - y) * (1 - p)))
    torch.testing.assert_close(margin.grad, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("y", [0.0, 1.0])
def test_the_matched_loss_is_equation_9_where_the_label_is_hard(y: float) -> None:
    label, found = torch.full_like(MARGINS, y), []
    for loss in (fidelity_loss, matched_fidelity_loss):
        margin = MARGINS.clone().requires_grad_()
        value = loss(margin, VARIANCE, label)
        value.sum().backward()
        found.append((value.detach(), margin.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("y", [0.2, 0.5, 0.8])
def test_the_matched_loss_is_least_where_the_model_says_the_label(y: float) -> None:
    agreed = math.sqrt(2) * torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor([y], dtype=torch.float64))
    margin, one = agreed.clone().requires_grad_(), torch.ones(1, dtype=torch.float64)
    loss = matched_fidelity_loss(margin, one, y * one)
    loss.backward()
    torch.testing.assert_close(torch.cat([loss.detach(), margin.grad]), torch.zeros(2, dtype=torch.float64))
    for other in (agreed - 0.1, agreed + 0.1):
        assert matched_fidelity_loss(other, one, y * one) > 1e-4
