"""The reward's side of the loop: finished latents in, proxy rewards out. No latent is ever decoded for it."""

from collections.abc import Sequence

import torch

from dina_rl.alignment.golden import EvaluationSamples
from dina_rl.config import AlignRun
from dina_rl.reward.checkpoint import load_reward
from dina_rl.runtime import device, open_pipeline
from dina_rl.seeding import normal
from dina_rl.types import PromptEmbeds, StoppedGroup, Trajectory


class ScoringWorker:
    """DiNa-LRM as a scorer: Eq. 12 at one noise level or Eq. 13 at several, at noise that is fixed by seed."""

    def __init__(self, run: AlignRun) -> None:
        self._run = run
        self._device = device()
        self._reward = load_reward(run.scorer.location, open_pipeline(run.pipeline))

    def score(self, trajectories: Sequence[Trajectory]) -> torch.Tensor:
        """Rewards [groups, G] of equally large groups, in one forward per draw. A failed score stays NaN or infinite.

        With `scorer.noise` shared, the samples of a group meet the same noise: what it adds to all of them the centred
        reward does not see.
        """
        latents, prompt, noise = self.inputs(trajectories)
        with torch.no_grad():
            return self._score(latents, prompt, noise).cpu().view(len(trajectories), -1)

    def score_with_gradient(self, groups: Sequence[StoppedGroup]) -> tuple[torch.Tensor, torch.Tensor]:
        """(rewards [groups, G], d reward / d latents [groups, G, C, H, W]) of equally large groups (Eq. 18)."""
        rewards, gradient = self.gradient(*self.inputs(groups))
        shape = len(groups), -1
        return rewards.cpu().view(shape), gradient.cpu().view(*shape, *gradient.shape[1:])

    def inputs(self, groups: Sequence[Trajectory | StoppedGroup]) -> tuple[torch.Tensor, PromptEmbeds, torch.Tensor]:
        """Latents [B, C, H, W], prompts and noise [B, draws, C, H, W] of all samples of the groups, in order."""
        latents = torch.cat([group.latents for group in groups])
        prompt = PromptEmbeds.cat([group.prompt.repeat(len(group.latents)) for group in groups])
        return latents, prompt, torch.stack([draw for group in groups for draw in self._group_noise(group)])

    def gradient(
        self, latents: torch.Tensor, prompt: PromptEmbeds, noise: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(rewards [B], their gradients at the latents [B, C, H, W]) on this process's device."""
        latents = latents.detach().to(self._device).requires_grad_()
        with torch.enable_grad():
            rewards = self._score(latents, prompt, noise)
            (gradient,) = torch.autograd.grad(rewards.sum(), latents)
        return rewards.detach(), gradient

    def score_evaluation(self, samples: EvaluationSamples) -> torch.Tensor:
        """Proxy scores [B] of evaluation samples, at noise that depends on (split, prompt, sample) alone."""
        item = samples.item
        noise = [
            self._noise(samples.latents, "evaluation-reward", item.split, prompt_id, sample_id)
            for prompt_id, sample_id in zip(item.prompt_ids, item.sample_ids, strict=True)
        ]
        with torch.no_grad():
            return self._score(samples.latents, samples.prompt, torch.stack(noise)).cpu()

    def _group_noise(self, group: Trajectory | StoppedGroup) -> list[torch.Tensor]:
        key = self._run.seed, "reward", group.item.step, group.item.prompt_id
        count = len(group.latents)
        if self._run.scorer.noise == "shared":
            return [self._noise(group.latents, *key)] * count
        return [self._noise(group.latents, *key, sample) for sample in range(count)]

    def _noise(self, latents: torch.Tensor, *key: int | str) -> torch.Tensor:
        """One sample's noise [draws, C, H, W]."""
        return normal((self._run.scorer.draws, *latents.shape[1:]), *key)

    def _score(self, latents: torch.Tensor, prompt: PromptEmbeds, noise: torch.Tensor) -> torch.Tensor:
        """Scores [B] of latents [B, C, H, W] at noise [B, draws, C, H, W]."""
        latents, prompt = latents.to(self._device), prompt.to(self._device)
        levels = self._run.scorer.levels
        draws = [
            self._reward.score_clean(latents, prompt, levels, draw.to(self._device)).float() for draw in noise.unbind(1)
        ]
        return cautious_mean(torch.stack(draws), self._run.scorer.uncertainty_weight)


def cautious_mean(draws: torch.Tensor, uncertainty_weight: float) -> torch.Tensor:
    """Mean minus weighted standard deviation (population) of scores [draws, B] over the draws: [B]."""
    if uncertainty_weight == 0:
        return draws.mean(0)  # the gradient of a vanishing standard deviation is not a number
    return draws.mean(0) - uncertainty_weight * draws.std(0, correction=0)
