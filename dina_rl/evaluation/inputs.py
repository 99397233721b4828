"""What an evaluation is made from."""

from collections.abc import Sequence
from dataclasses import replace

from dina_rl.checkpoint import Input
from dina_rl.config import EvaluateRun, PictureScorerConfig
from dina_rl.evaluation.runs import FittedRun
from dina_rl.evaluation.sets import open_source
from dina_rl.fingerprint import pipeline_parts, records_parts, repository_parts
from dina_rl.reward.checkpoint import read_card
from dina_rl.reward.published import local_directory
from dina_rl.scorers.registry import image_scorer_inputs
from dina_rl.scoring import dina_pipeline


def evaluation_inputs(run: EvaluateRun, runs: Sequence[FittedRun]) -> list[Input]:
    """Inputs by the keys of the settings that name them, once they were found to be there."""
    inputs = []
    sets = {f"sets.{name}.path": data for name, data in run.sets.items()}
    if run.training is not None:
        sets["training.path"] = run.training
    for key, data in sets.items():
        inputs.append(Input(key=key, path=data.path, parts=records_parts(open_source(data).files(data.split))))
    for name, scorer in run.scorers.items():
        inputs += [replace(each, key=f"scorers.{name}.{each.key}") for each in _scorer_inputs(scorer)]
    of_runs = {
        f"{fit.name}: {each.key}: {part}": value
        for fit in runs
        for each in _scorer_inputs(fit.scorer)
        for part, value in each.parts.items()
    }
    if of_runs:
        inputs.append(Input(key="runs", path=" ".join(run.runs), parts=of_runs))
    return inputs


def _scorer_inputs(scorer: PictureScorerConfig) -> list[Input]:
    """A scorer's weights, and what they score on, by the keys of its section."""
    if scorer.of_images is not None:
        return image_scorer_inputs(scorer.of_images)
    pipeline = dina_pipeline(scorer, read_card(scorer.dina.location))
    weights = repository_parts(str(local_directory(scorer.dina.location)), "config.json")
    return [
        Input(key="path", path=scorer.dina.path, parts=weights),
        Input(key="pipeline", path=pipeline.path, parts=pipeline_parts(*pipeline.place)),
    ]
