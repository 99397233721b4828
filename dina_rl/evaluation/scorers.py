"""The scorers of an evaluation, and in which views each is looked at by default."""

from dataclasses import dataclass
from pathlib import Path

from dina_rl.config import DatasetConfig, PictureScorerConfig, ThurstoneConfig
from dina_rl.data.buckets import Bucketing
from dina_rl.data.filters import bucketing
from dina_rl.evaluation.requests import View
from dina_rl.evaluation.scores import ScoringJob
from dina_rl.evaluation.sets import EvaluationSet
from dina_rl.reward.card import RewardCard
from dina_rl.reward.checkpoint import read_card
from dina_rl.scoring import dina_pipeline

PLAIN = View(levels=())


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedScorer:
    """A scorer and what its card says. The last three are None for scorers of image files."""

    name: str
    config: PictureScorerConfig
    backbone: str
    main: View  # its own single level, or the configured levels
    ensemble: View | None  # its own ensemble, unless levels were configured
    thurstone: ThurstoneConfig | None  # the likelihood it was fitted by
    bucketing: Bucketing | None  # sizes at which it sees images

    def job(self, data: EvaluationSet, views: tuple[View, ...]) -> ScoringJob:
        """To score a set in some views."""
        return ScoringJob(scorer=self.config, bucketing=self.bucketing, data=data, views=views)


def named_scorer(name: str, config: PictureScorerConfig, sizes: DatasetConfig | None) -> NamedScorer:
    """Read what there is to know of a scorer without loading it.

    Args:
        sizes: how images get their size, its buckets and smallest area; None: as the reward model's card says.

    Raises:
        ValueError: no such reward model, or it does not say at which size it scores.
    """
    if config.kind != "dina":
        return NamedScorer(
            name=name, config=config, backbone="CLIP", main=PLAIN, ensemble=None, thurstone=None, bucketing=None
        )
    card = read_card(config.reward.location)
    reward = card.reward
    return NamedScorer(
        name=name,
        config=config,
        backbone=Path(config.pipeline or card.pipeline).name,
        main=View(levels=config.levels or (reward.single_level,)),
        ensemble=None if config.levels else View(levels=reward.ensemble_levels),
        thurstone=reward.thurstone,
        bucketing=_bucketing(config, card, sizes),
    )


def _bucketing(config: PictureScorerConfig, card: RewardCard, sizes: DatasetConfig | None) -> Bucketing:
    if sizes is None and card.buckets and config.height is None:
        return Bucketing(buckets=card.buckets, stretch=False)
    return bucketing(sizes or DatasetConfig(), dina_pipeline(config, card))
