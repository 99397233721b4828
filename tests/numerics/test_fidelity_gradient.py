"""The fidelity loss's autograd gradient against central finite differences in float64 (Eq. 9 through Eq. 7 and 8)."""

import pytest
import torch

from dina_rl.config import ThurstoneConfig
from dina_rl.reward.thurstone import comparison_variance, fidelity_loss

STEP = 1e-6


@pytest.mark.parametrize("variance", ["noise_calibrated", "fixed"])
@pytest.mark.parametrize("label", [0.0, 0.3, 1.0])
def test_gradient_equals_finite_difference(variance: str, label: float) -> None:
    margin = torch.linspace(-2.0, 2.0, 41, dtype=torch.float64)
    config = ThurstoneConfig(variance=variance, sigma_u=0.5)

    for t in (0.0, 0.4, 1.0):

        def loss(values: torch.Tensor, level: float = t) -> torch.Tensor:
            spread = comparison_variance(torch.full_like(values, level), config)
            return fidelity_loss(values, spread, torch.full_like(values, label))

        leaf = margin.clone().requires_grad_()
        loss(leaf).sum().backward()
        numeric = (loss(margin + STEP) - loss(margin - STEP)) / (2 * STEP)
        torch.testing.assert_close(leaf.grad, numeric, rtol=1e-6, atol=1e-9)


def test_single_precision_gradient_equals_double() -> None:
    margin = torch.linspace(-1.0, 1.0, 41)
    grads = []
    for dtype in (torch.float32, torch.float64):
        leaf = margin.to(dtype).clone().requires_grad_()
        spread = torch.full_like(leaf.detach(), 0.01)
        fidelity_loss(leaf, spread, torch.ones_like(spread)).sum().backward()
        grads.append(leaf.grad.double())
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)
