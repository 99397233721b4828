"""The scorers of an evaluation, and in which views each is looked at by default."""

from dataclasses import dataclass
from pathlib import Path

from dina_rl.config import PictureScorerConfig, ThurstoneConfig
from dina_rl.evaluation.requests import View
from dina_rl.reward.checkpoint import read_card

PLAIN = View(levels=())


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedScorer:
    """A scorer and what its card says. The last two are None for scorers without noise."""

    name: str
    config: PictureScorerConfig
    backbone: str
    main: View  # its own single level, or the configured levels
    ensemble: View | None  # its own ensemble, unless levels were configured
    thurstone: ThurstoneConfig | None  # the likelihood it was fitted by


def named_scorer(name: str, config: PictureScorerConfig) -> NamedScorer:
    """Read what there is to know of a scorer without loading it.

    Raises:
        ValueError: no such reward model.
    """
    if config.kind != "dina":
        return NamedScorer(name=name, config=config, backbone="CLIP", main=PLAIN, ensemble=None, thurstone=None)
    card = read_card(config.reward.location)
    reward = card.reward
    return NamedScorer(
        name=name,
        config=config,
        backbone=Path(config.pipeline or card.pipeline).name,
        main=View(levels=config.levels or (reward.single_level,)),
        ensemble=None if config.levels else View(levels=reward.ensemble_levels),
        thurstone=reward.thurstone,
    )
