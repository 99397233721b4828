"""A family's transformer, with and without its weights."""

from typing import TypeVar

import torch
from diffusers import ModelMixin

Transformer = TypeVar("Transformer", bound=ModelMixin)


def load_frozen(cls: type[Transformer], path: str, dtype: torch.dtype, device: str) -> Transformer:
    """The transformer of the pipeline at `path`, frozen and in eval mode."""
    transformer = cls.from_pretrained(path, subfolder="transformer", dtype=dtype)
    return transformer.to(device).requires_grad_(False).eval()


def without_weights(cls: type[Transformer], path: str, dtype: torch.dtype) -> Transformer:
    """The same on torch's meta device: names and shapes."""
    config = cls.load_config(path, subfolder="transformer")
    with torch.device("meta"):
        return cls.from_config(config).to(dtype).eval()
