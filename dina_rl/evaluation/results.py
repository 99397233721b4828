"""From scores to numbers: accuracies with intervals, and the paper's tables made of them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from dina_rl.checkpoint import write_text
from dina_rl.config import EvaluateRun
from dina_rl.evaluation.accuracy import (
    CONVENTIONS,
    Accuracy,
    Comparisons,
    Convention,
    Interval,
    bootstrap,
    compare,
    measure,
)
from dina_rl.evaluation.figures import plot_lines, plot_table
from dina_rl.evaluation.paper import Entry, Plan
from dina_rl.evaluation.requests import View
from dina_rl.evaluation.score_store import ScoreStore, ScoringJob, SetScores
from dina_rl.evaluation.sets import EvaluationSet
from dina_rl.evaluation.tables import Cell, Row, Table, markdown, write_csv, write_rows
from dina_rl.evaluation.uncertainty import Uncertainty, uncertainty

AVERAGE = "Avg"
UNCERTAINTY_COLUMNS = {"VR": "variation_ratio", "mean margin": "mean_margin", "Var(r)": "score_variance"}


@dataclass(frozen=True, slots=True, kw_only=True)
class SetAccuracy:
    """A scorer's accuracy on a set in a view."""

    scorer: str
    data: str
    view: View
    accuracy: Accuracy
    intervals: Mapping[Convention, Interval]
    malformed: int  # records that could not be read
    dropped_images: int  # images without a score
    dropped_pairs: int  # comparisons that they take part in

    def cell(self, convention: Convention) -> Cell:
        """The accuracy in one convention, with its interval."""
        interval = self.intervals[convention]
        return Cell(mean=getattr(self.accuracy, convention), low=interval.low, high=interval.high)

    def line(self) -> dict[str, object]:
        """Everything, flat: a line of `accuracies.csv`."""
        ends = {f"{name}_{end}": getattr(self.intervals[name], end) for name in CONVENTIONS for end in ("low", "high")}
        return {
            "scorer": self.scorer,
            "set": self.data,
            "view": self.view.label,
            **asdict(self.accuracy),
            **ends,
            "malformed": self.malformed,
            "dropped_images": self.dropped_images,
            "dropped_pairs": self.dropped_pairs,
        }


def comparisons_of(scores: SetScores) -> Comparisons:
    """Comparisons of the first noise draw."""
    return compare(scores.records, scores.draw(0))


def measured(run: EvaluateRun, store: ScoreStore, scorer: str, job: ScoringJob, view: View) -> SetAccuracy:
    """Accuracy of the kept scores of a job.

    Raises:
        ValueError: no comparison is left, or more of the set is broken than `max_broken` allows.
    """
    scores = store.read(job, view)
    data = job.data
    broken = {image.record: image.problem.reason for image in scores.dropped if image.problem.broken}
    # Records are looked at in a sample perhaps, malformed ones in the whole split: two shares, not one sum of counts.
    unreadable = len(broken) / len(data.records)
    if data.malformed_share + (1 - data.malformed_share) * unreadable > run.max_broken:
        first = next(iter(broken.values()), data.skipped[0].reason if data.skipped else "")
        raise ValueError(
            f"set {data.name}: {len(data.skipped)} of {data.usable + len(data.skipped)} records are malformed and "
            f"{len(broken)} of the {len(data.records)} scored have unreadable images, more than "
            f"max_broken = {run.max_broken:g} allows; one of them: {first}"
        )
    comparisons = comparisons_of(scores)
    return SetAccuracy(
        scorer=scorer,
        data=data.name,
        view=view,
        accuracy=measure(comparisons),
        intervals=bootstrap(
            comparisons, resamples=run.bootstrap.resamples, confidence=run.bootstrap.confidence, seed=run.seed
        ),
        malformed=len(data.skipped),
        dropped_images=len(scores.dropped),
        dropped_pairs=scores.dropped_pairs,
    )


def uncertainty_of(store: ScoreStore, scorer: str, job: ScoringJob, view: View) -> Uncertainty:
    """Appendix A's numbers of the kept, repeated scores of a job; raises ValueError like `uncertainty`."""
    scores = store.read(job, view)
    draws = [compare(scores.records, scores.draw(number)).untied().margins for number in range(view.draws)]
    images = [scores.scores[record.index] for record in scores.records if record.ordered_pairs()]
    try:
        return uncertainty(torch.stack(draws), torch.cat([torch.empty(view.draws, 0), *images], 1))
    except ValueError as error:
        raise ValueError(f"uncertainty of {scorer} on {job.data.name} at {view.label}: {error}") from error


def write_accuracies(results: Sequence[SetAccuracy], path: Path) -> None:
    """All conventions side by side, one line per scorer, set and view."""
    lines = [result.line() for result in results]
    write_rows(path, list(lines[0]), [list(line.values()) for line in lines])


def accuracy_table(
    plan: Plan,
    results: Sequence[SetAccuracy],
    sets: Sequence[EvaluationSet],
    convention: Convention,
    notes: Sequence[str],
) -> Table:
    """Rows of a plan with one column per set and their average, which is taken per seed."""
    found = {(result.scorer, result.data, result.view): result for result in results}
    names = [data.name for data in sets]
    rows = []
    for labels, entries in rows_of(plan).items():
        cells = {}
        for name in names:
            seeds = [found[entry.scorer, name, entry.view].cell(convention) for entry in entries]
            cells[name] = Cell.over_seeds([cell.mean for cell in seeds], low=seeds[0].low, high=seeds[0].high)
        averages = [  # a convention is the name of its field, which `Convention` spells out
            sum(getattr(found[entry.scorer, name, entry.view].accuracy, convention) for name in names) / len(names)
            for entry in entries
        ]
        cells[AVERAGE] = Cell.over_seeds(averages)
        rows.append(Row(labels=labels, cells=cells))
    columns = (*names, AVERAGE) if len(names) > 1 else tuple(names)
    notes = (f"Accuracy: {convention}.", *notes, *_biases(results))
    return Table(title=plan.title, labels=plan.labels, columns=columns, rows=tuple(rows), percent=True, notes=notes)


def _biases(results: Sequence[SetAccuracy]) -> list[str]:
    """A note on every judge, who is asked in both orders."""
    return [
        f"{result.scorer} on {result.data}: {100 * result.accuracy.position_bias:.2f} percent of its verdicts follow "
        "the position of the images, not the images."
        for result in results
        if result.accuracy.position_bias is not None
    ]


def uncertainty_table(
    plan: Plan,
    results: Mapping[tuple[str, str, View], Uncertainty],
    sets: Sequence[EvaluationSet],
    notes: Sequence[str],
) -> Table:
    """Rows of a plan with VR, mean margin and Var(r) of each set as columns.

    Args:
        results: by (scorer, set, view).
    """
    rows, columns = [], []
    for labels, entries in rows_of(plan).items():
        cells = {}
        for data in sets:
            for title, name in UNCERTAINTY_COLUMNS.items():
                # The columns' names are the result's own fields.
                found = [getattr(results[entry.scorer, data.name, entry.view], name) for entry in entries]
                values = [value for value in found if value is not None]
                cells[f"{data.name}: {title}"] = Cell.over_seeds(values) if values else None
        columns = list(cells)
        rows.append(Row(labels=labels, cells=cells))
    one = next(iter(results.values()))
    failed = sum(result.failed_pairs for result in results.values())
    if failed:
        notes = (f"{failed} comparisons with a score that is not a number are left out.", *notes)
    notes = (f"{one.draws} noise draws.", *notes)
    return Table(
        title=plan.title, labels=plan.labels, columns=tuple(columns), rows=tuple(rows), percent=False, notes=notes
    )


def rows_of(plan: Plan) -> dict[tuple[str, ...], list[Entry]]:
    """Entries by row, in order; those of one row are its seeds."""
    rows: dict[tuple[str, ...], list[Entry]] = {}
    for entry in plan.entries:
        rows.setdefault(entry.labels, []).append(entry)
    return rows


def export_table(table: Table, directory: Path, name: str) -> str:
    """CSV, Markdown and PNG of a table; returns the Markdown."""
    text = markdown(table)
    write_csv(table, directory / f"{name}.csv")
    write_text(directory / f"{name}.md", text)
    if "t" in table.labels:
        plot_lines(_over_t(table), directory / f"{name}.png", title=table.title, percent=table.percent)
    else:
        plot_table(table, directory / f"{name}.png")
    return text


def _over_t(table: Table) -> dict[str, dict[str, list[tuple[float, Cell]]]]:
    """A table with a label column t as lines: column -> the other labels -> (t, value)."""
    place = table.labels.index("t")
    panels: dict[str, dict[str, list[tuple[float, Cell]]]] = {column: {} for column in table.columns}
    for row in table.rows:
        name = ", ".join(label for position, label in enumerate(row.labels) if position != place and label)
        for column, cell in row.cells.items():
            if column in panels and cell is not None:
                panels[column].setdefault(name, []).append((float(row.labels[place]), cell))
    return panels
