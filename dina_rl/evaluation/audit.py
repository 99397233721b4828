"""The audit of scorers on sets: everything that is measured, in one report.

report.json         all numbers
report.md           the same to read
accuracies.csv      every scorer, set and view in all conventions, with N, ties, drops and intervals
breakdown.csv       by pair of generators and by category, where the set has them
accuracy.png sweep.png reliability.png
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from dina_rl.checkpoint import write_json, write_text
from dina_rl.config import EvaluateRun
from dina_rl.data.sets.records import PreferenceRecord
from dina_rl.evaluation.accuracy import CONVENTIONS, Comparisons, bootstrap, by_category, by_models, measure
from dina_rl.evaluation.calibration import Calibration, calibrate, thurstone_probability
from dina_rl.evaluation.figures import plot_lines, plot_reliability, plot_table
from dina_rl.evaluation.leak import Leak, find_leak, fingerprints
from dina_rl.evaluation.named_scorers import NamedScorer
from dina_rl.evaluation.requests import View
from dina_rl.evaluation.results import SetAccuracy, comparisons_of, measured, uncertainty_of, write_accuracies
from dina_rl.evaluation.score_store import ScoreStore, ScoringJob
from dina_rl.evaluation.sets import EvaluationSet, open_source
from dina_rl.evaluation.tables import Cell, Row, Table, markdown, shown, write_rows
from dina_rl.evaluation.uncertainty import Uncertainty
from dina_rl.markdown import grid
from dina_rl.reward.held_out import GOLDEN_FILE, label_ceiling
from dina_rl.textfiles import read_record


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One group of a breakdown."""

    scorer: str
    data: str
    by: str  # models or category
    group: str
    pairs: int
    ties: int
    micro: float
    low: float
    high: float

    def line(self) -> dict[str, object]:
        """A line of `breakdown.csv`."""
        values = asdict(self)
        return {"scorer": values.pop("scorer"), "set": values.pop("data"), **values}


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What an audit found. Keys of the mappings are (scorer, set, view's label) unless they say otherwise."""

    accuracies: tuple[SetAccuracy, ...]
    calibrations: Mapping[tuple[str, str, str], Calibration]
    uncertainties: Mapping[tuple[str, str, str], Uncertainty]
    breakdown: tuple[Part, ...]
    leaks: Mapping[str, Leak]  # by set
    ceilings: Mapping[str, float]  # by set


def audit_jobs(
    run: EvaluateRun, scorers: Sequence[NamedScorer], sets: Sequence[EvaluationSet]
) -> list[tuple[NamedScorer, ScoringJob]]:
    """What has to be scored: on each set all views of the sweep, and on a sample of it the repeated ones."""
    jobs = []
    for scorer in scorers:
        for data in sets:
            jobs.append((scorer, scorer.job(data, _views(run, scorer))))
            repeated = _repeated(run, scorer)
            if run.uncertainty is not None and repeated:
                sample = data.sample(run.uncertainty.pairs, run.seed)
                jobs.append((scorer, scorer.job(sample, repeated)))
    return jobs


def audit(run: EvaluateRun, store: ScoreStore, jobs: Sequence[tuple[NamedScorer, ScoringJob]]) -> Report:
    """Measure the kept scores of `audit_jobs`.

    Raises:
        ValueError: a set without comparisons, or too much of it broken.
    """
    accuracies, calibrations, uncertainties, breakdown = [], {}, {}, []
    for scorer, job in jobs:
        for view in job.views:
            key = scorer.name, job.data.name, view.label
            if view.draws > 1:
                uncertainties[key] = uncertainty_of(store, scorer.name, job, view)
                continue
            accuracies.append(measured(run, store, scorer.name, job, view))
            if view not in (scorer.main, scorer.ensemble):
                continue
            comparisons = comparisons_of(store.read(job, view))
            if scorer.thurstone is not None:
                margins = comparisons.untied().margins
                probability = thurstone_probability(margins, view.levels, scorer.thurstone)
                calibrations[key] = calibrate(probability, bins=run.bins)
            if view == scorer.main:
                breakdown += _breakdown(run, scorer.name, job.data.name, comparisons)
    sets = {job.data.name: job.data.whole for _, job in jobs}
    return Report(
        accuracies=tuple(accuracies),
        calibrations=calibrations,
        uncertainties=uncertainties,
        breakdown=tuple(breakdown),
        leaks=_leaks(run, sets),
        ceilings={name: ceiling for name, data in sets.items() if (ceiling := _ceiling(data)) is not None},
    )


def write_report(report: Report, jobs: Sequence[tuple[NamedScorer, ScoringJob]], directory: Path) -> str:
    """Write all files; returns the short table for the console."""
    main = _main_table(report, jobs)
    write_json(directory / "report.json", _as_json(report))
    write_text(directory / "report.md", _as_markdown(report, main))
    write_accuracies(report.accuracies, directory / "accuracies.csv")
    if report.breakdown:
        lines = [part.line() for part in report.breakdown]
        write_rows(directory / "breakdown.csv", list(lines[0]), [list(line.values()) for line in lines])
    plot_table(main, directory / "accuracy.png")
    if panels := _sweep(report):
        plot_lines(panels, directory / "sweep.png", title="accuracy over the noise level", percent=True)
    if report.calibrations:
        curves = {", ".join(key): curve for key, curve in report.calibrations.items()}
        plot_reliability(curves, directory / "reliability.png")
    return shown(main)


def _views(run: EvaluateRun, scorer: NamedScorer) -> tuple[View, ...]:
    sweep = [View(levels=(level,)) for level in run.levels] if scorer.thurstone is not None else []
    own = [scorer.main] + ([scorer.ensemble] if scorer.ensemble is not None else [])
    return tuple(dict.fromkeys([*own, *sweep]))


def _repeated(run: EvaluateRun, scorer: NamedScorer) -> tuple[View, ...]:
    if run.uncertainty is None or scorer.thurstone is None:
        return ()
    return tuple(View(levels=(level,), draws=run.uncertainty.draws) for level in run.uncertainty.levels)


def _breakdown(run: EvaluateRun, scorer: str, data: str, comparisons: Comparisons) -> list[Part]:
    """Accuracy of every part in which people decide something."""
    parts = []
    for by, groups in (("models", by_models(comparisons)), ("category", by_category(comparisons))):
        for group, its in groups.items():
            if its.tied.all():
                continue
            accuracy = measure(its)
            interval = bootstrap(
                its, resamples=run.bootstrap.resamples, confidence=run.bootstrap.confidence, seed=run.seed
            )["micro"]
            parts.append(
                Part(
                    scorer=scorer,
                    data=data,
                    by=by,
                    group=group,
                    pairs=accuracy.pairs,
                    ties=accuracy.ties,
                    micro=accuracy.micro,
                    low=interval.low,
                    high=interval.high,
                )
            )
    return parts


def _leaks(run: EvaluateRun, sets: Mapping[str, EvaluationSet]) -> dict[str, Leak]:
    if run.training is None:
        return {}
    training = open_source(run.training)
    records = (each for each in training.records(run.training.split) if isinstance(each, PreferenceRecord))
    known = fingerprints(training, tqdm(records, desc="leak check", unit="record"))
    return {name: find_leak(data.source, data.records, known) for name, data in sets.items()}


def _ceiling(data: EvaluationSet) -> float | None:
    """Best possible accuracy where golden scores lie beside the set (miniature world), else None."""
    file = data.config.location / GOLDEN_FILE
    if not file.is_file():
        return None
    pairs = [(r.images[better], r.images[worse]) for r in data.records for better, worse in r.ordered_pairs()]
    return label_ceiling(read_record(dict[str, float], file), pairs)


def _main_table(report: Report, jobs: Sequence[tuple[NamedScorer, ScoringJob]]) -> Table:
    """Scorers at their own views: rows scorer and view, columns sets."""
    found = {(result.scorer, result.data, result.view): result for result in report.accuracies}
    sets = tuple(dict.fromkeys(job.data.name for _, job in jobs))
    rows = []
    for scorer in dict.fromkeys(scorer for scorer, _ in jobs):
        for view in (scorer.main, scorer.ensemble):
            if view is not None:
                cells = {name: found[scorer.name, name, view].cell("micro") for name in sets}
                rows.append(Row(labels=(scorer.name, view.label), cells=cells))
    return Table(
        title="Pairwise accuracy (micro, without people's ties)",
        labels=("scorer", "view"),
        columns=sets,
        rows=tuple(rows),
        percent=True,
    )


def _sweep(report: Report) -> dict[str, dict[str, list[tuple[float, Cell]]]]:
    """Set -> scorer -> accuracy at every single level, in ascending order."""
    panels: dict[str, dict[str, list[tuple[float, Cell]]]] = {}
    single = [result for result in report.accuracies if len(result.view.levels) == 1]
    for result in sorted(single, key=lambda result: result.view.levels):
        lines = panels.setdefault(result.data, {})
        lines.setdefault(result.scorer, []).append((result.view.levels[0], result.cell("micro")))
    return panels


def _as_json(report: Report) -> dict[str, object]:
    def listed(values: Mapping[tuple[str, str, str], Calibration | Uncertainty]) -> list[dict[str, object]]:
        names = ("scorer", "set", "view")
        return [{**dict(zip(names, key, strict=True)), **asdict(value)} for key, value in values.items()]

    return {
        "accuracy": [result.line() for result in report.accuracies],
        "ceiling": dict(report.ceilings),
        "calibration": listed(report.calibrations),
        "uncertainty": listed(report.uncertainties),
        "breakdown": [part.line() for part in report.breakdown],
        "leak": {name: asdict(leak) for name, leak in report.leaks.items()},
    }


def _as_markdown(report: Report, main: Table) -> str:
    sections = [markdown(main).strip()]
    if report.ceilings:
        ceilings = ", ".join(f"{name} {100 * value:.2f}" for name, value in report.ceilings.items())
        sections.append(f"The labels' own noise leaves at most (percent): {ceilings}.")
    conventions = [
        [r.scorer, r.data, r.view.label, *(f"{100 * getattr(r.accuracy, name):.2f}" for name in CONVENTIONS),
         *map(str, (r.accuracy.pairs, r.accuracy.ties, r.accuracy.predicted_ties, r.accuracy.failed, r.accuracy.prompts,
                    r.malformed, r.dropped_images, r.dropped_pairs)), _bias(r)]
        for r in report.accuracies
    ]  # fmt: skip
    header = ["scorer", "set", "view", *CONVENTIONS, "N", "ties", "predicted ties", "failed", "prompts", "malformed",
              "dropped images", "dropped pairs", "position bias"]  # fmt: skip
    if all(r.accuracy.position_bias is None for r in report.accuracies):  # no judge has any
        header, conventions = header[:-1], [line[:-1] for line in conventions]
    sections.append("## All conventions (percent)\n\n" + grid(header, conventions))
    if report.calibrations:
        lines = [
            [*key, *(_plain(value, ".4f") for value in (c.ece, c.brier)), str(sum(c.counts)), str(c.failed)]
            for key, c in report.calibrations.items()
        ]
        header = ["scorer", "set", "view", "ECE", "Brier", "N", "failed"]
        bins = len(next(iter(report.calibrations.values())).counts)
        sections.append(
            f"## Calibration of Eq. 8\n\n{grid(header, lines)}\n\n"
            f"{bins} bins of equal width over the predicted winner's probability [0.5, 1]."
        )
    if report.uncertainties:
        lines = [
            [*key, *(_plain(value, ".3g") for value in (u.variation_ratio, u.mean_margin, u.score_variance)),
             str(u.pairs), str(u.failed_pairs)]
            for key, u in report.uncertainties.items()
        ]  # fmt: skip
        header = ["scorer", "set", "view", "VR", "mean margin", "Var(r)", "pairs", "failed"]
        draws = next(iter(report.uncertainties.values())).draws
        sections.append(f"## Uncertainty over {draws} noise draws\n\n{grid(header, lines)}")
    if report.breakdown:
        lines = [
            [p.scorer, p.data, p.by, p.group, f"{100 * p.micro:.2f} [{100 * p.low:.2f}, {100 * p.high:.2f}]",
             str(p.pairs), str(p.ties)]
            for p in report.breakdown
        ]  # fmt: skip
        header = ["scorer", "set", "by", "group", "micro", "N", "ties"]
        sections.append("## Breakdown\n\n" + grid(header, lines))
    if report.leaks:
        lines = [
            [name, f"{k.shared_prompts} of {k.prompts}", f"{k.shared_images} of {k.images}",
             f"{k.records_with_shared_prompt} by prompt, {k.records_with_shared_image} by image, of {k.records}",
             str(k.unreadable_images)]
            for name, k in report.leaks.items()
        ]  # fmt: skip
        header = ["set", "prompts also in training", "images also in training", "records", "unreadable images"]
        sections.append("## Leak check\n\n" + grid(header, lines))
    return "\n\n".join(sections) + "\n"


def _bias(result: SetAccuracy) -> str:
    """A judge's position bias in percent, or an empty cell."""
    bias = result.accuracy.position_bias
    return _plain(None if bias is None else 100 * bias, ".2f")


def _plain(value: float | None, form: str) -> str:
    """A number, or an empty cell."""
    return "" if value is None else format(value, form)
