"""The whole of labelling: pictures, their scores, the scale, and the set that is written, in HPDv3's layout.

run_dir/<split>.json    {prompt, path1, path2, choice_dist: null, confidence: null, probability, score1, score2, model1,
                        model2}: path1 is the teacher's choice, `probability` (0.5 to 1) that it is the better one
run_dir/images/         the pictures that it names
run_dir/cache/          scores and encoded images (`evaluation/score_store.py`), with which a killed run goes on
run_dir/dropped.jsonl   what got no label, and why (absent if there is nothing)
run_dir/teacher.json    the card: who labelled, by which scale, and what came of every pair; written last
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from dina_rl.checkpoint import Input, replaced_file, write_bytes, write_json, write_text
from dina_rl.config import EvaluateRun, LabelRun, SetConfig
from dina_rl.data.images import suffixes
from dina_rl.data.sets.records import PreferenceSet
from dina_rl.data.sets.registry import open_set, prompts_of
from dina_rl.evaluation.calibration import calibrate
from dina_rl.evaluation.identity import Identities
from dina_rl.evaluation.inputs import evaluation_inputs
from dina_rl.evaluation.layout import needs_sizes
from dina_rl.evaluation.named_scorers import NamedScorer, named_scorer
from dina_rl.evaluation.requests import Workers
from dina_rl.evaluation.score_store import ScoreStore, ScoringJob
from dina_rl.evaluation.sets import EvaluationSet, check_malformed, evaluation_set, read_set
from dina_rl.fingerprint import pipeline_parts, records_parts
from dina_rl.labelling.pairs import Pair, ToLabel, to_label
from dina_rl.labelling.samples import IMAGES, draw_samples, sample_records
from dina_rl.labelling.scale import likeliest_scale, median_scale, soft_label
from dina_rl.runtime import open_pipeline, sized
from dina_rl.scorers.mixture import normalised_sum

CARD_FILE = "teacher.json"
DROPPED_FILE = "dropped.jsonl"
CALIBRATION_BINS = 10

OpenWorkers = Callable[[EvaluateRun], AbstractContextManager[Workers]]
Scores = dict[tuple[int, str], float]
"""(`PreferenceRecord.index`, image) -> the teacher's score, of pictures that have one."""


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
        assert run.prompts is not None
        source = None
        backbone = open_pipeline(run.pipeline)
        run = run.model_copy(update={"pipeline": sized(run.pipeline, backbone).absolute()})
        backbone.latent_shape(*backbone.image_size if run.pipeline.height is None else run.pipeline.size)
        backbone.check("transformer", "vae", "text")
        prompt_set = open_set("prompts", run.prompts.location)
        prompts, skipped = prompts_of(prompt_set, run.prompts.split)
        if not prompts:
            raise ValueError(f"{run.prompts.path} holds no prompts")
        if len(skipped) > run.max_broken * (len(prompts) + len(skipped)):
            raise ValueError(
                f"{len(skipped)} of {len(prompts) + len(skipped)} prompts of {run.prompts.path} are malformed, more "
                f"than max_broken = {run.max_broken:g} allows; one of them: {skipped[0].reason}"
            )
        records = sample_records(list(dict.fromkeys(prompts)), run.prompts, run.pipeline)
        work = replace(to_label(records, connect=True), records=tuple(records))
        malformed = tuple(json.dumps(asdict(record)) for record in skipped)
        files = records_parts(prompt_set.files(run.prompts.split))
        inputs.append(Input(key="prompts.path", path=run.prompts.path, parts=files))
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
    scores, reasons = teacher_scores(store, inputs, data)
    failed = [pair for pair in work.pairs if any((pair.group, image) not in scores for image in pair.images)]
    _write_dropped(run_dir / DROPPED_FILE, inputs.malformed, failed, reasons)
    if len(failed) > run.max_broken * len(work.pairs):
        raise ValueError(
            f"{len(failed)} of {len(work.pairs)} pairs have no score, more than max_broken = {run.max_broken:g} "
            f"allows; {run_dir / DROPPED_FILE} says why"
        )
    lost = set(failed)
    pairs = [pair for pair in work.pairs if pair not in lost]
    margins = torch.tensor([_margin(scores, pair) for pair in pairs], dtype=torch.float64)
    scale, found = _scale(store, inputs, margins)
    untied = [(pair, probability) for pair, probability in zip(pairs, soft_label(margins, scale).tolist(), strict=True)
              if _margin(scores, pair)]  # fmt: skip
    source = None if inputs.source is None else inputs.source.source
    names = {} if source is None else _copy_pictures(source, [pair for pair, _ in untied], run_dir)
    _write_records(run_dir / f"{run.split}.json", untied, scores, names)
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


def teacher_scores(store: ScoreStore, inputs: LabelInputs, data: EvaluationSet) -> tuple[Scores, dict[str, str]]:
    """(the weighted sum for every picture that all scorers have a finite score of, image -> why another has none)."""
    by_scorer: dict[str, Scores] = {}
    reasons: dict[str, str] = {}
    for scorer in inputs.scorers:
        job: ScoringJob = scorer.job(data, (scorer.main,))
        kept = store.read(job, scorer.main)
        reasons |= {each.image: f"{scorer.name}: {each.problem.reason}" for each in kept.dropped}
        by_scorer[scorer.name] = found = {}
        for record in kept.records:
            values = kept.scores[record.index][0].tolist()
            found |= {(record.index, image): value for image, value in zip(record.images, values, strict=True)}
            reasons |= {
                image: f"{scorer.name}: its score is {value}"
                for image, value in zip(record.images, values, strict=True)
                if value - value != 0
            }
    keys = [key for key in next(iter(by_scorer.values())) if all(key in found for found in by_scorer.values())]
    columns = {
        name: torch.tensor([found[key] for key in keys], dtype=torch.float64) for name, found in by_scorer.items()
    }
    total = normalised_sum(inputs.run.scorers, columns).tolist()
    return {key: value for key, value in zip(keys, total, strict=True) if value - value == 0}, reasons


def _margin(scores: Mapping[tuple[int, str], float], pair: Pair) -> float:
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
    scores, _ = teacher_scores(store, inputs, inputs.validation)
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


def _write_dropped(file: Path, malformed: Sequence[str], failed: Sequence[Pair], reasons: Mapping[str, str]) -> None:
    """List what gets no label, and say so."""
    lines = list(malformed)
    for pair in failed:
        why = "; ".join(f"{image}: {reasons[image]}" for image in pair.images if image in reasons)
        lines.append(json.dumps({"prompt": pair.prompt, "images": pair.images, "reason": why or "no score"}))
    if lines:
        write_text(file, "\n".join(lines) + "\n")
        print(f"{len(malformed)} malformed records and {len(failed)} pairs without a score: {file}", flush=True)
    else:
        file.unlink(missing_ok=True)


def _copy_pictures(source: PreferenceSet, pairs: Sequence[Pair], run_dir: Path) -> dict[str, str]:
    """Copy the set's pictures, as they are, to where the labelled set may name them; returns key -> path."""
    names: dict[str, str] = {}
    for key in dict.fromkeys(image for pair in pairs for image in pair.images):
        suffix = Path(key).suffix.lower()
        number = len(names)
        names[key] = f"{IMAGES}/{number // 1000:04d}/{number:07d}{suffix if suffix in suffixes() else ''}"
    for key, name in tqdm(names.items(), desc="copy", unit="img"):
        if not (run_dir / name).is_file():
            write_bytes(run_dir / name, source.image(key))
    return names


def _write_records(
    file: Path, pairs: Sequence[tuple[Pair, float]], scores: Mapping[tuple[int, str], float], names: Mapping[str, str]
) -> None:
    def lines() -> Iterator[str]:
        for pair, probability in pairs:
            order = (0, 1) if probability >= 0.5 else (1, 0)
            first, second = (pair.images[side] for side in order)
            record: dict[str, object] = {
                "prompt": pair.prompt,
                "path1": names.get(first, first),
                "path2": names.get(second, second),
                "choice_dist": None,
                "confidence": None,
                "probability": max(probability, 1 - probability),
                "score1": scores[pair.group, first],
                "score2": scores[pair.group, second],
            }
            if pair.models is not None:
                record |= {"model1": pair.models[order[0]], "model2": pair.models[order[1]]}
            yield json.dumps(record)

    with replaced_file(file) as temporary, temporary.open("w", encoding="utf-8") as stream:
        for number, line in enumerate(lines()):
            stream.write(("[\n" if number == 0 else ",\n") + line)
        stream.write("\n]\n" if pairs else "[]\n")
