import pytest

from dina_rl.config import DatasetConfig, FilterConfig, PipelineConfig
from dina_rl.data.buckets import PUBLISHED
from dina_rl.data.filters import bucketing, max_per_prompt, preference_filter
from dina_rl.data.sets.records import PreferencePair


def pair(votes: tuple[int, int] | None = None, confidence: float | None = None) -> PreferencePair:
    return PreferencePair(index=0, prompt="p", chosen="a", rejected="b", votes=votes, confidence=confidence)


@pytest.mark.parametrize(
    ("values", "votes", "expected"),
    [
        ({}, (0, 9), None),
        ({"min_vote_share": 0.6}, (7, 3), None),
        ({"min_vote_share": 0.6}, (6, 4), "vote_share"),  # must exceed it
        ({"min_vote_share": 0.6}, (0, 5), "vote_share"),
        ({"min_vote_share": 0.6}, None, None),
        ({"min_vote_share": 0.6}, (0, 0), None),
        ({"min_vote_share": 0.6, "unvoted": "drop"}, None, "unvoted"),
        ({"min_vote_share": 0.6, "unvoted": "drop"}, (0, 0), "unvoted"),
        ({"unvoted": "drop"}, None, None),
    ],
)
def test_votes(values: dict, votes: tuple[int, int] | None, expected: str | None) -> None:
    assert preference_filter(pair(votes=votes), FilterConfig(**values)) == expected


@pytest.mark.parametrize(
    ("values", "confidence", "expected"),
    [
        ({}, 0.0, None),
        ({"min_confidence": 0.95}, 0.95, None),
        ({"min_confidence": 0.95}, 0.94, "confidence"),
        ({"min_confidence": 0.95}, None, None),
        ({"min_confidence": 0.95, "unrated": "drop"}, None, "unrated"),
    ],
)
def test_confidence(values: dict, confidence: float | None, expected: str | None) -> None:
    assert preference_filter(pair(confidence=confidence), FilterConfig(**values)) == expected


def test_published_buckets_come_with_the_released_codes_filters() -> None:
    pipeline = PipelineConfig(height=64, width=32)
    lenient, published = DatasetConfig(), DatasetConfig(buckets="published")
    assert bucketing(lenient, pipeline).buckets == ((64, 32),)
    assert (bucketing(lenient, pipeline).min_area, max_per_prompt(lenient)) == (0, None)
    assert bucketing(published, pipeline).buckets == PUBLISHED
    assert (bucketing(published, pipeline).min_area, max_per_prompt(published)) == (65_536, 8)
    changed = DatasetConfig(buckets="published", filter={"min_area": 0, "max_per_prompt": 0})
    assert (bucketing(changed, pipeline).min_area, max_per_prompt(changed)) == (0, None)


def test_a_list_of_buckets() -> None:
    config = DatasetConfig(buckets=[[64, 64], [32, 64]], filter={"min_area": 9, "max_per_prompt": 3})
    found = bucketing(config, PipelineConfig())
    assert (found.buckets, found.stretch, found.min_area, max_per_prompt(config)) == (((64, 64), (32, 64)), False, 9, 3)


def test_nothing_to_encode_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to encode"):
        DatasetConfig(train=None, test=None)
    with pytest.raises(ValueError, match="at least one"):
        DatasetConfig(buckets=[])
