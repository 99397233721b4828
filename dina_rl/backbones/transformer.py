"""A family's transformer, with and without its weights."""

from typing import Protocol, TypeVar

import torch
from torch import nn

from dina_rl.backbones.files import check_files
from dina_rl.backbones.source import Source, StockReading
from dina_rl.loading import TRANSFORMER, loading

Transformer = TypeVar("Transformer", bound=nn.Module)
Transformer_co = TypeVar("Transformer_co", bound=nn.Module, covariant=True)


class StockClass(Protocol[Transformer_co]):
    """What we call of a diffusers model class. Diffusers declares these methods on mixins, and less exactly."""

    def from_pretrained(
        self, path: str, *, subfolder: str, revision: str | None, variant: str | None, dtype: torch.dtype
    ) -> Transformer_co: ...

    def load_config(self, path: str, *, subfolder: str, revision: str | None) -> dict[str, object]: ...

    def from_config(self, config: dict[str, object]) -> Transformer_co: ...


def load_frozen(cls: StockClass[Transformer], source: Source, dtype: torch.dtype, device: str) -> Transformer:
    """The transformer of the pipeline at `source`, frozen and in eval mode.

    Raises:
        ValueError: its files are missing or not whole.
    """
    check_files(source, "transformer")
    with loading(TRANSFORMER, source.path, source.variant), StockReading(source):
        transformer = cls.from_pretrained(source.path, **source.weights("transformer"), dtype=dtype).to(device)
    return transformer.requires_grad_(False).eval()


def without_weights(cls: StockClass[Transformer], source: Source, dtype: torch.dtype) -> Transformer:
    """The same on torch's meta device: names and shapes."""
    with StockReading(source), torch.device("meta"):
        config = cls.load_config(source.path, **source.config("transformer"))
        return cls.from_config(config).to(dtype).eval()
