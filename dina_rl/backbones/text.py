"""Prompts to embeddings, each distinct prompt once; and which prompts are too long for that."""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from types import MappingProxyType
from typing import TypeVar

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from transformers import PreTrainedTokenizerBase
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from dina_rl.backbones.source import Options, Source, StockReading
from dina_rl.loading import TEXT, loading
from dina_rl.types import PromptEmbeds

# What a prompt costs in bfloat16: SD3.5 2.7 MB (333 tokens), FLUX 4.2 MB (512), Z-Image 2.6 MB (512), so 11 to 17 GB
# when full; the tiny world 4 KB.
CACHED_PROMPTS = 4096
TOGETHER = 8
"""Prompts that are encoded at once; another number is another rounding."""

Pipeline = TypeVar("Pipeline", bound=DiffusionPipeline)

CutPrompts = dict[str, list[str]]
"""Prompts that a text encoder does not read to their end, by its name and length."""


def own_text_length(pipeline: type[DiffusionPipeline], source: Source, tokenizer: str) -> int:
    """Text tokens that a stock pipeline reads of a prompt unless told otherwise, or fewer if its tokenizer does."""
    stock: int = signature(pipeline.__call__).parameters["max_sequence_length"].default
    config = get_tokenizer_config(source.path, subfolder=tokenizer, revision=source.revision)
    own: int = config.get("model_max_length", stock)
    return min(stock, own)


def load_text_pipeline(
    cls: type[Pipeline], source: Source, options: Options, left_out: Mapping[str, None] = MappingProxyType({})
) -> Pipeline:
    """Text encoders and tokenizers of a pipeline as its stock class loads them, but for parts that it is without."""
    with loading(TEXT, source.path, source.variant), StockReading(source):
        pipeline: Pipeline = cls.from_pretrained(
            source.path,
            transformer=None,
            vae=None,
            dtype=options.dtype,
            revision=source.revision,
            variant=source.variant,
            **left_out,
        )
        pipeline.to(options.device)
        _check_vocabularies(source, pipeline)
    return pipeline


def _check_vocabularies(source: Source, pipeline: DiffusionPipeline) -> None:
    """Raises ValueError where a tokenizer knows tokens that its text encoder has no embedding of, or CLIP's gives more
    of them than it has places for."""
    for name, encoder in pipeline.components.items():
        tokenizer = pipeline.components.get(name.replace("text_encoder", "tokenizer"))
        if not name.startswith("text_encoder") or encoder is None or tokenizer is None:
            continue
        last, rows = max(tokenizer.get_vocab().values(), default=-1), encoder.get_input_embeddings().num_embeddings
        if last >= rows:
            raise ValueError(
                f"pipeline {source.path}: its {name} embeds {rows} tokens, its tokenizer knows token {last}; one of "
                "them is another pipeline's"
            )
        places = encoder.config.max_position_embeddings if encoder.config.model_type == "clip_text_model" else None
        if places is not None and tokenizer.model_max_length > places:
            raise ValueError(
                f"pipeline {source.path}: its {name} has {places} places, its tokenizer's model_max_length is "
                f"{tokenizer.model_max_length}"
            )


def load_tokenizers(cls: type[Pipeline], source: Source, left_out: Mapping[str, None]) -> Pipeline:
    """The tokenizers of a pipeline; `left_out` names its text encoders too."""
    with StockReading(source):
        pipeline: Pipeline = cls.from_pretrained(
            source.path, transformer=None, vae=None, revision=source.revision, **left_out
        )
    return pipeline


class CachedTextEncoder:
    """A family's `encode` of several prompts (one row each), behind a cache of the most recently used ones on the CPU.

    An embedding must not depend on which prompts happened to share its batch. So `encode` always gets `TOGETHER` of
    them, the last one repeated where there are fewer: the rows of a product of matrices of one shape are computed
    alike, wherever they stand and whatever stands beside them. Products of other shapes round otherwise.
    """

    def __init__(self, encode: Callable[[Sequence[str]], PromptEmbeds], device: str, *, cached: int) -> None:
        self._encode = encode
        self._device = device
        self._cached = cached  # at least 1
        self._cache: OrderedDict[str, PromptEmbeds] = OrderedDict()

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> PromptEmbeds:
        distinct = dict.fromkeys(prompts)
        rows = {prompt: self._cache[prompt] for prompt in distinct if prompt in self._cache}
        new = [prompt for prompt in distinct if prompt not in rows]
        for first in range(0, len(new), TOGETHER):
            rows.update(self._encoded(new[first : first + TOGETHER]))
        for prompt in distinct:
            self._cache[prompt] = rows[prompt]
            self._cache.move_to_end(prompt)
        while len(self._cache) > self._cached:
            self._cache.popitem(last=False)
        return PromptEmbeds.cat([rows[prompt] for prompt in prompts]).to(self._device)

    def _encoded(self, prompts: Sequence[str]) -> dict[str, PromptEmbeds]:
        filling = [prompts[-1]] * (TOGETHER - len(prompts))
        encoded = self._encode([*prompts, *filling]).to("cpu")  # GPU memory is dear
        return {prompt: encoded.select(torch.tensor([row])) for row, prompt in enumerate(prompts)}


def longer(prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase | None, limit: int) -> list[str]:
    """The prompts of more than `limit` tokens, those that frame every prompt included; none without a tokenizer."""
    if tokenizer is None or not prompts:
        return []
    tokens = tokenizer(list(prompts))["input_ids"]
    return [prompt for prompt, ids in zip(prompts, tokens, strict=True) if len(ids) > limit]


def cut_by(limits: Sequence[tuple[str, PreTrainedTokenizerBase | None, int]], prompts: Sequence[str]) -> CutPrompts:
    """`Backbone.cut_prompts` of text encoders given as (name, tokenizer, tokens that it reads)."""
    found = {f"{name}'s {limit} tokens": longer(prompts, tokenizer, limit) for name, tokenizer, limit in limits}
    return {name: cut for name, cut in found.items() if cut}
