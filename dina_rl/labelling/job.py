"""The whole of labelling: pictures, their scores, the scale, and the set that is written, in HPDv3's layout.

run_dir/<split>.json    {prompt, path1, path2, choice_dist: null, confidence: null, probability, score1, score2, model1,
                        model2}: path1 is the teacher's choice, `probability` (0.5 to 1) that it is the better one
run_dir/images/         the pictures that it names
run_dir/cache/          scores and encoded images (`evaluation/score_store.py`), with which a killed run goes on
run_dir/dropped.jsonl   what got no label, and why (absent if there is nothing)
run_dir/teacher.json    the card: who labelled, by which scale, and what came of every pair; written last

A run that is done is gone on with where a server gave no answer to something: it is asked again.
"""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from dina_rl.checkpoint import Input, write_json
from dina_rl.config import EvaluateRun, LabelRun, ServedScorerConfig, SetConfig
from dina_rl.data.sets.registry import open_set, prompts_of
from dina_rl.evaluation.calibration import calibrate
from dina_rl.evaluation.identity import Identities
from dina_rl.evaluation.inputs import evaluation_inputs
from dina_rl.evaluation.layout import needs_sizes
from dina_rl.evaluation.named_scorers import NamedScorer, named_scorer
from dina_rl.evaluation.requests import Workers
from dina_rl.evaluation.score_store import ScoreStore
from dina_rl.evaluation.sets import EvaluationSet, check_malformed, evaluation_set, read_set
from dina_rl.fingerprint import pipeline_parts, records_parts
from dina_rl.labelling.pairs import Pair, ToLabel, to_label
from dina_rl.labelling.samples import draw_samples, sample_records
from dina_rl.labelling.scale import likeliest_scale, median_scale, soft_label
from dina_rl.labelling.teacher import Scores, teacher_scores
from dina_rl.labelling.written import copy_pictures, write_dropped, write_records
from dina_rl.runtime import open_pipeline, sized
from dina_rl.textfiles import parse_json, read_text

CARD_FILE = "teacher.json"
DROPPED_FILE = "dropped.jsonl"
CALIBRATION_BINS = 10

OpenWorkers = Callable[[EvaluateRun], AbstractContextManager[Workers]]


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelInputs:
    """What a run works on, read and checked."""

    run: LabelRun  # with absolute places and all sizes given
    scorers: tuple[NamedScorer, ...]
    source: EvaluationSet | None  # whose pairs are labelled; None: samples are
    work: ToLabel
    validation: EvaluationSet | None
    malformed: tuple[str, ...]  # records and prompts that cannot be read, as lines of JSON
    made_from: tuple[Input, ...]

    def lines(self) -> list[str]:
        """What the run would do, for people."""
        scorers, run = ", ".join(scorer.name for scorer in self.scorers), self.run
        checked = 0 if self.validation is None else sum(len(record.images) for record in self.validation.records)
        return [
            f"pairs     {len(self.work.pairs)} in {len(self.work.records)} groups ({self.work.repeats} repeats and "
            f"{len(self.malformed)} malformed records left out)",
            *(
                []
                if run.prompts is None
                else [f"draw      {self.work.images} pictures, {run.prompts.num_steps} steps each"]
            ),
            f"score     {self.work.images} pictures and {checked} of validation, each by {scorers}",
            f"write     {run.run_dir / run.split}.json",
        ]


def label_inputs(run: LabelRun) -> LabelInputs:
    """All that can be wrong with the inputs, found before anything starts.

    Raises:
        ValueError: a set, prompt file, generator or scorer that cannot be read, or too much of a set malformed.
    """
    run = run.model_copy(update={"run_dir": run.run_dir.expanduser().resolve()})
    scorers = tuple(named_scorer(name, each.scorer) for name, each in run.scorers.items())
    validation = None if run.validation is None else read_set("validation", run.validation, seed=run.seed)
    inputs = [replace(each, key=each.key.removeprefix("sets.")) for each in evaluation_inputs(run.evaluation, [])]
    if validation is not None:
        check_malformed(validation, run.max_broken)
    if run.dataset is not None:
        source = read_set("dataset", run.dataset, seed=run.seed)
        check_malformed(source, run.max_broken)
        connect = all(each.bucketing is None or not needs_sizes(each.bucketing) for each in scorers)
        work = to_label(source.records, connect=connect)
        malformed = tuple(json.dumps(asdict(record)) for record in source.skipped)
    else:
        asked, source = run.prompts, None
        assert asked is not None, "LabelRun has one of the two"
        backbone = open_pipeline(run.pipeline)
        run = run.model_copy(update={"pipeline": sized(run.pipeline, backbone).absolute()})
        backbone.latent_shape(*run.pipeline.size)
        backbone.check("transformer", "vae", "text")
        prompt_set = open_set("prompts", asked.location)
        prompts, skipped = prompts_of(prompt_set, asked.split)
        if not prompts:
            raise ValueError(f"{asked.path} holds no prompts")
        if len(skipped) > run.max_broken * (len(prompts) + len(skipped)):
            raise ValueError(
                f"{len(skipped)} of {len(prompts) + len(skipped)} prompts of {asked.path} are malformed, more "
                f"than max_broken = {run.max_broken:g} allows; one of them: {skipped[0].reason}"
            )
        records = sample_records(list(dict.fromkeys(prompts)), asked, run.pipeline)
        work = replace(to_label(records, connect=True), records=tuple(records))
        malformed = tuple(json.dumps(asdict(record)) for record in skipped)
        files = records_parts(prompt_set.files(asked.split))
        inputs.append(Input(key="prompts.path", path=asked.path, parts=files))
        inputs.append(Input(key="pipeline.path", path=run.pipeline.path, parts=pipeline_parts(*run.pipeline.place)))
    return LabelInputs(
        run=run,
        scorers=scorers,
        source=source,
        work=work,
        validation=validation,
        malformed=malformed,
        made_from=tuple(inputs),
    )


def label(inputs: LabelInputs, run_dir: Path, open_workers: OpenWorkers) -> dict[str, object]:
    """The whole job after `label_inputs`; returns the card. What is there already is not made again.

    Raises:
        ValueError: a scorer that cannot be loaded, too many pairs without a score, or no scale.
        RunStopped: the generator's samples are not finite.
    """
    run, work = inputs.run, inputs.work
    if run.prompts is not None:
        draw_samples(work.records, run.prompts, run.pipeline, run_dir, seed=run.seed)
    pictures = SetConfig(path=str(run_dir), split=run.split) if inputs.source is None else inputs.source.config
    data = evaluation_set("pictures", pictures, list(work.records), (), usable=len(work.records))
    sets = [data] if inputs.validation is None else [data, inputs.validation]
    store = ScoreStore(run.evaluation)
    missing = store.missing([scorer.job(each, (scorer.main,)) for scorer in inputs.scorers for each in sets])
    if missing:
        with open_workers(run.evaluation) as workers:
            store.fill(missing, workers)
    scores, reasons = teacher_scores(store, inputs.scorers, run.scorers, data)
    failed = [pair for pair in work.pairs if any((pair.group, image) not in scores for image in pair.images)]
    write_dropped(run_dir / DROPPED_FILE, inputs.malformed, failed, reasons)
    if len(failed) > run.max_broken * len(work.pairs):
        raise ValueError(
            f"{len(failed)} of {len(work.pairs)} pairs have no score, more than max_broken = {run.max_broken:g} "
            f"allows; {run_dir / DROPPED_FILE} says why"
        )
    lost = set(failed)
    pairs = [pair for pair in work.pairs if pair not in lost]
    margins = torch.tensor([_margin(scores, pair) for pair in pairs], dtype=torch.float64)
    scale, found = _scale(store, inputs, margins)
    labels = zip(pairs, soft_label(margins, scale).tolist(), margins.tolist(), strict=True)
    untied = [(pair, probability) for pair, probability, margin in labels if margin]
    source = None if inputs.source is None else inputs.source.source
    names = {} if source is None else copy_pictures(source, [pair for pair, _ in untied], run_dir, among=work.pairs)
    write_records(run_dir / f"{run.split}.json", untied, scores, names)
    card = {
        "scorers": {
            name: each.model_dump(mode="json", exclude_none=True) | {"identity": Identities().of_scorer(named.config)}
            for (name, each), named in zip(run.scorers.items(), inputs.scorers, strict=True)
        },
        "scale": scale,
        **found,
        "pairs": len(untied),
        "ties": len(pairs) - len(untied),
        "failed": len(failed),
        "repeats": work.repeats,
        "malformed": len(inputs.malformed),
        "pictures": work.images,
        "median_margin": margins.abs().median().item(),
        "mean_probability": sum(max(p, 1 - p) for _, p in untied) / max(1, len(untied)),
    }
    write_json(run_dir / CARD_FILE, card)
    return card


def is_finished(run: LabelRun, run_dir: Path) -> bool:
    """Whether the labelling in a directory is done, and no server could be asked again for a score that failed."""
    file = run_dir / CARD_FILE
    if not file.is_file():
        return False
    served = any(isinstance(each.scorer.of_images, ServedScorerConfig) for each in run.scorers.values())
    return not (served and parse_json(read_text(file))["failed"])


def _margin(scores: Scores, pair: Pair) -> float:
    one, other = (scores[pair.group, image] for image in pair.images)
    return one - other


def _scale(store: ScoreStore, inputs: LabelInputs, margins: torch.Tensor) -> tuple[float, dict[str, object]]:
    """(the scale, what the card says of where it is from)."""
    run = inputs.run
    if run.scale is not None:
        return run.scale, {"scale_from": "given"}
    if inputs.validation is None:
        scale = median_scale(margins, run.median_confidence)
        return scale, {"scale_from": f"median margin at probability {run.median_confidence:g}"}
    scores, _ = teacher_scores(store, inputs.scorers, run.scorers, inputs.validation)
    labelled = [
        scores[record.index, record.images[better]] - scores[record.index, record.images[worse]]
        for record in inputs.validation.records
        for better, worse in record.ordered_pairs()
        if all((record.index, record.images[position]) in scores for position in (better, worse))
    ]
    if not labelled:
        raise ValueError(f"the teacher has no scores of {inputs.validation.config.path}: no scale can be fitted to it")
    of_labels = torch.tensor(labelled, dtype=torch.float64)
    scale = likeliest_scale(of_labels)
    reliability = calibrate(soft_label(of_labels, scale), bins=CALIBRATION_BINS)
    found = {
        "path": inputs.validation.config.path,
        "split": inputs.validation.config.split,
        "pairs": len(labelled),
        "accuracy": (of_labels > 0).double().mean().item(),
        "ece": reliability.ece,
        "brier": reliability.brier,
    }
    return scale, {"scale_from": "likelihood of validation's labels", "validation": found}
