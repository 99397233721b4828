"""The paper's rows, derived from what the runs say they are; no weights are read."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from dina_rl.config import EvaluateRun, FitRun, PictureScorerConfig, ThurstoneConfig
from dina_rl.data.stores.latents import StoreInfo
from dina_rl.evaluation.named_scorers import PLAIN, NamedScorer
from dina_rl.evaluation.paper import plan_table, variance_label
from dina_rl.evaluation.requests import View
from dina_rl.evaluation.runs import FittedRun, notes_on, read_runs


def fitted(name: str, seed: int = 0, *, run: dict | None = None, **reward) -> FittedRun:
    values = {"seed": seed, "run_dir": f"runs/{name}", "reward": reward, **(run or {})}
    return FittedRun(name=name, directory=Path(f"/runs/{name}"), run=FitRun.model_validate(values))


def request(paper: str, **values) -> EvaluateRun:
    return EvaluateRun.model_validate({"paper": paper, "sets": {"test": {"path": "somewhere"}}, **values})


FIXED = {"variance": "fixed", "sigma_u": 0.5}


def test_table2_orders_schedules_and_collects_seeds() -> None:
    runs = [
        fitted("ln", timestep={"distribution": "logit_normal", "mean": -0.8}),
        fitted("uniform-1", 1),
        fitted("uniform-0", 0),
        fitted("t07", timestep={"distribution": "fixed", "fixed": 0.7}, thurstone=FIXED),
        fitted("t0", timestep={"distribution": "fixed", "fixed": 0.0}, thurstone=FIXED),
        fitted("uniform-fixed", thurstone=FIXED),
    ]
    plan = plan_table(request("table2"), [], runs)
    assert plan.labels == ("Timestep schedule", "Var.", "Inference")
    assert list(dict.fromkeys(entry.labels for entry in plan.entries)) == [
        (schedule, variance, inference)
        for schedule, variance in (
            ("t = 0", "Fixed"),
            ("t = 0.7", "Fixed"),
            ("Uniform", "Fixed"),
            ("Uniform", "NC"),
            ("LN(-0.8, 1)", "NC"),
        )
        for inference in ("single", "ensemble")
    ]
    seeds = [(entry.scorer, entry.view) for entry in plan.entries if entry.labels == ("Uniform", "NC", "ensemble")]
    assert seeds == [(f"uniform-{seed}", View(levels=(0.2, 0.5, 0.7))) for seed in (0, 1)]


def test_a_run_is_asked_at_its_own_levels() -> None:
    plan = plan_table(request("table2"), [], [fitted("a", single_level=0.3, ensemble_levels=(0.1, 0.6))])
    assert [entry.view.levels for entry in plan.entries] == [(0.3,), (0.1, 0.6)]


def test_rows_that_differ_elsewhere_say_in_what() -> None:
    runs = [fitted("short", run={"fit": {"steps": 10}}), fitted("long"), fitted("frozen", lora=None)]
    plan = plan_table(request("table3"), [], runs)
    assert plan.labels == ("Training strategy", "Differs in")
    assert {entry.scorer: entry.labels for entry in plan.entries} == {
        "short": ("LoRA fine-tuning", "fit.steps 10"),
        "long": ("LoRA fine-tuning", "fit.steps 12500"),
        "frozen": ("Freeze backbone", ""),
    }


def test_places_and_processes_do_not_make_rows() -> None:
    runs = [
        fitted("a", 0, run={"dataset": {"max_skipped": 0.2}, "fit": {"num_workers": 2}}),
        fitted("b", 1, run={"dataset": {"encode_batch_size": 9}, "fit": {"num_workers": 4, "checkpoint_every": 9}}),
    ]
    assert {entry.labels for entry in plan_table(request("table3"), [], runs).entries} == {("LoRA fine-tuning",)}
    assert notes_on(runs) == ("Fit runs: a (seed 0), b (seed 1).",)


def rows(runs: list[FittedRun], **values) -> list[str]:
    """In what each entry's row differs from the others, by seed; empty where all runs are of one row."""
    return [entry.labels[1] for entry in plan_table(request("table3", **values), [], runs).entries if entry.labels[1:]]


def test_other_data_are_another_row_unless_pooled() -> None:
    runs = [fitted("a", 0, run={"dataset": {"path": "x"}}), fitted("b", 1, run={"dataset": {"path": "y"}})]
    assert rows(runs) == ["data.path x", "data.path y"]
    assert rows(runs, pool_data_sets=True) == []
    assert notes_on(runs)[1] == "Fitted on 2 sets of pairs: x, y."
    alike = [runs[0], fitted("b", 0, run={"dataset": {"path": "y"}})]  # one seed, but two fits
    assert rows(alike, pool_data_sets=True) == []
    filtered = [runs[0], fitted("b", 1, run={"dataset": {"path": "y", "filter": {"min_confidence": 0.95}}})]
    assert rows(filtered, pool_data_sets=True) == ["data.filter.min_confidence None", "data.filter.min_confidence 0.95"]


def encoded(directory: Path, dataset: str, **section) -> Path:
    """The latent store of an encoding run, as far as it says what it holds; without a section, the store alone."""
    (directory / "latents").mkdir(parents=True)
    info = StoreInfo(
        dataset=dataset,
        pipeline="shapes",
        buckets=((32, 32),),
        latent_shapes=((4, 4, 4),),
        rows=(2,),
        rows_per_shard=2,
    )
    (directory / "latents" / "store.json").write_text(json.dumps(asdict(info)))
    if section:
        config = FitRun.model_validate({"dataset": {"path": dataset, **section}}).model_dump(mode="json")
        (directory / "config.yaml").write_text(yaml.safe_dump(config))
    return directory / "latents"


def test_stores_say_what_they_were_encoded_from(tmp_path: Path) -> None:
    def on(name: str, seed: int, latents: Path) -> FittedRun:
        return fitted(name, seed, run={"latents": str(latents)})

    every = {"filter": {"max_per_prompt": 0}}
    first = on("a", 0, encoded(tmp_path / "a", "x", **every))
    assert rows([first, on("b", 1, encoded(tmp_path / "b", "x", **every))]) == []
    assert rows([first, fitted("b", 1, run={"dataset": {"path": "x", **every}})]) == []  # encoded by the fit itself
    other = on("c", 1, encoded(tmp_path / "c", "y", **every))
    assert rows([first, other]) == ["data.path x", "data.path y"]
    assert rows([first, other], pool_data_sets=True) == []
    some = on("d", 1, encoded(tmp_path / "d", "x", filter={"max_per_prompt": 8}))
    assert rows([first, some], pool_data_sets=True) == ["data.filter.max_per_prompt 0", "data.filter.max_per_prompt 8"]
    bare = [on(name, seed, encoded(tmp_path / name, name)) for seed, name in enumerate(("e", "f"))]
    assert rows(bare) == ["data.path e", "data.path f"]
    assert rows(bare, pool_data_sets=True) == []
    theirs = [on(name, seed, tmp_path / name) for seed, name in enumerate(("g", "h"))]
    assert rows(theirs) == [f"data.path {tmp_path / name}" for name in "gh"]


def test_one_fit_is_not_counted_twice() -> None:
    with pytest.raises(ValueError, match="/runs/a and /runs/b have one configuration and seed"):
        plan_table(request("table3"), [], [fitted("a"), fitted("b")])


def test_table4_and_figure2_go_through_their_levels() -> None:
    runs = [fitted("a", 0), fitted("b", 1)]
    spread = plan_table(request("table4", uncertainty={"levels": [0.01, 0.4], "draws": 5}), [], runs)
    assert spread.labels == ("Model", "Backbone", "t")
    assert [(entry.labels[-1], entry.scorer, entry.view.draws) for entry in spread.entries] == [
        ("0.01", "a", 5),
        ("0.01", "b", 5),
        ("0.4", "a", 5),
        ("0.4", "b", 5),
    ]
    sweep = plan_table(request("figure2", levels=[0.1, 0.7]), [], runs[:1])
    assert [(entry.labels, entry.view) for entry in sweep.entries] == [
        (("Uniform", "NC", "0.1"), View(levels=(0.1,))),
        (("Uniform", "NC", "0.7"), View(levels=(0.7,))),
    ]


def test_table5_and_table6() -> None:
    runs = [fitted("deep", taps=(4, 8, 12, 16)), fitted("usual"), fitted("one", taps=(12,))]
    labels = [entry.labels for entry in plan_table(request("table5"), [], runs).entries]
    assert labels == [("12 layers (taps 4, 8, 12)",), ("12 layers (taps 12)",), ("16 layers (taps 4, 8, 12, 16)",)]
    other = fitted("flux", run={"pipeline": {"path": "black-forest-labs/FLUX.1-dev"}}, taps=(8, 19))
    labels = [entry.labels for entry in plan_table(request("table6"), [], [fitted("usual"), other]).entries]
    assert labels == [("FLUX.1-dev (19 layers)",), ("shapes (12 layers)",)]


def test_table1_has_scorers_and_runs() -> None:
    clip = NamedScorer(
        name="pick", config=PictureScorerConfig(kind="pickscore"), backbone="CLIP", main=PLAIN, ensemble=None,
        thurstone=None, bucketing=None,
    )  # fmt: skip
    plan = plan_table(request("table1"), [clip], [fitted("a", 0), fitted("b", 1)])
    assert list(dict.fromkeys(entry.labels for entry in plan.entries)) == [
        ("pick", "CLIP"),
        ("DiNa-LRM", "shapes"),
        ("DiNa-LRM *", "shapes"),
    ]


def test_variances_say_their_unusual_constants() -> None:
    assert variance_label(ThurstoneConfig(variance="fixed", sigma_u=0.5)) == "Fixed"
    assert variance_label(ThurstoneConfig(variance="fixed")) == "Fixed (sigma_u 0.1)"
    assert variance_label(ThurstoneConfig(k=1.0)) == "NC (k 1, sigma_u 0.1)"


def write_run(directory: Path, *, finished: bool = True, **values) -> Path:
    directory.mkdir(parents=True)
    run = FitRun.model_validate(values)
    (directory / "config.yaml").write_text(yaml.safe_dump(run.model_dump(mode="json")))
    if finished:
        (directory / "reward").mkdir()
    return directory


def test_runs_are_read_from_their_directories(tmp_path: Path) -> None:
    first, second = write_run(tmp_path / "a" / "fit", seed=3), write_run(tmp_path / "b" / "fit", seed=4)
    runs = read_runs([str(first), str(second)])
    assert [(run.run.seed, run.name) for run in runs] == [(3, str(first)), (4, str(second))]
    assert [run.name for run in read_runs([str(first)])] == ["fit"]


def test_what_is_no_finished_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no config.yaml"):
        read_runs([str(tmp_path / "nowhere")])
    with pytest.raises(ValueError, match="no reward model yet"):
        read_runs([str(write_run(tmp_path / "unfinished", finished=False))])
    other = write_run(tmp_path / "align")
    (other / "config.yaml").write_text("rollout: {num_steps: 3}\n")
    with pytest.raises(ValueError, match="not a fit run: rollout: unknown key"):
        read_runs([str(other)])
    good = str(write_run(tmp_path / "good"))
    with pytest.raises(ValueError, match="named twice"):
        read_runs([good, good])
