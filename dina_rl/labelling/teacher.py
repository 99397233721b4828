"""A teacher's scores: the weighted sum of its scorers', from the evaluator's store."""

import math
from collections.abc import Mapping, Sequence

import torch

from dina_rl.config import ScorerConfig
from dina_rl.evaluation.named_scorers import NamedScorer
from dina_rl.evaluation.score_store import ScoreStore
from dina_rl.evaluation.sets import EvaluationSet
from dina_rl.scorers.mixture import normalised_sum

Scores = dict[tuple[int, str], float]
"""(`PreferenceRecord.index`, image) -> the teacher's score, of pictures that have one."""


def teacher_scores(
    store: ScoreStore, scorers: Sequence[NamedScorer], parts: Mapping[str, ScorerConfig], data: EvaluationSet
) -> tuple[Scores, dict[str, str]]:
    """(the weighted sum for every picture that all scorers have a finite score of, image -> why another has none).

    Args:
        store: has filled the scorers' main views of `data`.
        parts: weight, mean and std of every scorer, by its name.
    """
    by_scorer: dict[str, Scores] = {}
    reasons: dict[str, str] = {}  # the first scorer's
    for scorer in scorers:
        kept = store.read(scorer.job(data, (scorer.main,)), scorer.main)
        for each in kept.dropped:
            reasons.setdefault(each.image, f"{scorer.name}: {each.problem.reason}")
        by_scorer[scorer.name] = found = {}
        for record in kept.records:
            for image, value in zip(record.images, kept.scores[record.index][0].tolist(), strict=True):
                if math.isfinite(value):
                    found[record.index, image] = value
                else:
                    reasons.setdefault(image, f"{scorer.name}: its score is {value}")
    first, *others = by_scorer.values()
    keys = [key for key in first if all(key in found for found in others)]
    columns = {
        name: torch.tensor([found[key] for key in keys], dtype=torch.float64) for name, found in by_scorer.items()
    }
    return dict(zip(keys, normalised_sum(parts, columns).tolist(), strict=True)), reasons
