"""The trained transformer as objectives see it: velocities with a gradient, and the reference's without one."""

from collections.abc import Callable

import torch
from torch import nn

from dina_rl.alignment.engine import Engine
from dina_rl.backbones.lora import adapter_disabled, add_lora
from dina_rl.config import AlignRun
from dina_rl.flow.sampler import guided
from dina_rl.runtime import open_pipeline
from dina_rl.types import PromptEmbeds


class Policy:
    """The generator with its adapter, under a training engine."""

    def __init__(self, run: AlignRun, make_engine: Callable[[nn.Module], Engine]) -> None:
        self._backbone = open_pipeline(run.pipeline)
        self._module = self._backbone.load_transformer()
        lora = run.learner.lora
        add_lora(self._module, rank=lora.rank, alpha=lora.alpha, targets=self._backbone.lora_targets, seed=run.seed)
        if run.learner.gradient_checkpointing:
            self._module.enable_gradient_checkpointing()
        self.engine = make_engine(self._module)
        self.device = self._backbone.device

    def velocity(
        self,
        latents: torch.Tensor,
        sigma: torch.Tensor,
        prompt: PromptEmbeds,
        negative: PromptEmbeds | None,
        guidance_scale: float,
    ) -> torch.Tensor:
        """Velocity [B, C, H, W] of latents at sigma (a scalar): conditional, or guided where `negative` is given.

        Latents are on `device` already; the prompts (B rows and one) are brought there.
        """

        def forward(text: PromptEmbeds) -> torch.Tensor:
            sigmas = sigma.to(self.device).expand(len(latents))
            return self._backbone.velocity(self.engine.module, latents, sigmas, text.to(self.device))

        conditional = forward(prompt)
        if negative is None:
            return conditional
        return guided(conditional, forward(negative.repeat(len(latents))), guidance_scale)

    @torch.no_grad()
    def reference_velocity(
        self,
        latents: torch.Tensor,
        sigma: torch.Tensor,
        prompt: PromptEmbeds,
        negative: PromptEmbeds | None,
        guidance_scale: float,
    ) -> torch.Tensor:
        """`velocity` of the base: the same module with its adapter off, so that no second model is held."""
        with adapter_disabled(self._module):
            return self.velocity(latents, sigma, prompt, negative, guidance_scale)
