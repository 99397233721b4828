"""The paper's Tables 1-6 and Figure 2: which scores each needs, and its rows, derived from what the runs say they are.

The seeds of one row are runs of one `essence` (`runs.py`). Rows whose labels would be alike although their runs differ
say in what.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from dina_rl.config import EvaluateRun, ThurstoneConfig, TimestepConfig
from dina_rl.evaluation.named_scorers import NamedScorer
from dina_rl.evaluation.requests import View
from dina_rl.evaluation.runs import FittedRun, essence

SINGLE, ENSEMBLE = "single", "ensemble"
DIFFERENCES = "Differs in"
Label = Callable[[FittedRun], tuple[str, ...]]
Order = Callable[[FittedRun], tuple[str | int | float, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One number of a row: a scorer, asked in one way. Entries of equal labels are the seeds of one row."""

    labels: tuple[str, ...]
    scorer: str
    view: View


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A table before anything is scored."""

    title: str
    labels: tuple[str, ...]  # names of the label columns
    entries: tuple[Entry, ...]  # in the order of the rows


def plan_table(request: EvaluateRun, scorers: Sequence[NamedScorer], runs: Sequence[FittedRun]) -> Plan:
    """The rows of `request.paper`.

    Args:
        scorers: those of the request that are not runs, for table1.

    Raises:
        ValueError: nothing to make it of, or a run counted twice.
    """
    assert request.paper is not None
    if not runs and not (request.paper == "table1" and scorers):
        raise ValueError(f"paper {request.paper} is made of fit runs: give --runs DIR ...")
    pool = request.pool_data_sets
    match request.paper:
        case "table1":
            return _table1(scorers, runs, pool)
        case "table2":
            return _table2(runs, pool)
        case "table3":
            return _single_level(runs, "Table 3: backbone adaptation", "Training strategy", _strategy, _strategy, pool)
        case "table4":
            asked = request.uncertainty
            assert asked is not None
            views = [View(levels=(level,), draws=asked.draws) for level in asked.levels]
            return _over_levels(runs, "Table 4: uncertainty", ("Model", "Backbone", "t"), _model, views, pool)
        case "table5":
            return _single_level(runs, "Table 5: layer depth", "Configuration", _depth, _depth_order, pool)
        case "table6":
            return _single_level(runs, "Table 6: diffusion backbones", "Backbone", _backbone, _backbone, pool)
        case "figure2":
            views = [View(levels=(level,)) for level in request.levels]
            names = ("Timestep schedule", "Var.", "t")
            return _over_levels(runs, "Figure 2: inference-time noise level", names, _training, views, pool)


def schedule_label(timestep: TimestepConfig) -> str:
    """q(t) as Table 2 calls it."""
    match timestep.distribution:
        case "fixed":
            return f"t = {timestep.fixed:g}"
        case "uniform":
            return "Uniform"
        case "logit_normal":
            return f"LN({timestep.mean:g}, {timestep.std:g})"


def variance_label(thurstone: ThurstoneConfig) -> str:
    """Fixed or NC (noise-calibrated), with the constants where they are not the paper's (its fixed sigma_u is 0.5)."""
    if thurstone.variance == "fixed":
        return "Fixed" if thurstone.sigma_u == 0.5 else f"Fixed (sigma_u {thurstone.sigma_u:g})"
    usual = ThurstoneConfig()
    if (thurstone.k, thurstone.sigma_u) == (usual.k, usual.sigma_u):
        return "NC"
    return f"NC (k {thurstone.k:g}, sigma_u {thurstone.sigma_u:g})"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """Runs that differ in their seed alone."""

    labels: tuple[str, ...]
    runs: tuple[FittedRun, ...]


def _table1(scorers: Sequence[NamedScorer], runs: Sequence[FittedRun], pool: bool) -> Plan:
    rows: list[tuple[tuple[str, ...], str, View]] = []
    for scorer in scorers:
        rows.append(((scorer.name, scorer.backbone), scorer.name, scorer.main))
        if scorer.ensemble is not None:
            rows.append(((f"{scorer.name} *", scorer.backbone), scorer.name, scorer.ensemble))
    for group in _groups(runs, _model, _model, pool):
        first, *rest = group.labels
        rows += [(group.labels, run.name, run.single) for run in group.runs]
        rows += [((f"{first} *", *rest), run.name, run.ensemble) for run in group.runs]
    return _plan("Table 1: pairwise preference accuracy (* noise ensemble)", ("Model", "Backbone"), rows)


def _table2(runs: Sequence[FittedRun], pool: bool) -> Plan:
    rows = []
    for group in _groups(runs, _training, _training_order, pool):
        schedule, variance, *rest = group.labels
        rows += [((schedule, variance, SINGLE, *rest), run.name, run.single) for run in group.runs]
        rows += [((schedule, variance, ENSEMBLE, *rest), run.name, run.ensemble) for run in group.runs]
    return _plan("Table 2: timestep schedule and variance", ("Timestep schedule", "Var.", "Inference"), rows)


def _single_level(runs: Sequence[FittedRun], title: str, name: str, label: Label, order: Order, pool: bool) -> Plan:
    groups = _groups(runs, label, order, pool)
    return _plan(title, (name,), [(group.labels, run.name, run.single) for group in groups for run in group.runs])


def _over_levels(
    runs: Sequence[FittedRun], title: str, names: tuple[str, ...], label: Label, views: Sequence[View], pool: bool
) -> Plan:
    """One row per group and view, whose level is the last of the named labels."""
    rows = []
    for group in _groups(runs, label, _training_order, pool):
        for view in views:
            labels = (*group.labels[: len(names) - 1], f"{view.levels[0]:g}", *group.labels[len(names) - 1 :])
            rows += [(labels, run.name, view) for run in group.runs]
    return _plan(title, names, rows)


def _plan(title: str, names: tuple[str, ...], rows: Sequence[tuple[tuple[str, ...], str, View]]) -> Plan:
    """The plan of (labels, scorer, view) rows; what tells rows apart gets a column of its own where there is any."""
    width = max(len(labels) for labels, _, _ in rows)
    return Plan(
        title=title,
        labels=(*names, DIFFERENCES)[:width],
        entries=tuple(
            Entry(labels=(*labels, *[""] * (width - len(labels))), scorer=scorer, view=view)
            for labels, scorer, view in rows
        ),
    )


def _strategy(run: FittedRun) -> tuple[str, ...]:
    return ("Freeze backbone",) if run.run.reward.lora is None else ("LoRA fine-tuning",)


def _depth(run: FittedRun) -> tuple[str, ...]:
    taps = run.run.reward.taps
    layers = "1 layer" if taps[-1] == 1 else f"{taps[-1]} layers"
    return (f"{layers} (taps {', '.join(map(str, taps))})",)


def _depth_order(run: FittedRun) -> tuple[int, ...]:
    return run.run.reward.taps[-1], *run.run.reward.taps


def _backbone(run: FittedRun) -> tuple[str, ...]:
    return (f"{_last_part(run.run.pipeline.path)} ({run.run.reward.taps[-1]} layers)",)


def _model(run: FittedRun) -> tuple[str, ...]:
    return "DiNa-LRM", _last_part(run.run.pipeline.path)


def _training(run: FittedRun) -> tuple[str, ...]:
    return schedule_label(run.run.reward.timestep), variance_label(run.run.reward.thurstone)


def _training_order(run: FittedRun) -> tuple[int | float, ...]:
    """Constant levels upwards, uniform, logit-normal from high noise to low; fixed variance first."""
    timestep = run.run.reward.timestep
    kind = ("fixed", "uniform", "logit_normal").index(timestep.distribution)
    place = timestep.fixed if kind == 0 else -timestep.mean if kind == 2 else 0.0
    return kind, place, run.run.reward.thurstone.variance != "fixed"


def _groups(runs: Sequence[FittedRun], label: Label, order: Order, pool: bool) -> list[_Group]:
    """Rows: runs of one essence, by `order`, labelled so that no two rows are labelled alike.

    Args:
        pool: runs fitted on different data may be of one row.

    Raises:
        ValueError: two runs of one row have one seed and one training set.
    """
    rows: dict[str, list[FittedRun]] = {}
    for run in sorted(runs, key=lambda run: (order(run), run.run.seed)):
        rows.setdefault(json.dumps(essence(run, pool=pool), sort_keys=True), []).append(run)
    for same in rows.values():
        for first, second in combinations(same, 2):
            if first.run.seed == second.run.seed and essence(first, pool=False) == essence(second, pool=False):
                raise ValueError(
                    f"runs {first.directory} and {second.directory} have one configuration and seed: one fit, twice"
                )
    labels = [label(same[0]) for same in rows.values()]
    alike = {each for each in labels if labels.count(each) > 1}
    groups = []
    for plain, same in zip(labels, rows.values(), strict=True):
        extra: tuple[str, ...] = ()
        if alike:
            others = [other[0] for other in rows.values() if label(other[0]) == plain]
            extra = (_differences(same[0], others, pool),)
        groups.append(_Group(labels=(*plain, *extra), runs=tuple(same)))
    return groups


def _differences(run: FittedRun, others: Iterable[FittedRun], pool: bool) -> str:
    """`key value` of everything in which `run` differs from any of the others."""
    ours = essence(run, pool=pool)
    essences = [essence(other, pool=pool) for other in others]
    keys = [key for key, value in ours.items() if any(each.get(key) != value for each in essences)]
    return ", ".join(f"{key} {_plain(ours[key])}" for key in keys)


def _plain(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _last_part(path: str) -> str:
    return Path(path).name
