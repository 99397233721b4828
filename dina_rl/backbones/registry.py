"""Pipeline class name -> backbone. Adding a family is one file beside `sd3.py` and one line here."""

import json
from importlib import import_module
from pathlib import Path

import torch

from dina_rl.backbones.base import Backbone

BACKBONES = {
    "FluxPipeline": "dina_rl.backbones.flux:Flux",
    "StableDiffusion3Pipeline": "dina_rl.backbones.sd3:SD3",
    "ZImagePipeline": "dina_rl.backbones.z_image:ZImage",
}


def pipeline_class(path: str | Path) -> str:
    """The pipeline class that `model_index.json` of a local directory or hub id names.

    Raises:
        ValueError: no such directory, or no `model_index.json` in it.
    """
    local = Path(path)
    if local.is_dir():
        index = local / "model_index.json"
        if not index.is_file():
            raise ValueError(f"pipeline directory {local} has no model_index.json; is it a diffusers pipeline?")
    elif local.is_absolute() or str(path).startswith("."):
        raise ValueError(f"pipeline directory {local} does not exist")
    else:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            index = Path(hf_hub_download(str(path), "model_index.json"))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
            raise ValueError(
                f"pipeline {path} is neither a local directory nor a hub id that can be read here: {error}"
            ) from error
    return json.loads(index.read_text())["_class_name"]


def open_backbone(
    path: str | Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu", max_sequence_length: int = 256
) -> Backbone:
    """The backbone for the pipeline at `path` (local directory or hub id). Loads no weights yet.

    Args:
        dtype: parameter dtype of everything loaded through it.
        max_sequence_length: tokens per prompt (of T5, or of Z-Image's chat); the reward model and the policy must agree
            on it.

    Raises:
        ValueError: unknown path, a pipeline class without a backbone, or a length beyond what it can read.
    """
    name = pipeline_class(path)
    if name not in BACKBONES:
        raise ValueError(f"pipeline {path} is a {name}; supported: {', '.join(sorted(BACKBONES))}")
    module, cls = BACKBONES[name].split(":")
    factory = vars(import_module(module))[cls]
    return factory(path, dtype=dtype, device=device, max_sequence_length=max_sequence_length)
