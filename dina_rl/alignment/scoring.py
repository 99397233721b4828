"""The reward's side of the loop: finished latents in, proxy rewards out. No latent is ever decoded for it."""

from collections.abc import Sequence

import torch

from dina_rl.alignment.golden import EvaluationSamples
from dina_rl.config import AlignRun
from dina_rl.reward.checkpoint import load_reward
from dina_rl.runtime import device, open_pipeline
from dina_rl.seeding import normal
from dina_rl.types import PromptEmbeds, Trajectory


class ScoringWorker:
    """DiNa-LRM as a scorer: Eq. 12 at one noise level or Eq. 13 at several, fixed by seed per sample."""

    def __init__(self, run: AlignRun) -> None:
        self._run = run
        self._device = device()
        self._reward = load_reward(run.scorer.location, open_pipeline(run.pipeline))

    def score(self, trajectories: Sequence[Trajectory]) -> torch.Tensor:
        """Rewards [groups, G] of equally large groups, in one forward. A failed score stays NaN or infinite."""
        noise = [
            normal(group.latents.shape[1:], self._run.seed, "reward", group.item.step, group.item.prompt_id, sample)
            for group in trajectories
            for sample in range(len(group.latents))
        ]
        latents = torch.cat([group.latents for group in trajectories])
        prompt = PromptEmbeds.cat([group.prompt.repeat(len(group.latents)) for group in trajectories])
        return self._score(latents, prompt, torch.stack(noise)).view(len(trajectories), -1)

    def score_evaluation(self, samples: EvaluationSamples) -> torch.Tensor:
        """Proxy scores [B] of evaluation samples, at noise that depends on (split, prompt, sample) alone."""
        item = samples.item
        noise = [
            normal(samples.latents.shape[1:], "evaluation-reward", item.split, prompt_id, sample_id)
            for prompt_id, sample_id in zip(item.prompt_ids, item.sample_ids, strict=True)
        ]
        return self._score(samples.latents, samples.prompt, torch.stack(noise))

    @torch.no_grad()
    def _score(self, latents: torch.Tensor, prompt: PromptEmbeds, noise: torch.Tensor) -> torch.Tensor:
        scores = self._reward.score_clean(
            latents.to(self._device), prompt.to(self._device), self._run.scorer.levels, noise.to(self._device)
        )
        return scores.float().cpu()
