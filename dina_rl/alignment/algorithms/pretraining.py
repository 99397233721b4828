"""Preferred images for ReFL's pretraining loss, drawn by the rollout workers; who encodes draws their prompts too."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dina_rl.backbones.base import TextEncoder
from dina_rl.config import AlignRun
from dina_rl.data.stores.latents import LatentStore
from dina_rl.seeding import generator, normal
from dina_rl.types import PromptEmbeds, WorkItem


@dataclass(frozen=True, slots=True, kw_only=True)
class PretrainingSamples:
    """Real samples beside a group's own, for the flow-matching loss. G of them."""

    latents: torch.Tensor  # [G, C, H, W] clean
    noise: torch.Tensor  # [G, C, H, W]
    sigma: torch.Tensor  # [G] in (0, 1)
    prompt: PromptEmbeds  # G rows

    def select(self, index: torch.Tensor) -> "PretrainingSamples":
        """The samples at `index`, in that order."""
        return PretrainingSamples(
            latents=self.latents[index],
            noise=self.noise[index],
            sigma=self.sigma[index],
            prompt=self.prompt.select(index),
        )

    @staticmethod
    def cat(parts: Sequence["PretrainingSamples"]) -> "PretrainingSamples":
        """One batch from several, in order."""
        return PretrainingSamples(
            latents=torch.cat([part.latents for part in parts]),
            noise=torch.cat([part.noise for part in parts]),
            sigma=torch.cat([part.sigma for part in parts]),
            prompt=PromptEmbeds.cat([part.prompt for part in parts]),
        )


class PretrainingDraws:
    """Chosen images of the training pairs of a latent store; a draw depends on (seed, iteration, prompt id) alone.

    Raises:
        ValueError: no complete latent store, or one of other latents than the policy's.
    """

    def __init__(self, run: AlignRun, latent_shape: tuple[int, int, int]) -> None:
        self._seed = run.seed
        self._store = LatentStore(run.refl.pretraining_location)
        if not self._store.complete():
            raise ValueError(f"latent store {self._store.directory} is not complete; finish it with jobs.encode")
        self._pairs = self._store.pairs("train")
        shapes = self._store.latent_shapes
        fits = torch.tensor([shape == latent_shape for shape in shapes])
        self._usable = fits[self._pairs.bucket].nonzero()[:, 0]  # the pairs in buckets of the policy's size
        if not len(self._usable):
            held = ", ".join(map(str, shapes))
            raise ValueError(
                f"latent store {self._store.directory} holds latents of shape {held}, the policy's are {latent_shape}"
            )

    def draw(self, item: WorkItem, encode: TextEncoder) -> PretrainingSamples:
        """One sample per sample of the group, at sigma ~ U(0, 1)."""
        draws = self._draws(item)
        positions = self._positions(item, draws)
        latents = self._store.latents(self._pairs.chosen[positions])
        return PretrainingSamples(
            latents=latents,
            noise=normal(tuple(latents.shape), self._seed, "pretraining-noise", item.iteration, item.prompt_id),
            sigma=torch.rand(item.group_size, generator=draws),
            prompt=encode(self._prompts(positions)).to("cpu"),
        )

    def prompts(self, item: WorkItem) -> list[str]:
        """Those of the samples that `draw` draws."""
        return self._prompts(self._positions(item, self._draws(item)))

    def _draws(self, item: WorkItem) -> torch.Generator:
        return generator(self._seed, "pretraining", item.iteration, item.prompt_id)

    def _positions(self, item: WorkItem, draws: torch.Generator) -> torch.Tensor:
        """Which pairs: what is drawn first."""
        return self._usable[torch.randint(len(self._usable), (item.group_size,), generator=draws)]

    def _prompts(self, positions: torch.Tensor) -> list[str]:
        return [self._pairs.prompts[i] for i in self._pairs.prompt[positions].tolist()]
