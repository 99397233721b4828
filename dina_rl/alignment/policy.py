"""The trained transformer as objectives see it: velocities with a gradient, and the reference's without one."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from dina_rl.alignment.engine import Engine
from dina_rl.backbones.adapter_files import initial_state
from dina_rl.backbones.compiling import compile_blocks
from dina_rl.backbones.guidance import guided_velocity
from dina_rl.backbones.lora import adapter_disabled
from dina_rl.backbones.trained import load_trained_state, make_trainable
from dina_rl.config import AlignRun
from dina_rl.runtime import open_pipeline
from dina_rl.types import PromptEmbeds


@dataclass(frozen=True, slots=True, kw_only=True)
class VelocityInputs:
    """What a velocity depends on beside the weights."""

    latents: torch.Tensor  # [B, C, H, W]
    sigma: torch.Tensor  # a scalar, shared, or [B]
    prompt: PromptEmbeds  # B rows
    negative: PromptEmbeds | None  # one row; given where the velocity is the guided one
    guidance_scale: float


class Policy:
    """The generator under a training engine, with an adapter or trained whole.

    Trained whole, its weights are fp32 masters; below `pipeline.dtype` float32 its forwards run under autocast.
    """

    def __init__(self, run: AlignRun, make_engine: Callable[[nn.Module], Engine]) -> None:
        self._backbone = open_pipeline(run.pipeline)
        self._module = self._backbone.load_transformer()
        whole = run.learner.lora is None
        # Without an adapter to switch off, the reference is a model of its own; who wants no KL need not hold it.
        self._reference = self._backbone.load_transformer() if whole and run.kl_weight else None
        if whole:
            self._module.float()
        make_trainable(self._module, run.learner.lora, targets=self._backbone.lora_targets, seed=run.seed)
        lora = run.learner.lora
        if lora is not None and lora.init is not None:  # the samplers get it with the first weights published
            load_trained_state(self._module, initial_state(self._module, lora, self._backbone.convert_adapter))
        self._mixed = whole and run.pipeline.dtype != "float32"
        if run.learner.gradient_checkpointing:
            self._module.enable_gradient_checkpointing()
        self._compiled = run.pipeline.compile
        if self._compiled:
            for each in (self._module, self._reference):
                if each is not None:
                    compile_blocks(each)
        self.engine = make_engine(self._module)
        self.device = self._backbone.device

    def velocity(self, inputs: VelocityInputs) -> torch.Tensor:
        """Velocity [B, C, H, W], conditional or guided, with a gradient; inputs are brought to `device`."""
        with torch.autocast(torch.device(self.device).type, self._backbone.dtype, enabled=self._mixed):
            return self._velocity(self.engine.module, inputs)

    def fixed_velocity(self, inputs: VelocityInputs) -> torch.Tensor:
        """`velocity` to the last digit, without a gradient.

        Compiled blocks are other graphs with a gradient than without, and round otherwise: there it is taken and cut.
        """
        with torch.set_grad_enabled(self._compiled):
            return self.velocity(inputs).detach()

    @torch.no_grad()
    def reference_velocity(self, inputs: VelocityInputs) -> torch.Tensor:
        """`velocity` of the base: the same module with its adapter off, or the copy that full fine-tuning keeps."""
        if self._reference is not None:
            return self._velocity(self._reference, inputs)
        with adapter_disabled(self._module):
            return self._velocity(self.engine.module, inputs)

    def _velocity(self, module: nn.Module, inputs: VelocityInputs) -> torch.Tensor:
        latents = inputs.latents.to(self.device)
        prompt = inputs.prompt.to(self.device)
        negative = None if inputs.negative is None else inputs.negative.to(self.device)
        velocity = guided_velocity(self._backbone, module, prompt, negative, inputs.guidance_scale)
        return velocity.followed(latents, inputs.sigma.to(self.device).expand(len(latents)))
