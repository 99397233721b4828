"""Prompts to embeddings, each distinct prompt once."""

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch

from dina_rl.types import PromptEmbeds

# What a prompt costs in bfloat16: SD3.5 2.7 MB (333 tokens), FLUX 4.2 MB (512), Z-Image 2.6 MB (512), so 11 to 17 GB
# when full; the tiny world 4 KB.
CACHED_PROMPTS = 4096


class CachedTextEncoder:
    """A family's `encode` of one prompt (one row), behind a cache of the most recently used prompts on the CPU.

    Prompts are encoded one at a time: an embedding must not depend on which prompts happened to share its batch.
    """

    def __init__(self, encode: Callable[[str], PromptEmbeds], device: str, *, cached: int) -> None:
        self._encode = encode
        self._device = device
        self._cached = cached  # at least 1
        self._cache: OrderedDict[str, PromptEmbeds] = OrderedDict()

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> PromptEmbeds:
        return PromptEmbeds.cat([self._one(prompt) for prompt in prompts]).to(self._device)

    def _one(self, prompt: str) -> PromptEmbeds:
        if prompt not in self._cache:
            self._cache[prompt] = self._encode(prompt).to("cpu")  # GPU memory is dear
            if len(self._cache) > self._cached:
                self._cache.popitem(last=False)
        self._cache.move_to_end(prompt)
        return self._cache[prompt]
