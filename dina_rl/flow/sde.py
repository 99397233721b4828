"""One denoising step, stochastic or not; sampling and replay share the law of the step.

Convention: sigma in [0, 1] falls from 1 to 0, x_sigma = (1 - sigma) x0 + sigma eps, velocity v = eps - x0,
dt = sigma_next - sigma < 0. Everything here is fp32.

Flow-SDE (Liu et al., Flow-GRPO, arXiv 2505.05470, Eq. 9) keeps the marginals of the flow and adds exploration:

    x_next = x + [v + s^2 / (2 sigma) (x + (1 - sigma) v)] dt + s sqrt(-dt) eps,     s = a sqrt(sigma / (1 - sigma))

with the noise level a. At sigma = 1 the coefficient s is singular; as in the authors' code sigma_1, the second entry of
the table, replaces sigma inside that square root's denominator. This is an approximation of the first step only.

Dance (DanceGRPO, arXiv 2505.07818) is the same equation with a constant s = a.

CPS (coefficients-preserving sampling, Flow-CPS) splits the state into predicted sample and noise and puts part of the
noise back afresh, so that x_next carries exactly the noise that sigma_next asks for:

    x_next = (1 - sigma_next) (x - sigma v) + sigma_next [cos(a pi / 2) (x + (1 - sigma) v) + sin(a pi / 2) eps]
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch

Dynamics = Literal["flow_sde", "dance", "cps", "ode"]

NEARLY_ONE = 1 - 1e-4
"""A table's first sigma counts as 1 above this: some shifts make it 0.9999999 in fp32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GaussianStep:
    """The law of x_next given x and v: N(latent_scale x + velocity_scale v, std^2)."""

    latent_scale: float
    velocity_scale: float
    std: float

    def mean(self, latents: torch.Tensor, velocity: torch.Tensor) -> torch.Tensor:
        return self.latent_scale * latents + self.velocity_scale * velocity


def step_law(dynamics: Dynamics, sigmas: torch.Tensor, step: int, noise_level: float) -> GaussianStep:
    """The law of the stochastic step from `sigmas[step]` to `sigmas[step + 1]`.

    Raises:
        ValueError: the last step (sigma_next = 0) has no usable density; noise level 0 and the ODE have none at all.
    """
    if dynamics == "ode":
        raise ValueError("a step of the ODE is deterministic: it has no law")
    sigma, sigma_next = float(sigmas[step]), float(sigmas[step + 1])
    if sigma_next <= 0 or noise_level <= 0:
        raise ValueError(f"step {step} to sigma {sigma_next} at noise level {noise_level} has no log-probability")
    if dynamics == "cps":
        return _cps(sigma, sigma_next, noise_level)
    if dynamics == "dance":
        return _sde(sigma, sigma_next, noise_level)
    denominator = 1 - (float(sigmas[1]) if sigma > NEARLY_ONE else sigma)
    return _sde(sigma, sigma_next, noise_level * math.sqrt(sigma / denominator))


def _sde(sigma: float, sigma_next: float, diffusion: float) -> GaussianStep:
    """Euler-Maruyama step of the marginal-preserving SDE with diffusion coefficient s."""
    dt = sigma_next - sigma
    drift = diffusion**2 / (2 * sigma)
    return GaussianStep(
        latent_scale=1 + drift * dt,
        velocity_scale=(1 + drift * (1 - sigma)) * dt,
        std=diffusion * math.sqrt(-dt),
    )


def _cps(sigma: float, sigma_next: float, noise_level: float) -> GaussianStep:
    kept = sigma_next * math.cos(noise_level * math.pi / 2)
    return GaussianStep(
        latent_scale=1 - sigma_next + kept,
        velocity_scale=-(1 - sigma_next) * sigma + kept * (1 - sigma),
        std=sigma_next * math.sin(noise_level * math.pi / 2),
    )


def ode_step(latents: torch.Tensor, velocity: torch.Tensor, sigmas: torch.Tensor, step: int) -> torch.Tensor:
    """Euler step of the probability-flow ODE, as diffusers' FlowMatchEulerDiscreteScheduler takes it."""
    return latents + (sigmas[step + 1] - sigmas[step]) * velocity


def log_prob(next_latents: torch.Tensor, mean: torch.Tensor, std: float) -> torch.Tensor:
    """Gaussian log-density of `next_latents` [B, C, H, W], averaged over latent dimensions: [B].

    The mean, not the sum: with 10^4 to 10^5 dimensions the ratio of summed densities over- and underflows. So
    exp of a difference is the geometric mean of the per-dimension ratios (an approximation of the importance ratio that
    all Flow-GRPO systems make), and clip ranges are per dimension.
    """
    density = -((next_latents - mean) ** 2) / (2 * std**2) - math.log(std) - 0.5 * math.log(2 * math.pi)
    return density.flatten(1).mean(1)


def gaussian_kl(mean: torch.Tensor, reference_mean: torch.Tensor, std: float) -> torch.Tensor:
    """KL of two Gaussians of equal std, averaged over latent dimensions: [B].

    This is the exact KL of the step's two laws; `released_kl_factor` makes Flow-GRPO's of it.
    """
    return ((mean - reference_mean) ** 2).flatten(1).mean(1) / (2 * std**2)


def released_kl_factor(dynamics: Dynamics, minus_dt: float) -> float:
    """What Flow-GRPO's released KL of a step is of the exact one: it divides by s^2 where the law has s^2 (-dt).

    A step of CPS has no such factor in its law, and the two are one number.
    """
    return 1.0 if dynamics == "cps" else minus_dt
