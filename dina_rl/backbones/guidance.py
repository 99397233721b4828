"""A backbone's velocity under classifier-free guidance, as sampling and training both ask for it."""

import torch
from torch import nn

from dina_rl.backbones.base import Backbone
from dina_rl.flow.sampler import GuidedVelocity, Velocity
from dina_rl.types import PromptEmbeds


def guided_velocity(
    backbone: Backbone, transformer: nn.Module, prompt: PromptEmbeds, negative: PromptEmbeds | None, scale: float
) -> GuidedVelocity:
    """The velocity of `transformer` for the samples of `prompt`, guided away from `negative`, one row, if it is given.

    Args:
        prompt: one row per sample.
        negative: None for no guidance; then `scale` is not read.
    """

    def velocity_for(text: PromptEmbeds) -> Velocity:
        def velocity(latents: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            return backbone.velocity(transformer, latents, sigma, text)

        return velocity

    if negative is None:
        return GuidedVelocity(velocity_for(prompt))
    return GuidedVelocity(velocity_for(prompt), velocity_for(negative.repeat(len(prompt))), scale)
