"""The reward's side of the loop: latents in, proxy rewards out. They are decoded only for pixel scorers."""

from collections.abc import Mapping, Sequence

import torch

from dina_rl.alignment.measurement import EvaluationSamples
from dina_rl.config import AlignRun
from dina_rl.config.rewards import JudgeConfig
from dina_rl.runtime import device, open_pipeline
from dina_rl.scorers.base import Conditions, Space
from dina_rl.scorers.mixture import weighted_sum
from dina_rl.scorers.pairwise import BIAS, MISSING, ask, missing, position_bias, win_rates, wins_over
from dina_rl.scorers.registry import open_judges, open_scorers
from dina_rl.seeding import normal
from dina_rl.types import PromptEmbeds, Rollout


class ScoringWorker:
    """All configured scorers, at noise that is fixed by seed."""

    def __init__(self, run: AlignRun) -> None:
        self._run = run
        self._device = device()
        backbone = open_pipeline(run.pipeline)
        self._scorers = open_scorers(run.rewards, run.pipeline, backbone)
        self._judges = open_judges(run.rewards, device=backbone.device)
        self._least: dict[str, float] = {
            each.name: each.min_compared for each in run.rewards.of_images if isinstance(each, JudgeConfig)
        }
        self._scores_images = any(scorer.space == "images" for scorer in self._scorers.values())
        self._codec = backbone.load_codec() if self._scores_images or self._judges else None

    def score(self, rollouts: Sequence[Rollout]) -> dict[str, torch.Tensor]:
        """Scores [groups, G] by scorer of equally large groups, in one forward each (DiNa-LRM: one per draw).

        A judge, who compares, gives win rates within each whole group, however groups are split over calls, and beside
        them, [groups, G] each, his position bias as `NAME_position_bias` and the share of verdicts that did not come as
        `NAME_missing`.

        A failed score stays NaN or infinite. With `rewards.dina.noise` shared, the samples of a group meet the same
        noise: what it adds to all of them the centred reward does not see.
        """
        with torch.no_grad():
            latents, conditions = self.inputs(rollouts)
            samples = self._seen(latents, decoded=self._codec is not None)
            scores = self._score(samples, conditions)
        found = {name: score.cpu().view(len(rollouts), -1) for name, score in scores.items()}
        for name, judge in self._judges.items():
            images = samples["images"]
            groups = images.view(len(rollouts), -1, *images.shape[1:])
            verdicts = ask(judge, groups, [rollout.item.prompt for rollout in rollouts])
            found |= {
                name: win_rates(verdicts, least=self._least[name]),
                f"{name}_{BIAS}": position_bias(verdicts),
                f"{name}_{MISSING}": missing(verdicts),
            }
        return found

    def score_with_gradient(self, groups: Sequence[Rollout]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """(scores [groups, G] by scorer, d reward / d latents [groups, G, C, H, W]) of equal groups (Eq. 18)."""
        scores, gradient = self.gradient(*self.inputs(groups))
        shape = len(groups), -1
        rows = {name: score.cpu().view(shape) for name, score in scores.items()}
        return rows, gradient.cpu().view(*shape, *gradient.shape[1:])

    def inputs(self, groups: Sequence[Rollout]) -> tuple[torch.Tensor, Conditions]:
        """Latents [B, C, H, W] of all samples of the groups, in order, and what they are scored against.

        All are of one noise level: it is the run's.
        """
        latents = torch.cat([group.latents for group in groups])
        conditions = Conditions(
            prompts=tuple(group.item.prompt for group in groups for _ in range(len(group.latents))),
            embeds=PromptEmbeds.cat([group.prompt.repeat(len(group.latents)) for group in groups]),
            noise=torch.stack([draw for group in groups for draw in self._group_noise(group)]),
            sigma=groups[0].latents_sigma,
        )
        return latents, conditions

    def gradient(self, latents: torch.Tensor, conditions: Conditions) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """(scores [B] by scorer, the weighted sum's gradients at the latents [B, C, H, W]) on this process's device."""
        latents = latents.detach().to(self._device).requires_grad_()
        with torch.enable_grad():
            scores = self._score(self._seen(latents, decoded=self._scores_images), conditions)
            (gradient,) = torch.autograd.grad(weighted_sum(self._run.rewards, scores).sum(), latents)
        return {name: score.detach() for name, score in scores.items()}, gradient

    def score_evaluation(self, samples: EvaluationSamples) -> dict[str, torch.Tensor]:
        """Scores [B] of evaluation samples, at noise that depends on (split, prompt, sample) alone.

        A judge gives the rates at which they win over the item's opponents, and beside them his position bias.
        """
        item = samples.item
        noise = [
            self._noise(samples.latents, "evaluation-reward", item.split, prompt_id, sample_id)
            for prompt_id, sample_id in zip(item.prompt_ids, item.sample_ids, strict=True)
        ]
        conditions = Conditions(prompts=item.prompts, embeds=samples.prompt, noise=torch.stack(noise))
        with torch.no_grad():
            seen = self._seen(samples.latents, decoded=self._scores_images)
            found = {name: score.cpu() for name, score in self._score(seen, conditions).items()}
        for name, judge in self._judges.items():
            rates, bias = wins_over(judge, samples.images.float() / 255, item.opponents, item.prompts)
            found |= {name: rates, f"{name}_{BIAS}": bias}
        return found

    def _group_noise(self, group: Rollout) -> list[torch.Tensor]:
        key = self._run.seed, "reward", group.item.iteration, group.item.prompt_id
        count, dina = len(group.latents), self._run.rewards.dina
        if dina is None or dina.noise == "shared":
            return [self._noise(group.latents, *key)] * count
        return [self._noise(group.latents, *key, sample) for sample in range(count)]

    def _noise(self, latents: torch.Tensor, *key: int | str) -> torch.Tensor:
        """One sample's noise [draws, C, H, W]."""
        return normal((self._run.rewards.draws, *latents.shape[1:]), *key)

    def _seen(self, latents: torch.Tensor, *, decoded: bool) -> dict[Space, torch.Tensor]:
        """What there is to see of latents [B, C, H, W]: themselves, and images, decoded once for all."""
        samples: dict[Space, torch.Tensor] = {"latents": latents.to(self._device)}
        if decoded:
            assert self._codec is not None
            samples["images"] = self._codec.decode(samples["latents"])
        return samples

    def _score(self, samples: Mapping[Space, torch.Tensor], conditions: Conditions) -> dict[str, torch.Tensor]:
        """Scores [B] by scorer."""
        return {name: scorer(samples[scorer.space], conditions) for name, scorer in self._scorers.items()}
