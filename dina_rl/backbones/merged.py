"""The trained part of a transformer that only samples: what arrives of it, and where it is put.

An adapter may be merged into the weights, so that a forward passes no LoRA layers. Every merge starts from the weights
as they were loaded: whatever was merged before leaves no trace, whereas peft's unmerge subtracts from rounded weights,
which drift in bfloat16.
"""

from collections.abc import Mapping
from typing import Protocol

import torch
from diffusers.models import ModelMixin

from dina_rl.backbones.base import Backbone
from dina_rl.backbones.trained import copy_in, make_trainable, trained_parameters
from dina_rl.config import PolicyLoRAConfig


class SampledWeights(Protocol):
    """The weights of a policy that samples; they arrive in parts."""

    names: frozenset[str]  # of all that is due

    def take(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """A part of them."""
        ...

    def complete(self) -> None:
        """All have come: sample with them from now on."""
        ...


class SeparateWeights:
    """Weights in the parameters that are trained elsewhere: an adapter's own, or all of the transformer's."""

    def __init__(
        self, transformer: ModelMixin, lora: PolicyLoRAConfig | None, *, backbone: Backbone, seed: int
    ) -> None:
        make_trainable(transformer, lora, targets=backbone.lora_targets, seed=seed)
        transformer.requires_grad_(False)
        self._parameters = trained_parameters(transformer)
        self.names = frozenset(self._parameters)

    def take(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            copy_in(self._parameters[name], tensor)

    def complete(self) -> None: ...


class MergedAdapter:
    """An adapter in the weights of the layers that it adapts: W0 + (alpha / rank) B A, in fp32, then rounded once.

    W0 of these layers stays in host memory. The adapter is kept no longer than it takes to merge it.
    """

    def __init__(self, transformer: ModelMixin, lora: PolicyLoRAConfig, *, backbone: Backbone) -> None:
        pattern = backbone.empty_transformer()
        make_trainable(pattern, lora, targets=backbone.lora_targets, seed=0)
        self.names = frozenset(trained_parameters(pattern))
        layers = [name.removesuffix(".lora_A.weight") for name in self.names if name.endswith(".lora_A.weight")]
        self._weights = {layer: transformer.get_parameter(f"{layer}.weight") for layer in layers}
        self._bases = {layer: weight.detach().to("cpu", copy=True) for layer, weight in self._weights.items()}
        self._scale = lora.alpha / lora.rank
        self._adapter: dict[str, torch.Tensor] = {}

    def take(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._adapter.update(tensors)

    @torch.no_grad()
    def complete(self) -> None:
        for layer, weight in self._weights.items():
            down, up = (self._adapter[f"{layer}.lora_{side}.weight"].to(weight.device) for side in "AB")
            change = self._scale * (up.flatten(1) @ down.flatten(1)).view_as(weight)  # flat: a convolution's too
            weight.copy_(self._bases[layer].to(weight.device).float() + change)  # in place: compiled blocks stay valid
        self._adapter = {}
