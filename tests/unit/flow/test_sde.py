"""Flow-SDE against its closed form, and sampling against replay."""

import math

import numpy as np
import pytest
import torch

from dina_rl.flow.sampler import GuidedVelocity, denoise, replay_step
from dina_rl.flow.sde import gaussian_kl, log_prob, ode_step, step_law

SIGMAS = torch.tensor([1.0, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089, 0.0])
PUBLISHED_STD = {  # calculated from the published formulas
    "flow_sde": (0.7, [0.700, 0.743, 0.536, 0.446, 0.392, 0.353, 0.319, 0.282, 0.225]),
    "cps": (0.8, [0.913, 0.869, 0.816, 0.752, 0.673, 0.573, 0.442, 0.264, 0.0085]),
}


@pytest.mark.parametrize("dynamics", PUBLISHED_STD)
def test_step_std_of_the_ten_step_shift_3_schedule(dynamics):
    noise_level, expected = PUBLISHED_STD[dynamics]
    stds = [step_law(dynamics, SIGMAS, step, noise_level).std for step in range(9)]
    assert stds == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("step", [0, 4, 8])
def test_cps_leaves_the_noise_that_the_next_sigma_asks_for(step):
    """From the true x0 and eps: the signal's coefficient is 1 - sigma_next, the noise's variance sigma_next^2."""
    sigma, sigma_next = SIGMAS[step].item(), SIGMAS[step + 1].item()
    law = step_law("cps", SIGMAS, step, 0.8)
    signal = law.latent_scale * (1 - sigma) - law.velocity_scale  # coefficient of x0 in the mean, v = eps - x0
    noise = law.latent_scale * sigma + law.velocity_scale
    assert signal == pytest.approx(1 - sigma_next, abs=1e-6)
    assert noise**2 + law.std**2 == pytest.approx(sigma_next**2, abs=1e-6)


def test_dance_is_the_score_form_with_constant_diffusion():
    """DanceGRPO writes the drift with the score -(x - (1 - sigma) x0_hat) / sigma^2, x0_hat = x - sigma v."""
    sigma, sigma_next, eta, x, v = 0.8577, 0.7904, 0.3, 1.1, -0.4
    dt = sigma_next - sigma
    score = -(x - (1 - sigma) * (x - sigma * v)) / sigma**2
    mean = x + v * dt - 0.5 * eta**2 * score * dt
    law = step_law("dance", SIGMAS, 3, eta)
    assert law.mean(torch.tensor(x), torch.tensor(v)).item() == pytest.approx(mean, abs=1e-6)
    assert law.std == pytest.approx(eta * math.sqrt(-dt), abs=1e-6)


def test_step_has_the_closed_form_mean_and_std_in_one_dimension():
    """x0 ~ N(m, q^2): the velocity is known in closed form, and so is the law of one step, in float64 numpy."""
    m, q, sigma, sigma_next, a = 0.3, 0.6, 0.8577, 0.7904, 0.7
    x = np.float64(1.1)
    var = (1 - sigma) ** 2 * q**2 + sigma**2
    residual = x - (1 - sigma) * m
    velocity = sigma / var * residual - (m + (1 - sigma) * q**2 / var * residual)  # E[eps | x] - E[x0 | x]
    s = a * np.sqrt(sigma / (1 - sigma))
    dt = sigma_next - sigma
    mean = x + (velocity + s**2 / (2 * sigma) * (x + (1 - sigma) * velocity)) * dt
    law = step_law("flow_sde", SIGMAS, 3, a)
    ours = law.mean(torch.tensor([[x]]), torch.tensor([[velocity]]))
    assert ours.item() == pytest.approx(mean, abs=1e-6)
    assert law.std == pytest.approx(s * np.sqrt(-dt), abs=1e-6)


@pytest.mark.parametrize(("dynamics", "noise_level"), [("flow_sde", 0.7), ("dance", 0.5)])
def test_sde_and_ode_keep_the_same_marginals(dynamics, noise_level):
    """On a Gaussian with known velocity, many SDE samples have the ODE's mean and variance within sampling error."""
    m, q, count, steps = 0.5, 0.4, 20_000, 200
    line = torch.linspace(1, 0, steps + 1)
    sigmas = 3 * line / (1 + 2 * line)

    def velocity(x, sigma):
        s = sigma.view(-1, 1, 1, 1)
        var = (1 - s) ** 2 * q**2 + s**2
        residual = x - (1 - s) * m
        return (s - (1 - s) * q**2) / var * residual - m

    generator = torch.Generator().manual_seed(0)
    start = torch.randn(count, 1, 1, 1, generator=generator)
    noise = torch.randn(steps - 1, count, 1, 1, 1, generator=generator)
    ode = denoise(start, sigmas, GuidedVelocity(velocity)).latents
    sde = denoise(
        start, sigmas, GuidedVelocity(velocity), dynamics=dynamics, noise_level=noise_level, window_noise=noise
    ).latents
    error = q / math.sqrt(count)
    assert ode.mean().item() == pytest.approx(m, abs=4 * error)
    assert sde.mean().item() == pytest.approx(m, abs=4 * error + 0.005)
    assert ode.std().item() == pytest.approx(q, rel=0.02)
    assert sde.std().item() == pytest.approx(q, rel=0.03)
    assert not torch.allclose(ode, sde, atol=0.05)


def test_sampled_log_prob_is_replayed_bit_for_bit():
    generator = torch.Generator().manual_seed(1)
    start, noise = torch.randn(3, 4, 2, 2, generator=generator), torch.randn(3, 3, 4, 2, 2, generator=generator)

    def velocity(x, sigma):
        return torch.sin(x) * sigma.view(-1, 1, 1, 1)

    run = denoise(start, SIGMAS, GuidedVelocity(velocity), window_start=1, noise_level=0.7, window_noise=noise)
    assert run.states.shape == (4, 3, 4, 2, 2)
    for k in range(3):
        law = step_law("flow_sde", SIGMAS, 1 + k, 0.7)
        again, _ = replay_step(law, run.states[k], run.states[k + 1], velocity(run.states[k], SIGMAS[1 + k].expand(3)))
        assert torch.equal(again, run.log_probs[k])


def test_a_table_that_starts_just_below_one_starts_at_one():
    nearly = torch.cat([torch.tensor([1 - 1.2e-7]), SIGMAS[1:]])
    assert step_law("flow_sde", nearly, 0, 0.7).std == pytest.approx(PUBLISHED_STD["flow_sde"][1][0], abs=2e-3)


def test_guided_sampling_scores_the_conditional_policy():
    start, noise = torch.zeros(2, 1, 1, 1), torch.zeros(1, 2, 1, 1, 1)
    run = denoise(
        start,
        SIGMAS,
        GuidedVelocity(lambda x, s: torch.ones_like(x), lambda x, s: torch.zeros_like(x), 3.0),
        noise_level=0.7,
        window_noise=noise,
    )
    law = step_law("flow_sde", SIGMAS, 0, 0.7)
    assert run.states[1].flatten()[0].item() == pytest.approx(3 * law.velocity_scale)
    expected = -((2 * law.velocity_scale) ** 2) / (2 * law.std**2) - math.log(law.std * math.sqrt(2 * math.pi))
    assert run.log_probs[0, 0].item() == pytest.approx(expected, rel=1e-5)


def test_log_prob_is_the_mean_of_scipy_like_densities():
    generator = torch.Generator().manual_seed(2)
    x, mean = torch.randn(5, 3, 2, 2, generator=generator), torch.randn(5, 3, 2, 2, generator=generator)
    values, centre = x.double().numpy(), mean.double().numpy()
    density = np.log(np.exp(-((values - centre) ** 2) / (2 * 0.3**2)) / (0.3 * np.sqrt(2 * np.pi)))
    assert np.allclose(log_prob(x, mean, 0.3).numpy(), density.reshape(5, -1).mean(1), rtol=1e-5)


def test_kl_is_the_gaussian_one_and_zero_for_equal_means():
    a, b = torch.full((1, 2, 1, 1), 0.5), torch.full((1, 2, 1, 1), 0.2)
    p, q = torch.distributions.Normal(0.5, 0.3), torch.distributions.Normal(0.2, 0.3)
    assert gaussian_kl(a, b, 0.3).item() == pytest.approx(torch.distributions.kl_divergence(p, q).item(), rel=1e-5)
    assert gaussian_kl(a, a, 0.3).item() == 0


@pytest.mark.parametrize(("step", "noise_level"), [(9, 0.7), (0, 0.0)])
def test_steps_without_a_density_are_refused(step, noise_level):
    with pytest.raises(ValueError, match="no log-probability"):
        step_law("flow_sde", SIGMAS, step, noise_level)


def test_ode_step_goes_straight_to_x0_with_the_true_velocity():
    x0, eps = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(3)), torch.ones(2, 1, 2, 2)
    sigmas = torch.tensor([0.6, 0.0])
    assert torch.allclose(ode_step(0.4 * x0 + 0.6 * eps, eps - x0, sigmas, 0), x0, atol=1e-6)
