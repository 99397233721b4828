"""What an evaluation is made from."""

from collections.abc import Sequence

from dina_rl.checkpoint import Input
from dina_rl.config import EvaluateRun, PictureScorerConfig
from dina_rl.evaluation.runs import FittedRun
from dina_rl.evaluation.sets import open_source
from dina_rl.fingerprint import Parts, pipeline_parts, records_parts, repository_parts
from dina_rl.reward.checkpoint import read_card
from dina_rl.reward.published import local_directory
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
        path = scorer.dina.path if scorer.kind == "dina" else scorer.clip.path
        inputs.append(Input(key=f"scorers.{name}.path", path=path, parts=_scorer_parts(scorer)))
    of_runs = {f"{fit.name}: {part}": value for fit in runs for part, value in _scorer_parts(fit.scorer).items()}
    if of_runs:
        inputs.append(Input(key="runs", path=" ".join(run.runs), parts=of_runs))
    return inputs


def _scorer_parts(scorer: PictureScorerConfig) -> Parts:
    """A scorer's weights, and what they score on."""
    if scorer.kind != "dina":
        processor = repository_parts(scorer.clip.processor, "preprocessor_config.json")
        return {**repository_parts(scorer.clip.path, "config.json"), "processor": processor["content"]}
    pipeline = dina_pipeline(scorer, read_card(scorer.dina.location))
    weights = repository_parts(str(local_directory(scorer.dina.location)), "config.json")
    return {**weights, **pipeline_parts(pipeline.location)}
