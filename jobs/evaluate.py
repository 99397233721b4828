"""Measure scorers on preference sets: `python -m jobs.evaluate --runs DIR --sets.NAME.path DIR`, also `ray job submit`.

Without --paper, an audit of the reward models of fit runs and of further scorers; with it, a table or figure of the
paper, made of fit runs. Run directory:
    config.yaml, versions.json      the resolved configuration
    cache/                          encoded images and scores (elsewhere with --cache, for several evaluations to share)
    dropped.jsonl                   malformed records and images without a score, and why (absent if there are none)
    table2.csv .md .png             with --paper table2, and accuracies.csv: every number in all conventions
    report.json report.md ...       without --paper, see dina_rl/evaluation/audit.py
On a cluster the cache and the sets must lie on storage that all nodes share.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from dina_rl.checkpoint import Input, write_text
from dina_rl.cli import fail, interruptible, load
from dina_rl.config import EvaluateRun
from dina_rl.config.keys import Mark, marked
from dina_rl.evaluation.audit import audit, audit_jobs, write_report
from dina_rl.evaluation.inputs import evaluation_inputs
from dina_rl.evaluation.named_scorers import NamedScorer, named_scorer
from dina_rl.evaluation.paper import Plan, plan_table
from dina_rl.evaluation.requests import Workers
from dina_rl.evaluation.results import (
    accuracy_table,
    export_table,
    measured,
    uncertainty_of,
    uncertainty_table,
    write_accuracies,
)
from dina_rl.evaluation.runs import notes_on, read_runs
from dina_rl.evaluation.score_store import ScoreStore, ScoringJob
from dina_rl.evaluation.sets import EvaluationSet, check_malformed, open_source, read_sets
from dina_rl.run_directory import run_directory
from dina_rl.runtime import configure_process
from jobs.submitted import check_results

DROPPED_FILE = "dropped.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What a run works on, read and checked."""

    scorers: tuple[NamedScorer, ...]  # of runs and others, by the names that results carry
    sets: tuple[EvaluationSet, ...]
    plan: Plan | None  # None: an audit
    notes: tuple[str, ...]  # on what the rows of the table are
    made_from: tuple[Input, ...]  # what a resumed run must find again


def preflight(run: EvaluateRun) -> Inputs:
    """All that can be wrong with the inputs, found before anything starts.

    Raises:
        ValueError: nothing to evaluate, or a set, run or scorer that cannot be read.
    """
    if not run.sets:
        raise ValueError("no set to evaluate on: give one as --sets.NAME.kind KIND --sets.NAME.path DIR")
    if not run.runs and not run.scorers:
        raise ValueError("nothing to evaluate: give --runs DIR ..., or --scorers.NAME.path DIR")
    runs = read_runs(run.runs)
    others = [named_scorer(name, config, buckets=run.buckets) for name, config in run.scorers.items()]
    fitted = [named_scorer(r.name, r.scorer, buckets=run.buckets, dataset=r.run.dataset) for r in runs]
    twice = {scorer.name for scorer in others} & {scorer.name for scorer in fitted}
    if twice:
        raise ValueError(f"scorers.{twice.pop()} has the name of a run; choose another")
    if run.training is not None:
        next(open_source(run.training).records(run.training.split), None)  # does it exist?
    return Inputs(
        scorers=(*others, *fitted),
        sets=tuple(read_sets(run.sets, seed=run.seed)),
        plan=None if run.paper is None else plan_table(run, others, runs),
        notes=() if run.paper is None else notes_on(runs),
        made_from=tuple(evaluation_inputs(run, runs)),
    )


def evaluate(run: EvaluateRun, inputs: Inputs, run_dir: Path) -> str:
    """The whole job after `preflight`; returns what to show.

    Raises:
        ValueError: a model that cannot be loaded, a set without comparisons, or too much of it broken.
    """
    malformed = [line for data in inputs.sets for line in _malformed(data)]
    write_dropped(malformed, run_dir / DROPPED_FILE)
    for data in inputs.sets:
        if data.unlabelled:
            print(f"set {data.name}: {data.unlabelled} records are unlabelled, no comparisons", flush=True)
    for data in inputs.sets:
        check_malformed(data, run.max_broken)
    store = ScoreStore(run)
    jobs = audit_jobs(run, inputs.scorers, inputs.sets) if inputs.plan is None else paper_jobs(run, inputs)
    missing = store.missing([job for _, job in jobs])
    if missing:
        with open_workers(run) as workers:
            store.fill(missing, workers)
    if (lines := dropped_lines(store, jobs)) != malformed:
        write_dropped(lines, run_dir / DROPPED_FILE)
    if inputs.plan is None:
        return write_report(audit(run, store, jobs), jobs, run_dir)
    assert run.paper is not None
    scored = [(scorer.name, job, view) for scorer, job in jobs for view in job.views]
    if run.paper == "table4":
        spreads = {(name, job.data.name, view): uncertainty_of(store, name, job, view) for name, job, view in scored}
        table = uncertainty_table(inputs.plan, spreads, inputs.sets, inputs.notes)
    else:
        results = [measured(run, store, name, job, view) for name, job, view in scored]
        write_accuracies(results, run_dir / "accuracies.csv")
        table = accuracy_table(inputs.plan, results, inputs.sets, run.convention, inputs.notes)
    return export_table(table, run_dir, run.paper)


def paper_jobs(run: EvaluateRun, inputs: Inputs) -> list[tuple[NamedScorer, ScoringJob]]:
    """What the plan's rows need, scorer by scorer."""
    assert inputs.plan is not None
    jobs = []
    for scorer in inputs.scorers:
        views = tuple(dict.fromkeys(entry.view for entry in inputs.plan.entries if entry.scorer == scorer.name))
        for data in inputs.sets:
            if run.paper == "table4":
                assert run.uncertainty is not None
                data = data.sample(run.uncertainty.pairs, run.seed)
            jobs.append((scorer, scorer.job(data, views)))
    return jobs


def dropped_lines(store: ScoreStore, jobs: Sequence[tuple[NamedScorer, ScoringJob]]) -> list[str]:
    """Malformed records and images without a score as lines of JSON, each once per set and reason."""
    lines: dict[str, None] = {}  # an ordered set
    for _, job in jobs:
        lines |= dict.fromkeys(_malformed(job.data))
        for view in job.views:
            for image in store.read(job, view).dropped:
                line = {"set": job.data.name, "record": image.record, "image": image.image} | asdict(image.problem)
                lines[json.dumps(line)] = None
    return list(lines)


def write_dropped(lines: Sequence[str], file: Path) -> None:
    """List what cannot be scored, and say so."""
    if lines:
        write_text(file, "\n".join(lines) + "\n")
        print(f"{len(lines)} malformed records and dropped images are listed in {file}", flush=True)


def _malformed(data: EvaluationSet) -> list[str]:
    return [json.dumps({"set": data.name} | asdict(record)) for record in data.skipped]


@contextmanager
def open_workers(run: EvaluateRun) -> Iterator[Workers]:
    """Workers in this process with `inline`, else a pool of Ray actors."""
    if run.inline:
        from dina_rl.evaluation.worker import InlineWorkers

        configure_process(run.workers.threads_per_actor)
        yield InlineWorkers()
        return
    from actors.evaluation import RayWorkers
    from jobs.cluster import start_ray

    start_ray(run.run_dir)
    workers = RayWorkers(run.workers)
    try:
        yield workers
    finally:
        workers.shutdown()


def main(argv: Sequence[str]) -> None:
    run = load(EvaluateRun, argv, program="python -m jobs.evaluate")
    check_results(run_dir=run.run_dir, cache=run.cache)
    try:
        inputs = preflight(run)
        told_anew = tuple(marked(EvaluateRun, Mark.REPORT))  # from the scores that are kept
        with (
            interruptible(run.run_dir),
            run_directory(
                run, run.run_dir, resume=run.resume, may_change=told_anew, inputs=inputs.made_from
            ) as run_dir,
        ):
            shown = evaluate(run, inputs, run_dir)
    except ValueError as error:
        fail(str(error))
    print(f"\n{shown}\nwritten to {run_dir}")


if __name__ == "__main__":
    main(sys.argv[1:])
