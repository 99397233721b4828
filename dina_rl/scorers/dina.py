"""DiNa-LRM as a scorer: Eq. 12 at one noise level or Eq. 13 at several, over one or several noise draws."""

import torch

from dina_rl.backbones.base import Backbone
from dina_rl.config import DiNaScorerConfig
from dina_rl.reward.checkpoint import load_reward
from dina_rl.reward.model import LatentRewardModel
from dina_rl.scorers.base import Conditions, Space


class DiNaScorer:
    """`Scorer` in latent space: nothing is decoded. The model's weights may be shared with other scorers."""

    space: Space = "latents"

    def __init__(self, config: DiNaScorerConfig, model: LatentRewardModel) -> None:
        self.config = config
        self.model = model

    def __call__(self, samples: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        device = next(self.model.parameters()).device
        samples, embeds = samples.to(device), conditions.embeds.to(device)
        draws = [
            self.model.score_clean(samples, embeds, self.config.levels, draw.to(device)).float()
            for draw in conditions.noise.unbind(1)
        ]
        return cautious_mean(torch.stack(draws), self.config.uncertainty_weight)


def open_dina(config: DiNaScorerConfig, backbone: Backbone) -> DiNaScorer:
    """The scorer of the reward model at `config.path`, loaded onto the backbone's device.

    Raises:
        ValueError: a reward model that cannot be read or does not fit the backbone.
    """
    return DiNaScorer(config, load_reward(config.location, backbone))


def cautious_mean(draws: torch.Tensor, uncertainty_weight: float) -> torch.Tensor:
    """Mean minus weighted standard deviation (population) of scores [draws, B] over the draws: [B]."""
    if uncertainty_weight == 0:
        return draws.mean(0)  # the gradient of a vanishing standard deviation is not a number
    return draws.mean(0) - uncertainty_weight * draws.std(0, correction=0)
