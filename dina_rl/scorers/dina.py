"""DiNa-LRM as a scorer: Eq. 12 at one noise level or Eq. 13 at several, over one or several noise draws."""

import torch

from dina_rl.backbones.base import Backbone
from dina_rl.config import DiNaScorerConfig
from dina_rl.reward.checkpoint import load_reward
from dina_rl.scorers.base import Conditions


class DiNaScorer:
    """`Scorer` in latent space: nothing is decoded."""

    space = "latents"

    def __init__(self, config: DiNaScorerConfig, backbone: Backbone) -> None:
        self._config = config
        self._device = backbone.device
        self._model = load_reward(config.location, backbone)

    def __call__(self, samples: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        embeds, levels = conditions.embeds.to(self._device), self._config.levels
        draws = [
            self._model.score_clean(samples, embeds, levels, draw.to(self._device)).float()
            for draw in conditions.noise.unbind(1)
        ]
        return cautious_mean(torch.stack(draws), self._config.uncertainty_weight)


def cautious_mean(draws: torch.Tensor, uncertainty_weight: float) -> torch.Tensor:
    """Mean minus weighted standard deviation (population) of scores [draws, B] over the draws: [B]."""
    if uncertainty_weight == 0:
        return draws.mean(0)  # the gradient of a vanishing standard deviation is not a number
    return draws.mean(0) - uncertainty_weight * draws.std(0, correction=0)
