"""Fit runs on disk: what their `config.yaml` says of them, and which of them are one fit at different seeds."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import yaml
from pydantic import ValidationError

from dina_rl.checkpoint import CONFIG_FILE
from dina_rl.config import DatasetConfig, FitRun, PictureScorerConfig
from dina_rl.config.keys import Mark, covers, dump_without, explain
from dina_rl.data.stores.latents import STORE_FILE, StoreInfo
from dina_rl.evaluation.requests import View
from dina_rl.reward.fit import REWARD
from dina_rl.textfiles import parse_yaml, read_record, read_text

DATA_PATH = "data.path"


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedRun:
    """A fit run on disk."""

    name: str  # of its scorer
    directory: Path
    run: FitRun

    @property
    def scorer(self) -> PictureScorerConfig:
        """Its reward model as a scorer; the run knows sizes and precision, which cards of version 1 do not."""
        pipeline = self.run.pipeline
        return PictureScorerConfig(
            path=str(self.directory / REWARD), dtype=pipeline.dtype, height=pipeline.height, width=pipeline.width
        )

    @property
    def single(self) -> View:
        return View(levels=(self.run.reward.single_level,))

    @property
    def ensemble(self) -> View:
        return View(levels=self.run.reward.ensemble_levels)


def read_runs(directories: Sequence[str]) -> list[FittedRun]:
    """The fit runs in the directories.

    Raises:
        ValueError: no finished fit run there, or the same one twice.
    """
    places = [Path(directory).expanduser().resolve() for directory in directories]
    if len(set(places)) < len(places):
        raise ValueError("a run is named twice in runs")
    runs = [_read_run(place) for place in places]
    short = [run.name for run in runs]
    # Directories of one name, e.g. a/fit and b/fit, are told apart by their paths.
    return [run if short.count(run.name) == 1 else replace(run, name=str(run.directory)) for run in runs]


def notes_on(runs: Sequence[FittedRun]) -> tuple[str, ...]:
    """Which runs a table is made of, and on which preference sets they were fitted if those are several."""
    notes = [f"Fit runs: {', '.join(f'{run.name} (seed {run.run.seed})' for run in runs)}."] if runs else []
    fitted_on = list(dict.fromkeys(str(training_data(run)[DATA_PATH]) for run in runs))
    if len(fitted_on) > 1:
        notes.append(f"Fitted on {len(fitted_on)} sets of pairs: {', '.join(fitted_on)}.")
    return tuple(notes)


def essence(run: FittedRun, *, pool: bool) -> dict[str, object]:
    """What decides a fit's numbers, the seed aside: dotted key -> value of every setting without a mark.

    Args:
        pool: which data it was fitted on does not count, only how they were filtered and encoded.
    """
    own, data = _flat(dump_without(run.run, *Mark)), training_data(run)
    aside = ("seed", "latents", "dataset", *((DATA_PATH,) if pool else ()))  # `data` says what latents and dataset hold
    return {key: value for key, value in (own | data).items() if not covers(aside, key)}


def training_data(run: FittedRun) -> dict[str, object]:
    """The preference set of a fit and its settings without a mark, `data.KEY` -> value.

    A fit on `latents` was not asked for them: the run that encoded the store was, whose `config.yaml` lies beside it.
    Without that the store itself says a part; of the authors' files only the directory is known.
    """
    latents = run.run.latents
    if latents is None:
        return _flat({"data": dump_without(run.run.dataset, *Mark)})
    store = latents.expanduser() / STORE_FILE
    if not store.is_file():
        return {DATA_PATH: str(latents)}
    info = asdict(read_record(StoreInfo, store))
    dataset = _encoded_from(store.parent.parent / CONFIG_FILE)
    if dataset is not None and dataset.path == info["dataset"]:
        return _flat({"data": dump_without(dataset, *Mark)})
    sizes = ["x".join(map(str, size)) for size in info["buckets"]]
    return _flat({"data": {"path": info["dataset"], "buckets": sizes, "latent_dtype": info["dtype"]}})


def _encoded_from(file: Path) -> DatasetConfig | None:
    """The dataset section of a run's configuration; None: there is none that can be read."""
    try:
        content = parse_yaml(read_text(file))
        return DatasetConfig.model_validate(content["dataset"])
    except (OSError, yaml.YAMLError, ValueError, KeyError, TypeError):
        return None


def _flat(values: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _read_run(directory: Path) -> FittedRun:
    file = directory / CONFIG_FILE
    if not file.is_file():
        raise ValueError(f"run {directory} does not exist (no {CONFIG_FILE}); fit one with jobs.fit_reward")
    try:
        run = FitRun.model_validate(parse_yaml(read_text(file)))
    except (ValidationError, yaml.YAMLError) as error:
        reason = explain(error)[0] if isinstance(error, ValidationError) else "it is not valid YAML"
        raise ValueError(f"run {directory} is not a fit run: {reason}") from error
    if not (directory / REWARD).is_dir():
        raise ValueError(f"run {directory} has no reward model yet; finish it with jobs.fit_reward --resume")
    return FittedRun(name=directory.name, directory=directory, run=run)
