"""The denoising loop: SDE steps inside a window, ODE steps elsewhere; and the replay of a stored SDE step."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from dina_rl.flow.sde import Dynamics, GaussianStep, log_prob, ode_step, step_law

Velocity = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (latents [B, C, H, W], sigma [B]) -> velocity, fp32


class Velocities(NamedTuple):
    """Velocities [B, C, H, W] at one state; the same tensor twice where there is no guidance."""

    conditional: torch.Tensor
    followed: torch.Tensor


@dataclass(frozen=True, slots=True)
class GuidedVelocity:
    """A velocity under classifier-free guidance: v_uncond + scale (v_cond - v_uncond).

    Conditional and unconditional velocities are two forwards of the batch rather than one of the doubled batch, so that
    the conditional one has the very geometry of a learner's forward and need not be repeated for the log-probability.
    Sampling and replay both call this, so that they compute guidance alike, to the last bit.
    """

    conditional: Velocity
    unconditional: Velocity | None = None  # None: no guidance, `scale` is not read
    scale: float = 1.0

    def __call__(self, latents: torch.Tensor, sigma: torch.Tensor) -> Velocities:
        conditional = self.conditional(latents, sigma)
        if self.unconditional is None:
            return Velocities(conditional, conditional)
        unconditional = self.unconditional(latents, sigma)
        return Velocities(conditional, unconditional + self.scale * (conditional - unconditional))

    def followed(self, latents: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """The velocity [B, C, H, W] that a sampler follows."""
        return self(latents, sigma).followed


@dataclass(frozen=True, slots=True, kw_only=True)
class Denoised:
    """Outcome of `denoise`. W is the window's length, 0 for a plain ODE."""

    states: torch.Tensor  # [W + 1, B, C, H, W]: latents before each window step and after the last one
    log_probs: torch.Tensor  # [W, B]
    latents: torch.Tensor  # [B, C, H, W]: the finished samples, or the state at which they were to stop


@torch.no_grad()
def denoise(
    latents: torch.Tensor,
    sigmas: torch.Tensor,
    velocity: GuidedVelocity,
    *,
    window_start: int = 0,
    dynamics: Dynamics = "flow_sde",
    noise_level: float = 0.0,
    window_noise: torch.Tensor | None = None,
    guided_density: bool = False,
    stop: int | None = None,
) -> Denoised:
    """Denoise `latents` [B, C, H, W] at sigma 1 along `sigmas` [N + 1], all the N steps or the first `stop`.

    Steps `window_start` to `window_start + W - 1` are stochastic steps of `dynamics` driven by `window_noise`
    [W, B, C, H, W]; the others are ODE steps. Log-probabilities are those of the velocity that is followed if
    `guided_density`. Otherwise they are those of the *conditional* velocity's step: the trained policy is the unguided
    one, seen on guided trajectories, an approximation (the samples do not come from the trained policy's own law) that
    keeps the training forward single. The first ratio is exactly 1 either way.
    """
    if window_noise is None:
        window_noise = latents.new_empty(0, *latents.shape)
    window = len(window_noise)
    states, log_probs = list[torch.Tensor](), []
    for step in range(len(sigmas) - 1 if stop is None else stop):
        conditional, followed = velocity(latents, sigmas[step].expand(len(latents)))
        if window_start <= step < window_start + window:
            law = step_law(dynamics, sigmas, step, noise_level)
            states = states or [latents]
            latents = law.mean(latents, followed) + law.std * window_noise[step - window_start]
            density = followed if guided_density else conditional
            log_probs.append(replay_step(law, states[-1], latents, density)[0])
            states.append(latents)
        else:
            latents = ode_step(latents, followed, sigmas, step)
    return Denoised(
        states=torch.stack(states) if window else latents.new_empty(0),
        log_probs=torch.stack(log_probs) if window else latents.new_empty(0),
        latents=latents,
    )


@torch.no_grad()
def denoise_until(latents: torch.Tensor, sigmas: torch.Tensor, velocity: GuidedVelocity, *, stop: int) -> torch.Tensor:
    """The latents [B, C, H, W] before step `stop` of the ODE, from `latents` at sigma 1 along `sigmas` [N + 1]."""
    for step in range(stop):
        latents = ode_step(latents, velocity.followed(latents, sigmas[step].expand(len(latents))), sigmas, step)
    return latents


def replay_step(
    law: GaussianStep, latents: torch.Tensor, next_latents: torch.Tensor, velocity: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-probability [B], mean [B, C, H, W]) of the step from `latents` to `next_latents` under `velocity`."""
    mean = law.mean(latents, velocity)
    return log_prob(next_latents, mean, law.std), mean
