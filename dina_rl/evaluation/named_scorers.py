"""The scorers of an evaluation, and in which views each is looked at by default."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dina_rl.config import DatasetConfig, PictureScorerConfig, PipelineConfig, ThurstoneConfig
from dina_rl.data.buckets import PUBLISHED, Bucketing, Size
from dina_rl.data.filters import bucketing
from dina_rl.evaluation.requests import PLAIN, View
from dina_rl.evaluation.score_store import ScoringJob
from dina_rl.evaluation.sets import EvaluationSet
from dina_rl.reward.card import RewardCard
from dina_rl.reward.checkpoint import read_card
from dina_rl.reward.home import check_fingerprint
from dina_rl.runtime import open_pipeline
from dina_rl.scorers.registry import IMAGE_KINDS, check_image_scorer
from dina_rl.scoring import dina_pipeline

Buckets = Literal["pipeline", "published"] | tuple[Size, ...]


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


def named_scorer(
    name: str, config: PictureScorerConfig, *, buckets: Buckets | None = None, dataset: DatasetConfig | None = None
) -> NamedScorer:
    """Read what there is to know of a scorer without loading it.

    Args:
        buckets: image sizes; None: those of the fit.
        dataset: what a fit run says of its data; None: the scorer is not a run's.

    Raises:
        ValueError: no such model, or sizes that its pipeline does not fit.
    """
    config = _absolute(config)
    if config.of_images is not None:
        check_image_scorer(config.of_images)
        backbone_name = IMAGE_KINDS[config.of_images.name].backbone
        return NamedScorer(
            name=name, config=config, backbone=backbone_name, main=PLAIN, ensemble=None, thurstone=None, bucketing=None
        )
    card = read_card(config.dina.location)
    pipeline = dina_pipeline(config, card)
    fitted = "pipeline" if dataset is None and config.height is not None else _of_card(card)
    sizes = _bucketing(dataset or DatasetConfig(), buckets or fitted, pipeline)
    backbone = open_pipeline(pipeline)
    check_fingerprint(str(config.dina.path), card, pipeline, f"scorers.{name}.pipeline")
    backbone.check("transformer", "vae", "text")
    for height, width in sizes.buckets:
        backbone.latent_shape(height, width)
    return NamedScorer(
        name=name,
        config=config,
        backbone=Path(pipeline.path).name,
        main=View(levels=config.levels or (card.reward.single_level,)),
        ensemble=None if config.levels else View(levels=card.reward.ensemble_levels),
        thurstone=card.reward.thurstone,
        bucketing=sizes,
    )


def _of_card(card: RewardCard) -> Buckets | None:
    """The buckets that the card names; a fit on the authors' files lists theirs in another order."""
    return "published" if card.buckets is not None and set(card.buckets) == set(PUBLISHED) else card.buckets


def _bucketing(dataset: DatasetConfig, buckets: Buckets | None, pipeline: PipelineConfig) -> Bucketing:
    """Sizes and smallest area as in the fit. Its kind has no say: evaluation sets hold images, which can be resized."""
    return bucketing(DatasetConfig(buckets=buckets or dataset.buckets, filter=dataset.filter), pipeline)


def _absolute(config: PictureScorerConfig) -> PictureScorerConfig:
    """The configuration with absolute places: workers have working directories of their own."""
    paths = {name: value for name in ("path", "processor", "pipeline") if (value := dict(config)[name]) is not None}
    found = {name: Path(value).expanduser() for name, value in paths.items()}
    return config.model_copy(update={name: str(path.resolve()) for name, path in found.items() if path.exists()})
