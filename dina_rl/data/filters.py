"""Which pairs of a preference set are kept: what the configuration means for one pair."""

from dina_rl.config import DatasetConfig, FilterConfig, PipelineConfig
from dina_rl.data.buckets import PUBLISHED, PUBLISHED_MAX_PER_PROMPT, PUBLISHED_MIN_AREA, Bucketing
from dina_rl.data.sets.records import PreferencePair


def preference_filter(pair: PreferencePair, config: FilterConfig) -> str | None:
    """The name of the filter that refuses a pair for what people said about it; None keeps it.

    A pair whose votes are all zero has none: the released preprocessing writes null as zero.
    """
    if config.min_vote_share is not None:
        votes = pair.votes or (0, 0)
        if not sum(votes):
            if config.unvoted == "drop":
                return "unvoted"
        elif votes[0] / sum(votes) <= config.min_vote_share:
            return "vote_share"
    if config.min_confidence is not None:
        if pair.confidence is None:
            if config.unrated == "drop":
                return "unrated"
        elif pair.confidence < config.min_confidence:
            return "confidence"
    return None


def bucketing(dataset: DatasetConfig, pipeline: PipelineConfig) -> Bucketing:
    """How the set's images get their size.

    Raises:
        ValueError: the set holds latents, which cannot be stretched to the pipeline's size.
    """
    min_area, exact = dataset.filter.min_area, dataset.kind == "preprocessed"
    if dataset.buckets == "pipeline":
        if exact:
            raise ValueError(
                "dataset.kind preprocessed holds latents, which have their sizes: set dataset.buckets to published"
            )
        return Bucketing(buckets=(pipeline.size,), stretch=True, min_area=min_area or 0)
    if dataset.buckets == "published":
        return Bucketing(
            buckets=PUBLISHED, stretch=False, min_area=PUBLISHED_MIN_AREA if min_area is None else min_area, exact=exact
        )
    return Bucketing(buckets=dataset.buckets, stretch=False, min_area=min_area or 0, exact=exact)


def max_per_prompt(dataset: DatasetConfig) -> int | None:
    """Training pairs kept of one prompt; None: all."""
    if dataset.filter.max_per_prompt is None:
        return PUBLISHED_MAX_PER_PROMPT if dataset.buckets == "published" else None
    return dataset.filter.max_per_prompt or None
