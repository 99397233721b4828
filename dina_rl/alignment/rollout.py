"""The generator's side of the loop: prompts and their embeddings in, rollouts out."""

from collections.abc import Sequence

import torch

from dina_rl.alignment.algorithms.registry import merges, open_algorithm
from dina_rl.alignment.golden import open_metric
from dina_rl.alignment.measurement import EvaluationItem, EvaluationSamples
from dina_rl.alignment.sampler import PolicySampler
from dina_rl.backbones.base import TextEncoder
from dina_rl.config import AlignRun
from dina_rl.flow.sampler import denoise
from dina_rl.types import PolicyWeights, Rollout, WorkItem


class RolloutWorker:
    """The policy as a sampler, with the VAE. Holds no state between calls but the weights."""

    def __init__(self, run: AlignRun) -> None:
        self._sampler = PolicySampler(run, merged=merges(run))
        self._sample = open_algorithm(run).sampling(self._sampler)
        self._codec = self._sampler.backbone.load_codec()
        self._metric = open_metric(run.golden)

    def load_weights(self, weights: PolicyWeights) -> int:
        """See `PolicySampler.load_weights`."""
        return self._sampler.load_weights(weights)

    def rollout(self, items: Sequence[WorkItem], texts: TextEncoder) -> list[Rollout]:
        """One rollout per group, all groups in one batch. Depends on the items and the weights alone.

        All groups must belong to one iteration: what an algorithm draws once an iteration they share.

        Args:
            texts: has the embeddings of all that the groups read; see `texts.PromptEncoder`.
        """
        assert len({item.iteration for item in items}) == 1, "groups of one call belong to one iteration"
        return self._sample(items, texts)

    def evaluate(self, item: EvaluationItem, texts: TextEncoder) -> EvaluationSamples:
        """ODE samples of the current policy at fixed noise, decoded and measured by the golden metric."""
        sampler = self._sampler
        prompt = texts(item.prompts).to(sampler.device)
        noise, sigmas = sampler.evaluation_noise(item).to(sampler.device), sampler.evaluation_sigmas.to(sampler.device)
        latents = denoise(noise, sigmas, sampler.velocity(prompt, item.guidance_scale, texts)).latents
        with torch.no_grad():
            images = self._codec.decode(latents).cpu()
        return EvaluationSamples(
            item=item,
            golden=self._metric(images, item.prompts),
            latents=latents.cpu(),
            prompt=prompt.to("cpu"),
            images=(images * 255).round().to(torch.uint8),
        )


def in_calls(items: Sequence[WorkItem], groups_per_call: int) -> list[list[WorkItem]]:
    """The work items in calls of equal geometry; the split depends on the configuration, never on the workers."""
    return [list(items[i : i + groups_per_call]) for i in range(0, len(items), groups_per_call)]
