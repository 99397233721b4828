"""The forward process x_sigma = (1 - sigma) x0 + sigma eps, and its velocity eps - x0. Everything here is fp32."""

import torch


def add_noise(latents: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """x_t = (1 - t) x_0 + t eps (Eq. 6), fp32; t [B], the rest [B, C, H, W]."""
    t = t.view(-1, 1, 1, 1)
    return (1 - t) * latents + t * noise


def predict_clean(latents: torch.Tensor, velocity: torch.Tensor, sigma: torch.Tensor | float) -> torch.Tensor:
    """x0 = x_sigma - sigma v: one step from anywhere to the end, since v = eps - x0."""
    return latents - sigma * velocity


def flow_matching_loss(velocity: torch.Tensor, latents: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Mean squared distance of the velocity from eps - x0 [B, C, H, W]: [B]. The loss the base was pretrained with."""
    return ((velocity - (noise - latents)) ** 2).flatten(1).mean(1)


def velocity_kl(velocity: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """KL of unit-variance Gaussians around two velocities [B, C, H, W], averaged over dimensions: [B].

    For algorithms without a stochastic step whose law could be compared: flow matching's own likelihood of a velocity.
    """
    return ((velocity - reference) ** 2).flatten(1).mean(1) / 2
