"""What a piece of work puts through the networks, counted where it happens: whoever does it, however it is batched."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers.models import SD3Transformer2DModel
from diffusers.models.autoencoders.vae import Decoder
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from transformers import T5EncoderModel

from dina_rl.backbones.base import Features
from dina_rl.backbones.sd3 import TruncatedSD3

FREE, TRAINED = "passes without a gradient", "passes with a backward"
SCORED, DECODED, ENCODED = "passes of the reward model", "images decoded", "prompts encoded"
KINDS: dict[type[nn.Module], str] = {TruncatedSD3: SCORED, Decoder: DECODED, T5EncoderModel: ENCODED}


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Counts samples that pass SD3's networks inside the block, by kind. It slows down: not for what is timed."""
    counts: Counter[str] = Counter()

    def count(module: nn.Module, args: object, output: object) -> None:
        if isinstance(module, SD3Transformer2DModel):
            velocity = _first(output)
            counts[TRAINED if velocity.requires_grad else FREE] += len(velocity)
        elif type(module) in KINDS:
            counts[KINDS[type(module)]] += len(_first(output))

    hook = register_module_forward_hook(count)
    try:
        yield counts
    finally:
        hook.remove()


def _first(output: object) -> torch.Tensor:
    """A tensor of a forward's output, one row a sample."""
    if isinstance(output, torch.Tensor):
        return output
    first = output.time_embedding if isinstance(output, Features) else output[0]  # type: ignore[index]  # a tuple
    assert isinstance(first, torch.Tensor)
    return first
