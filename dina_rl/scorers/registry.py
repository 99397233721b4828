"""The configured scorers. Adding one is a file beside `clip.py`, a section of `RewardsConfig` and a line here."""

from dina_rl.backbones.base import Backbone
from dina_rl.config import CLIPModelConfig, PipelineConfig, RewardsConfig
from dina_rl.scorers.base import ImageScorer, Scorer


def open_scorers(rewards: RewardsConfig, generator: PipelineConfig, backbone: Backbone) -> dict[str, Scorer]:
    """Scorer by name, those that have a weight; models load onto the backbone's device.

    Args:
        generator: whose latents are scored.
        backbone: what it opens.

    Raises:
        ValueError: a model that cannot be read or does not fit the generator.
    """
    scorers: dict[str, Scorer] = {}
    if rewards.dina is not None:
        from dina_rl.scorers.dina import open_dina_beside

        scorers["dina"] = open_dina_beside(rewards.dina, generator, backbone)
    for name, config in (("pickscore", rewards.pickscore), ("clip_score", rewards.clip_score)):
        if config is not None:
            scorers[name] = open_image_scorer(name, config, device=backbone.device)
    return scorers


def open_image_scorer(name: str, config: CLIPModelConfig, *, device: str) -> ImageScorer:
    """A scorer of images by name, which needs no backbone.

    Raises:
        ValueError: a model that cannot be read.
    """
    from dina_rl.scorers.clip import CLIPScorer

    return CLIPScorer(config, learned_scale=name == "pickscore", device=device)
