"""Who encodes prompts: one owner of the text encoders, who hands out the embeddings of all that a call reads.

Each text is padded to the pipeline's own length and encoded so (`backbones/text.py`) that its row is the same to the
bit whatever else a call reads, and whoever encodes it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from dina_rl.alignment.algorithms.registry import open_algorithm
from dina_rl.alignment.measurement import EvaluationItem
from dina_rl.config import AlignRun
from dina_rl.runtime import image_size, open_pipeline
from dina_rl.types import PromptEmbeds, WorkItem


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedTexts:
    """Embeddings of all texts that some calls read, on the CPU: a `TextEncoder` of these alone."""

    texts: tuple[str, ...]  # distinct
    rows: PromptEmbeds  # one each

    def __call__(self, prompts: Sequence[str]) -> PromptEmbeds:
        place = {text: row for row, text in enumerate(self.texts)}
        return self.rows.select(torch.tensor([place[prompt] for prompt in prompts]))


class PromptEncoder:
    """The text encoders, and what of the run is read by them.

    They keep the rows of the texts used last in host memory (`backbones/text.CACHED_PROMPTS`), so that the prompts of
    measurements, which come again at every one, are encoded once: kept here they are bounded, and lost with nobody
    else's node. A row is copied for every call instead, a few megabytes.
    """

    def __init__(self, run: AlignRun) -> None:
        backbone = open_pipeline(run.pipeline)
        self._negative = run.rollout.negative_prompt
        self._guided = run.rollout.guidance_scale != 1 or run.learner.guidance_in_loss
        self._beside = open_algorithm(run).texts(backbone.latent_shape(*image_size(run.pipeline, backbone)))
        self._encode = backbone.load_text_encoder()

    def for_rollout(self, items: Sequence[WorkItem]) -> EncodedTexts:
        """What calls of `RolloutWorker.rollout` read."""
        beside = [text for item in items for text in self._beside(item)]
        return self._encoded([item.prompt for item in items] + beside, guided=self._guided)

    def for_evaluation(self, items: Sequence[EvaluationItem]) -> EncodedTexts:
        """What calls of `RolloutWorker.evaluate` read."""
        prompts = [prompt for item in items for prompt in item.prompts]
        return self._encoded(prompts, guided=any(item.guidance_scale != 1 for item in items))

    def _encoded(self, prompts: Iterable[str], *, guided: bool) -> EncodedTexts:
        texts = tuple(dict.fromkeys([*prompts, *([self._negative] if guided else [])]))
        return EncodedTexts(texts=texts, rows=self._encode(texts).to("cpu"))
