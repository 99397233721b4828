"""The policy as a sampler: the transformer under the weights published last. What conditions it is handed in."""

from collections.abc import Sequence

import torch

from dina_rl.alignment.measurement import EvaluationItem
from dina_rl.backbones.base import TextEncoder
from dina_rl.backbones.compiling import compile_blocks
from dina_rl.backbones.guidance import guided_velocity
from dina_rl.backbones.merged import MergedAdapter, SampledWeights, SeparateWeights
from dina_rl.backbones.trained import check_names
from dina_rl.config import AlignRun
from dina_rl.flow.sampler import GuidedVelocity
from dina_rl.runtime import image_size, open_pipeline
from dina_rl.seeding import normal
from dina_rl.types import PolicyWeights, PromptEmbeds, WorkItem


class PolicySampler:
    """What every algorithm samples with. Holds no state between calls but the weights.

    Args:
        merged: an adapter is merged into the weights when it arrives (`algorithms.registry.merges`).
    """

    def __init__(self, run: AlignRun, *, merged: bool = False) -> None:
        self.run = run
        self.backbone = open_pipeline(run.pipeline)
        self.device = self.backbone.device
        self._size = image_size(run.pipeline, self.backbone)
        self.latent_shape = self.backbone.latent_shape(*self._size)
        self.sigmas = self._table(run.rollout.num_steps)
        self.evaluation_sigmas = self._table(run.golden.num_steps or run.rollout.num_steps)
        self.version = 0
        self.transformer = self.backbone.load_transformer()
        lora, backbone = run.learner.lora, self.backbone
        self._weights: SampledWeights = (
            MergedAdapter(self.transformer, lora, backbone=backbone)
            if merged and lora is not None
            else SeparateWeights(self.transformer, lora, backbone=backbone, seed=run.seed)
        )
        if run.pipeline.compile:
            compile_blocks(self.transformer)
        self._next_part = 0
        self._loaded: set[str] = set()  # names of the weights that came in parts

    def _table(self, num_steps: int) -> torch.Tensor:
        """Sigmas [N + 1] of the scheduler."""
        return self.backbone.sigmas(num_steps, *self._size)

    def load_weights(self, weights: PolicyWeights) -> int:
        """Sample with `weights` from now on; they may come in parts, in order. Returns their version.

        Raises:
            ValueError: a part is missing, or the weights are not those of this policy.
        """
        if weights.part != self._next_part:
            raise ValueError(f"part {weights.part} of the policy's weights came where {self._next_part} was due")
        self._loaded = set(weights.tensors) | (self._loaded if weights.part else set())
        check_names(self._loaded & self._weights.names, self._loaded)
        self._weights.take(weights.tensors)
        self._next_part = (weights.part + 1) % weights.parts
        if self._next_part == 0:
            check_names(self._loaded, set(self._weights.names))
            self._weights.complete()
            self.version = weights.version
        return self.version

    def noise(self, items: Sequence[WorkItem], count: int) -> torch.Tensor:
        """`count` draws for every sample of the groups [count, B, C, H, W], on the CPU: the first is the initial noise.

        They depend on (seed, iteration, prompt, sample) alone.
        """
        shape = count, *self.latent_shape
        return torch.stack(
            [
                normal(shape, self.run.seed, "rollout", item.iteration, item.prompt_id, sample)
                for item in items
                for sample in range(item.group_size)
            ],
            1,
        )

    def evaluation_noise(self, item: EvaluationItem) -> torch.Tensor:
        """Initial noise [B, C, H, W], by (split, prompt, sample) alone: every policy starts from the same."""
        return torch.stack(
            [
                normal(self.latent_shape, "evaluation", item.split, prompt_id, sample_id)
                for prompt_id, sample_id in zip(item.prompt_ids, item.sample_ids, strict=True)
            ]
        )

    def prompts(self, items: Sequence[WorkItem], texts: TextEncoder) -> tuple[PromptEmbeds, PromptEmbeds]:
        """Embeddings of the groups' prompts, one row each, and one row per sample."""
        rows = texts([item.prompt for item in items]).to(self.device)
        sizes = [item.group_size for item in items]
        return rows, PromptEmbeds.cat([rows.select(slice(i, i + 1)).repeat(size) for i, size in enumerate(sizes)])

    def trained_negative(self, texts: TextEncoder) -> PromptEmbeds | None:
        """The negative prompt, one row on the CPU, where the learner trains the guided velocity; else None."""
        return self._negative(texts).to("cpu") if self.run.learner.guidance_in_loss else None

    def velocity(self, prompt: PromptEmbeds, guidance_scale: float, texts: TextEncoder) -> GuidedVelocity:
        """The current policy's velocity for the samples of `prompt`, one row each."""
        negative = None if guidance_scale == 1 else self._negative(texts).to(self.device)
        return guided_velocity(self.backbone, self.transformer, prompt, negative, guidance_scale)

    def _negative(self, texts: TextEncoder) -> PromptEmbeds:
        """What guidance leads away from, one row: the empty prompt, if no other is given."""
        return texts([self.run.rollout.negative_prompt])
