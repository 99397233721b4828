"""Pipeline class name -> backbone. Adding a family is one file beside `sd3.py`, its import and one line here."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch

from dina_rl.backbones.base import Backbone
from dina_rl.textfiles import read_text


class Family(Protocol):
    """What opens a pipeline directory or hub id: the class of a backbone."""

    def __call__(self, path: str | Path, *, dtype: torch.dtype, device: str, max_sequence_length: int) -> Backbone: ...


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


def pipeline_class(path: str | Path) -> str:
    """The pipeline class that `model_index.json` of a local directory or hub id names; raises as `pipeline_index`."""
    name = pipeline_index(path)["_class_name"]
    assert isinstance(name, str)
    return name


def pipeline_index(path: str | Path) -> dict[str, object]:
    """What `model_index.json` of a local directory or hub id says: class of the pipeline and of its components.

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
    values: dict[str, object] = json.loads(read_text(index))
    return values


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
    family = BACKBONES[name]()
    return family(path, dtype=dtype, device=device, max_sequence_length=max_sequence_length)
