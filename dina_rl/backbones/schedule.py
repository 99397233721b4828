"""The sigma table of the pipelines that set their own sigmas: FLUX and Z-Image."""

import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.schedulers import FlowMatchEulerDiscreteScheduler


def shifted_sigmas(path: str, num_steps: int, image_tokens: int) -> torch.Tensor:
    """Sigmas [num_steps + 1] from 1 down to 0, evenly spaced and then shifted as the pipeline's scheduler says.

    A static shift (Z-Image: 3) is the same at every size; a dynamic one (FLUX) grows linearly with the image's tokens.
    """
    # A scheduler of its own for every table: set_timesteps mutates the object, and the shift is applied once.
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(path, subfolder="scheduler")
    config = scheduler.config
    shift = calculate_shift(
        image_tokens, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
    )
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / num_steps, num_steps).tolist(), mu=shift)
    sigmas: torch.Tensor = scheduler.sigmas
    return sigmas.float()
