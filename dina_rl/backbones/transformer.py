"""A family's transformer, with and without its weights."""

from typing import Protocol, TypeVar

import torch
from torch import nn

from dina_rl.loading import TRANSFORMER, loading

Transformer = TypeVar("Transformer", bound=nn.Module)
Transformer_co = TypeVar("Transformer_co", bound=nn.Module, covariant=True)


class StockClass(Protocol[Transformer_co]):
    """What we call of a diffusers model class. Diffusers declares these methods on mixins, and less exactly."""

    def from_pretrained(self, path: str, *, subfolder: str, dtype: torch.dtype) -> Transformer_co: ...

    def load_config(self, path: str, *, subfolder: str) -> dict[str, object]: ...

    def from_config(self, config: dict[str, object]) -> Transformer_co: ...


def load_frozen(cls: StockClass[Transformer], path: str, dtype: torch.dtype, device: str) -> Transformer:
    """The transformer of the pipeline at `path`, frozen and in eval mode."""
    with loading(TRANSFORMER, path):
        transformer = cls.from_pretrained(path, subfolder="transformer", dtype=dtype).to(device)
    return transformer.requires_grad_(False).eval()


def without_weights(cls: StockClass[Transformer], path: str, dtype: torch.dtype) -> Transformer:
    """The same on torch's meta device: names and shapes."""
    config = cls.load_config(path, subfolder="transformer")
    with torch.device("meta"):
        return cls.from_config(config).to(dtype).eval()
