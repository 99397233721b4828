"""Process-wide torch and library settings; called once at the start of every process of a run."""

import torch

from dina_rl.backbones.base import Backbone
from dina_rl.backbones.registry import open_backbone
from dina_rl.config import PipelineConfig


def configure_process(threads: int) -> None:
    """Fix what changes numbers or speed between processes: thread count and denormals.

    Denormals are flushed because optimizer moments and small activations fall into them, and CPUs compute them slowly.
    """
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)


def device() -> str:
    """`cuda` where there is one, else `cpu`. Ray shows each actor only its own GPUs."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def open_pipeline(config: PipelineConfig) -> Backbone:
    """The backbone of the configured pipeline on this process's device. Quiets diffusers and transformers."""
    _quiet_libraries()
    return open_backbone(
        config.location,
        revision=config.revision,
        variant=config.variant,
        dtype=getattr(torch, config.dtype),
        device=device(),
        max_sequence_length=config.max_sequence_length,
        distilled_guidance=config.distilled_guidance,
        decode_batch=config.decode_batch,
        vae_tiling=config.vae_tiling,
    )


def image_size(config: PipelineConfig, backbone: Backbone) -> tuple[int, int]:
    """Height and width in pixels: as configured, or else the pipeline's own."""
    height, width = backbone.image_size
    return config.height or height, config.width or width


def sized(config: PipelineConfig, backbone: Backbone) -> PipelineConfig:
    """`config` with all sizes given: what it leaves to the pipeline, which `backbone` is, is filled in."""
    height, width = image_size(config, backbone)
    sizes = {"height": height, "width": width, "max_sequence_length": backbone.max_sequence_length}
    return config.model_copy(update=sizes)


def _quiet_libraries() -> None:
    """No loading bars and no notes on optional packages between a run's own lines; errors still show."""
    import diffusers
    import transformers

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
