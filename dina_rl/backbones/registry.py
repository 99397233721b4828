"""Pipeline class name -> backbone. Adding a family is one file beside `sd3.py`, its import and one line here."""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch

from dina_rl.backbones.base import Backbone
from dina_rl.backbones.source import Options, Source, StockReading, check_config, index_file, read_json


class Family(Protocol):
    """What opens a pipeline directory or hub id: the class of a backbone."""

    def __call__(self, source: Source, options: Options) -> Backbone: ...


def _flux() -> Family:
    from dina_rl.backbones.flux import Flux

    return Flux


def _sd3() -> Family:
    from dina_rl.backbones.sd3 import SD3

    return SD3


def _z_image() -> Family:
    from dina_rl.backbones.z_image import ZImage

    return ZImage


BACKBONES: dict[str, Callable[[], Family]] = {  # each imports its own pipeline only
    "FluxPipeline": _flux,
    "StableDiffusion3Pipeline": _sd3,
    "ZImagePipeline": _z_image,
}


CONFIGURED = ("transformer", "vae")
"""Parts whose configurations are read when a backbone of any family is opened."""


def pipeline_class(source: Source) -> str:
    """The pipeline class that `model_index.json` of a local directory or hub id names.

    Raises:
        ValueError: no such directory, or no `model_index.json` in it that names a class.
    """
    file = index_file(source)
    name = read_json(file).get("_class_name")
    if not isinstance(name, str):
        raise ValueError(f"{file} names no pipeline class; is it a diffusers pipeline?")
    return name


def open_backbone(
    path: str | Path,
    *,
    revision: str | None = None,
    variant: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    max_sequence_length: int | None = None,
    distilled_guidance: float | None = None,
    decode_batch: int | None = None,
    vae_tiling: bool = False,
) -> Backbone:
    """The backbone for the pipeline at `path` (local directory or hub id). Loads no weights yet.

    Args:
        revision: of a hub id.
        variant: of the weight files, where a part has them.
        dtype: parameter dtype of everything loaded through it.
        max_sequence_length: tokens per prompt (of T5, or of Z-Image's chat); the reward model and the policy must agree
            on it. None: as many as the stock pipeline reads.
        distilled_guidance: input of FLUX.1-dev as generator; None: the stock pipeline's default.
        decode_batch: latents that the VAE decodes at once; None: all.
        vae_tiling: large images pass the VAE in tiles, as the stock pipelines do it.

    Raises:
        ValueError: unknown path, a pipeline class without a backbone, configurations that cannot be read, or settings
            beyond what it can do.
    """
    source = Source(path=str(path), revision=revision, variant=variant)
    name = pipeline_class(source)
    if name not in BACKBONES:
        raise ValueError(f"pipeline {path} is a {name}; supported: {', '.join(sorted(BACKBONES))}")
    for part in CONFIGURED:
        check_config(source, part)
    options = Options(
        dtype=dtype,
        device=device,
        max_sequence_length=max_sequence_length,
        distilled_guidance=distilled_guidance,
        decode_batch=decode_batch,
        vae_tiling=vae_tiling,
    )
    with StockReading(source):
        return BACKBONES[name]()(source, options)
