"""Several alignment runs beside each other: golden and proxy over iterations and seconds (the paper's Fig. 3)."""

import csv
import io
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from glob import glob
from itertools import pairwise
from pathlib import Path

import numpy as np

from dina_rl.alignment.history import gain, read_history, read_seconds
from dina_rl.alignment.result import saved_run
from dina_rl.checkpoint import write_text
from dina_rl.config import AlignRun
from dina_rl.config.keys import Mark, dump_without, marked, without
from dina_rl.report import Band, Curve, plot_bands

OF_A_SEED = ("seed", "rewards.dina.path", "refl.pretraining_latents")
"""Settings that may differ within a band, beside places: a seed has a reward model of its own, and its latents."""
HEADER = ("label", "seed", "iteration", "seconds", "golden", "proxy", "proxy_gain")


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """A measurement on the dev prompts."""

    iteration: int
    seconds: float | None  # of training until then, measurements aside; None: the run did not keep them
    golden: float
    proxy: float
    proxy_gain: float  # over the base, in standard deviations of the base


OVER: dict[str, Callable[[Moment], float | None]] = {
    "iteration": lambda moment: moment.iteration,
    "seconds of training (measurements aside)": lambda moment: moment.seconds,
}
CURVES: dict[str, Callable[[Moment], float]] = {
    "golden (held out)": lambda moment: moment.golden,
    "proxy gain / std of the base": lambda moment: moment.proxy_gain,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadRun:
    """What a run directory says of its curves."""

    directory: Path
    label: str | None  # as the user gave it
    run: AlignRun
    moments: tuple[Moment, ...]


def read_runs(words: Sequence[str]) -> list[ReadRun]:
    """The runs behind `words`: RUN, LABEL=RUN or LABEL=GLOB.

    Raises:
        ValueError: none, no run, nothing measured yet, one that is named twice, or golden metrics that differ.
    """
    if not words:
        raise ValueError("name at least one directory of an alignment run")
    named = [pair for word in words for pair in _directories(word)]
    directories = [directory for _, directory in named]
    for directory in directories:
        if directories.count(directory) > 1:
            raise ValueError(f"run directory {directory} is named twice")
    runs = [_read(directory, label) for label, directory in named]
    for each in runs[1:]:
        if _metric(each.run) != _metric(runs[0].run):
            raise ValueError(f"golden metrics differ and cannot share an axis: {_title(runs[0])}, {_title(each)}")
    return runs


def _directories(word: str) -> list[tuple[str | None, Path]]:
    label, equals, pattern = word.partition("=")
    if not equals or Path(word).is_dir():
        return [(None, _absolute(word))]
    if not label or not pattern:
        raise ValueError(f"{word!r} is neither RUN nor LABEL=RUN")
    found = sorted(glob(str(Path(pattern).expanduser())))
    return [(label, _absolute(each)) for each in found or [pattern]]


def _absolute(name: str) -> Path:
    return Path(name).expanduser().resolve()


def _read(directory: Path, label: str | None) -> ReadRun:
    run, points, seconds = saved_run(directory), read_history(directory).points(), read_seconds(directory)
    if not points:
        raise ValueError(f"run directory {directory} holds a run that has measured nothing yet")
    moments = tuple(
        Moment(
            iteration=point["iteration"],
            seconds=seconds.get(point["iteration"]),
            golden=point["golden"],
            proxy=point["proxy"],
            proxy_gain=gain(point["proxy"], points[0]["proxy"], points[0]["proxy_std"]),
        )
        for point in points
    )
    return ReadRun(directory=directory, label=label, run=run, moments=moments)


def _metric(run: AlignRun) -> tuple[str, dict[str, object] | None]:
    """Which metric, and by which model: with what patience its server was asked does not tell."""
    golden = run.golden.of_images
    return run.golden.scorer, None if golden is None else dump_without(golden, Mark.PROCESS)


def _title(read: ReadRun) -> str:
    golden = read.run.golden
    return f"{' '.join(filter(None, (golden.scorer, golden.path, golden.processor)))} in {read.directory}"


def bands(runs: Sequence[ReadRun]) -> dict[str, list[ReadRun]]:
    """Label -> its runs, by seed. Without a label of their own, runs are one band that differ by their seed alone.

    Raises:
        ValueError: two runs of a band have one seed, or two bands one label.
    """
    groups: dict[str, list[ReadRun]] = {}
    for each in sorted(runs, key=lambda each: each.run.seed):
        groups.setdefault(each.label or _but_for_the_seed(each.run), []).append(each)
    order = sorted(groups.values(), key=lambda group: min(map(runs.index, group)))
    labels = _labels(order, _names(runs))
    for label, group in zip(labels, order, strict=True):
        if labels.count(label) > 1:
            raise ValueError(f"two bands are called {label}; tell them apart by LABEL=RUN")
        _check_seeds(label, group)
    return dict(zip(labels, order, strict=True))


def _but_for_the_seed(run: AlignRun) -> str:
    """A run's settings without what may differ within a band; who does the work stays, for seconds depend on it."""
    keys = (*OF_A_SEED, *marked(type(run), Mark.PLACE))
    return json.dumps(without(run.model_dump(mode="json"), keys))


def _names(runs: Sequence[ReadRun]) -> dict[Path, str]:
    """What tells directories apart: their paths below the one that they share."""
    shared = Path(os.path.commonpath([each.directory.parent for each in runs]))
    return {each.directory: str(each.directory.relative_to(shared)) for each in runs}


def _labels(groups: Sequence[Sequence[ReadRun]], names: Mapping[Path, str]) -> list[str]:
    """The given label, or what the names of a band's runs begin with, or if that is another's too, the first name."""
    members = [[names[each.directory] for each in group] for group in groups]
    labels = [group[0].label or _beginning(own) for group, own in zip(groups, members, strict=True)]
    return [
        label if group[0].label or labels.count(label) == 1 else own[0]
        for label, group, own in zip(labels, groups, members, strict=True)
    ]


def _beginning(names: Sequence[str]) -> str:
    if len(names) == 1:
        return names[0]
    return re.sub(r"[\W_]*(seed|s)?[\W_]*$", "", os.path.commonprefix(list(names))) or names[0]


def _check_seeds(label: str, group: Sequence[ReadRun]) -> None:
    for one, other in pairwise(group):
        if one.run.seed == other.run.seed:
            raise ValueError(
                f"{one.directory} and {other.directory} both have seed {one.run.seed} in the band {label}; "
                "tell them apart by LABEL=RUN"
            )


def write_table(found: Mapping[str, Sequence[ReadRun]], path: Path) -> None:
    """Every measurement as a row of a CSV file; `seconds` is empty where a run did not keep them."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, HEADER)
    writer.writeheader()
    for label, group in found.items():
        for each in group:
            for moment in each.moments:
                writer.writerow({"label": label, "seed": each.run.seed, **asdict(moment)})
    write_text(path, text.getvalue())


def draw(found: Mapping[str, Sequence[ReadRun]], path: Path) -> None:
    """Golden above, the proxy's gain below; over iterations and, where runs kept them, over seconds of training."""
    panels = {
        (below, beside): {label: band(curves) for label in found if (curves := _curves(found[label], x, y))}
        for below, x in OVER.items()
        for beside, y in CURVES.items()
    }
    plot_bands({place: lines for place, lines in panels.items() if lines}, path)


def _curves(group: Sequence[ReadRun], x: Callable[[Moment], float | None], y: Callable[[Moment], float]) -> list[Curve]:
    """The lines of a band's runs, as far as x is known."""
    lines = [[(at, y(each)) for each in run.moments if (at := x(each)) is not None] for run in group]
    return [line for line in lines if line]


def band(curves: Sequence[Curve]) -> Band:
    """Median, lowest and highest of `curves`, wherever all of them are known, in lines between their points."""
    first, last = max(curve[0][0] for curve in curves), min(curve[-1][0] for curve in curves)
    places = sorted({x for curve in curves for x, _ in curve if first <= x <= last})
    values = np.stack([np.interp(places, *np.array(curve).T) for curve in curves])
    return Band(
        runs=curves,
        x=places,
        low=values.min(0).tolist(),
        median=np.median(values, 0).tolist(),
        high=values.max(0).tolist(),
    )
