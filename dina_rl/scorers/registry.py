"""The configured scorers. Adding one is a file beside `clip.py`, a section of `RewardsConfig` and a line here."""

from dina_rl.backbones.base import Backbone
from dina_rl.config import RewardsConfig
from dina_rl.scorers.base import Scorer


def open_scorers(rewards: RewardsConfig, backbone: Backbone) -> dict[str, Scorer]:
    """Scorer by name, those that have a weight; models load onto the backbone's device.

    Raises:
        ValueError: a model that cannot be read or does not fit the backbone.
    """
    scorers: dict[str, Scorer] = {}
    if rewards.dina is not None:
        from dina_rl.scorers.dina import DiNaScorer

        scorers["dina"] = DiNaScorer(rewards.dina, backbone)
    for name, config in (("pickscore", rewards.pickscore), ("clip_score", rewards.clip_score)):
        if config is not None:
            from dina_rl.scorers.clip import CLIPScorer

            scorers[name] = CLIPScorer(config, learned_scale=name == "pickscore", device=backbone.device)
    return scorers
