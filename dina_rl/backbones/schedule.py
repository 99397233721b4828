"""The sigma table of a pipeline's scheduler."""

from collections.abc import Sequence

import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.schedulers import FlowMatchEulerDiscreteScheduler

from dina_rl.backbones.files import check_files
from dina_rl.backbones.source import Source, StockReading, index_file, read_json

FOLLOWED = FlowMatchEulerDiscreteScheduler.__name__
UNFOLLOWED = ("stochastic_sampling", "invert_sigmas")
"""Options that change more than the table: the step itself, and the direction of time."""


def scheduled_sigmas(source: Source, num_steps: int, image_tokens: int) -> torch.Tensor:
    """The scheduler's own sigmas [num_steps + 1], from 1 down to 0, as SD3 takes them."""
    with StockReading(source):
        return _sigmas(source, image_tokens, num_inference_steps=num_steps)


def shifted_sigmas(source: Source, num_steps: int, image_tokens: int) -> torch.Tensor:
    """Sigmas [num_steps + 1] from 1 down to 0, evenly spaced and then shifted by the scheduler: FLUX and Z-Image."""
    with StockReading(source):
        return _sigmas(source, image_tokens, sigmas=torch.linspace(1, 1 / num_steps, num_steps).tolist())


def _sigmas(
    source: Source, image_tokens: int, *, num_inference_steps: int | None = None, sigmas: Sequence[float] | None = None
) -> torch.Tensor:
    """A static shift (SD3, Z-Image: 3) is the same at every size; a dynamic one (FLUX) grows with the image's tokens.

    Karras and other spacings that the scheduler computes are in its table too, and followed like any other.

    Raises:
        ValueError: a scheduler whose steps are not Euler's along its table.
    """
    _check_followed(source)
    # A scheduler of its own for every table: set_timesteps mutates the object, and the shift is applied once.
    try:
        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(source.path, **source.config("scheduler"))
    except (ValueError, ImportError) as error:  # spacings that exclude each other, or need scipy
        raise ValueError(f"the scheduler of {source.path} cannot be opened: {error}") from error
    config = scheduler.config
    shift = None
    if config.use_dynamic_shifting:
        sizes = config.base_image_seq_len, config.max_image_seq_len
        shift = calculate_shift(image_tokens, *sizes, config.base_shift, config.max_shift)
    scheduler.set_timesteps(num_inference_steps, sigmas=sigmas, mu=shift)
    table: torch.Tensor = scheduler.sigmas
    return table.float()


def _check_followed(source: Source) -> None:
    check_files(source, "scheduler")
    index = read_json(index_file(source))
    config = FlowMatchEulerDiscreteScheduler.load_config(source.path, **source.config("scheduler"))
    for name in ((index.get("scheduler") or (None, FOLLOWED))[1], config.get("_class_name", FOLLOWED)):
        if name != FOLLOWED:
            raise ValueError(
                f"the scheduler of {source.path} is a {name}; only {FOLLOWED} is followed: name that one, with the "
                "model's shift, in model_index.json and scheduler/scheduler_config.json of a copy"
            )
    for option in UNFOLLOWED:
        if config.get(option):
            raise ValueError(
                f"the scheduler of {source.path} sets {option}, which is not followed; switch it off in "
                "scheduler/scheduler_config.json of a copy"
            )
