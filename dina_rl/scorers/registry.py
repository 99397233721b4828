"""The configured scorers. Adding one is a file beside `clip.py`, a section of `RewardsConfig` and a line here."""

from dina_rl.backbones.base import Backbone
from dina_rl.config import CLIPModelConfig, RewardsConfig
from dina_rl.scorers.base import ImageScorer, Scorer


def open_scorers(rewards: RewardsConfig, backbone: Backbone) -> dict[str, Scorer]:
    """Scorer by name, those that have a weight; models load onto the backbone's device.

    Raises:
        ValueError: a model that cannot be read or does not fit the backbone.
    """
    scorers: dict[str, Scorer] = {}
    if rewards.dina is not None:
        from dina_rl.scorers.dina import open_dina

        scorers["dina"] = open_dina(rewards.dina, backbone)
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
