"""DiNa-LRM as a scorer: Eq. 12 at one noise level or Eq. 13 at several, over one or several noise draws."""

import torch

from dina_rl.backbones.base import Backbone, TextEncoder
from dina_rl.backbones.compiling import compile_blocks
from dina_rl.config import DiNaScorerConfig, PipelineConfig
from dina_rl.reward.checkpoint import load_reward
from dina_rl.reward.home import find_home
from dina_rl.reward.model import LatentRewardModel
from dina_rl.runtime import open_pipeline
from dina_rl.scorers.base import Conditions, Space


class DiNaScorer:
    """`Scorer` in latent space: nothing is decoded. The model's weights may be shared with other scorers.

    Args:
        text_encoder: of the model's own backbone, where the embeddings that come with the samples are another's.
    """

    space: Space = "latents"

    def __init__(
        self, config: DiNaScorerConfig, model: LatentRewardModel, *, text_encoder: TextEncoder | None = None
    ) -> None:
        self.config = config
        self.model = model
        self._text_encoder = text_encoder

    def __call__(self, samples: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        return cautious_mean(self.by_draw(samples, conditions), self.config.uncertainty_weight)

    def by_draw(self, samples: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        """Scores [draws, B], fp32, one for each draw of the noise; one of noisy samples, as they are (Eq. 11)."""
        device = next(self.model.parameters()).device
        own = self._text_encoder
        embeds = (conditions.embeds if own is None else own(conditions.prompts)).to(device)
        samples = samples.to(device)
        if conditions.sigma:
            levels = torch.full((len(samples),), conditions.sigma, device=device)
            return self.model.score(samples, levels, embeds).float()[None]
        draws = [
            self.model.score_clean(samples, embeds, self.config.levels, draw.to(device)).float()
            for draw in conditions.noise.unbind(1)
        ]
        return torch.stack(draws)


def open_dina(config: DiNaScorerConfig, backbone: Backbone) -> DiNaScorer:
    """The scorer of the reward model at `config.path`, loaded onto the backbone's device.

    Raises:
        ValueError: a reward model that cannot be read or does not fit the backbone.
    """
    return DiNaScorer(config, load_reward(config.location, backbone))


def open_dina_beside(config: DiNaScorerConfig, generator: PipelineConfig, backbone: Backbone) -> DiNaScorer:
    """The scorer of a generator's latents: inside its own backbone, which is the generator's if that holds the same.

    Args:
        backbone: what `generator` opens.

    Raises:
        ValueError: as `open_dina`, or the reward model was fitted on latents of another VAE.
    """
    home = find_home(config, generator)
    own = backbone if home.pipeline == generator else open_pipeline(home.pipeline)
    model = load_reward(config.location, own)
    if generator.compile:
        compile_blocks(model.truncated)
    return DiNaScorer(config, model, text_encoder=own.load_text_encoder() if home.reads_prompts else None)


def cautious_mean(draws: torch.Tensor, uncertainty_weight: float) -> torch.Tensor:
    """Mean minus weighted standard deviation (population) of scores [draws, B] over the draws: [B]."""
    if uncertainty_weight == 0:
        return draws.mean(0)  # the gradient of a vanishing standard deviation is not a number
    return draws.mean(0) - uncertainty_weight * draws.std(0, correction=0)
