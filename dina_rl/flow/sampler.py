"""The denoising loop: SDE steps inside a window, ODE steps elsewhere; and the replay of a stored SDE step."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from dina_rl.flow.sde import Dynamics, GaussianStep, log_prob, ode_step, step_law

Velocity = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (latents [B, C, H, W], sigma [B]) -> velocity, fp32


@dataclass(frozen=True, slots=True, kw_only=True)
class Denoised:
    """Outcome of `denoise`. W is the window's length, 0 for a plain ODE."""

    states: torch.Tensor  # [W + 1, B, C, H, W]: latents before each window step and after the last one
    log_probs: torch.Tensor  # [W, B]
    latents: torch.Tensor  # [B, C, H, W]: the finished samples


@torch.no_grad()
def denoise(
    latents: torch.Tensor,
    sigmas: torch.Tensor,
    conditional: Velocity,
    unconditional: Velocity | None = None,
    *,
    guidance_scale: float = 1.0,
    window_start: int = 0,
    dynamics: Dynamics = "flow_sde",
    noise_level: float = 0.0,
    window_noise: torch.Tensor | None = None,
    guided_density: bool = False,
) -> Denoised:
    """Denoise `latents` [B, C, H, W] at sigma 1 along `sigmas` [N + 1].

    Steps `window_start` to `window_start + W - 1` are stochastic steps of `dynamics` driven by `window_noise`
    [W, B, C, H, W]; the others are ODE steps. With guidance (scale > 1, `unconditional` given) the sampler follows
    v_uncond + scale (v_cond - v_uncond). Log-probabilities are those of the velocity that is followed if
    `guided_density`. Otherwise they are those of the *conditional* velocity's step: the trained policy is the unguided
    one, seen on guided trajectories, an approximation (the samples do not come from the trained policy's own law) that
    keeps the training forward single. The first ratio is exactly 1 either way.

    Conditional and unconditional velocities are two forwards of the batch rather than one of the doubled batch, so that
    the conditional one has the very geometry of the learner's forward and need not be repeated for the log-probability.
    """
    window = 0 if window_noise is None else len(window_noise)
    states, log_probs = [], []
    for step in range(len(sigmas) - 1):
        sigma = sigmas[step].expand(len(latents))
        velocity = followed = conditional(latents, sigma)
        if unconditional is not None and guidance_scale != 1:
            followed = guided(velocity, unconditional(latents, sigma), guidance_scale)
        if window_noise is not None and window_start <= step < window_start + window:
            law = step_law(dynamics, sigmas, step, noise_level)
            states.append(latents)
            latents = law.mean(latents, followed) + law.std * window_noise[step - window_start]
            density = followed if guided_density else velocity
            log_probs.append(replay_step(law, states[-1], latents, density)[0])
        else:
            if step == window_start + window:
                states.append(latents)
            latents = ode_step(latents, followed, sigmas, step)
    return Denoised(
        states=torch.stack(states) if window else latents.new_empty(0),
        log_probs=torch.stack(log_probs) if window else latents.new_empty(0),
        latents=latents,
    )


@torch.no_grad()
def denoise_until(
    latents: torch.Tensor,
    sigmas: torch.Tensor,
    conditional: Velocity,
    unconditional: Velocity | None,
    *,
    guidance_scale: float,
    stop: int,
) -> torch.Tensor:
    """The latents [B, C, H, W] before step `stop` of the ODE, from `latents` at sigma 1 along `sigmas` [N + 1]."""
    for step in range(stop):
        sigma = sigmas[step].expand(len(latents))
        velocity = conditional(latents, sigma)
        if unconditional is not None and guidance_scale != 1:
            velocity = guided(velocity, unconditional(latents, sigma), guidance_scale)
        latents = ode_step(latents, velocity, sigmas, step)
    return latents


def predict_clean(latents: torch.Tensor, velocity: torch.Tensor, sigma: torch.Tensor | float) -> torch.Tensor:
    """x0 = x_sigma - sigma v: one step from anywhere to the end, since v = eps - x0."""
    return latents - sigma * velocity


def guided(conditional: torch.Tensor, unconditional: torch.Tensor, scale: float) -> torch.Tensor:
    """Classifier-free guidance of two velocities; sampling and replay must compute it alike, to the last bit."""
    return unconditional + scale * (conditional - unconditional)


def replay_step(
    law: GaussianStep, latents: torch.Tensor, next_latents: torch.Tensor, velocity: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-probability [B], mean [B, C, H, W]) of the step from `latents` to `next_latents` under `velocity`."""
    mean = law.mean(latents, velocity)
    return log_prob(next_latents, mean, law.std), mean
