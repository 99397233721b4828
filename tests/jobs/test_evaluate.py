"""The evaluator through real Ray and in one process, on a handful of noise images."""

import csv
import json
from pathlib import Path

import pytest
import torch
import yaml

from dina_rl.config import FitRun, PipelineConfig
from dina_rl.reward.checkpoint import load_reward, save_reward
from dina_rl.runtime import open_pipeline
from jobs import evaluate
from tests.tiny_clip import save_tiny_clip
from tests.tiny_reward import write_preferences

SMALL = ["--records_per_part", "2", "--batch_size", "4", "--encode_batch_size", "4", "--bootstrap.resamples", "50"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_pipeline: Path, tiny_reward: Path) -> Path:
    """Two preference sets and two fit runs that differ in their seed alone."""
    root = tmp_path_factory.mktemp("world")
    write_preferences(root / "pairs", train=3, test=5)
    write_groups(root / "groups", root / "pairs" / "images")
    for seed in (0, 1):
        run = FitRun.model_validate(
            {
                "seed": seed,
                "run_dir": root / f"fit-{seed}",
                "pipeline": {"path": str(tiny_pipeline)},
                "dataset": {"path": str(root / "pairs")},
            }
        )
        model = load_reward(tiny_reward, open_pipeline(run.pipeline))
        save_reward(model, run.run_dir / "reward", pipeline=run.pipeline)
        (run.run_dir / "config.yaml").write_text(yaml.safe_dump(run.model_dump(mode="json")))
    return root


def write_groups(directory: Path, images: Path) -> None:
    """ImageReward's layout: two groups of four images, with a tie, of which one image is missing."""
    directory.mkdir()
    names = [f"test-{index}-{side}.png" for index in range(4) for side in ("bright", "dark")]
    for name in names[:-1]:
        (directory / name).write_bytes((images / name).read_bytes())
    groups = [
        {"id": "a", "prompt": "a small red circle on blue", "generations": names[:4], "ranking": [1, 2, 2, 3]},
        {"id": "b", "prompt": "a large green cross on white", "generations": names[4:], "ranking": [4, 3, 2, 1]},
    ]
    (directory / "test.json").write_text(json.dumps(groups))


def audit(world: Path, run_dir: Path, *more: str) -> dict:
    """The report of an audit of one run on both sets."""
    evaluate.main(
        [
            *("--run_dir", str(run_dir), "--runs", str(world / "fit-0"), "--levels", "0.2", "0.7"),
            *("--sets.pairs.path", str(world / "pairs")),
            *("--sets.groups.kind", "imagereward", "--sets.groups.path", str(world / "groups")),
            *("--training.path", str(world / "pairs"), "--training.split", "test"),
            *("--uncertainty.levels", "0.5", "--uncertainty.draws", "2", "--max_broken", "0.5", *SMALL, *more),
        ]
    )
    return json.loads((run_dir / "report.json").read_text())


@pytest.fixture(scope="module")
def inline(world: Path) -> dict:
    return audit(world, world / "inline", "--inline")


def test_two_workers_find_what_one_process_finds(ray_local, world: Path, inline: dict) -> None:
    assert audit(world, world / "ray", "--workers.num_workers", "2") == inline
    for name in ("accuracies.csv", "breakdown.csv", "report.md", "dropped.jsonl"):
        assert (world / "ray" / name).read_text() == (world / "inline" / name).read_text()


def test_the_audit_is_whole(world: Path, inline: dict) -> None:
    assert [(line["set"], line["view"]) for line in inline["accuracy"]] == [
        (name, view) for name in ("pairs", "groups") for view in ("t=0.4", "t=0.2,0.5,0.7", "t=0.2", "t=0.7")
    ]
    pairs, groups = (next(line for line in inline["accuracy"] if line["set"] == name) for name in ("pairs", "groups"))
    assert (pairs["pairs"], pairs["ties"], pairs["dropped_pairs"]) == (5, 0, 0)
    # 6 comparisons of group a, one of them tied, and the 3 of the three images that are left of b's four
    assert (groups["pairs"], groups["ties"], groups["dropped_images"], groups["dropped_pairs"]) == (8, 1, 1, 3)
    assert groups["ties_wrong"] == pytest.approx(groups["micro"] * 8 / 9)
    assert pairs["micro_low"] <= pairs["micro"] <= pairs["micro_high"]
    assert [(c["set"], c["view"]) for c in inline["calibration"]] == [
        (name, view) for name in ("pairs", "groups") for view in ("t=0.4", "t=0.2,0.5,0.7")
    ]
    assert {(u["set"], u["draws"], u["pairs"]) for u in inline["uncertainty"]} == {("pairs", 2, 5), ("groups", 2, 8)}
    assert {(part["set"], part["group"]) for part in inline["breakdown"]} == {("pairs", "bright vs dark")}
    assert inline["ceiling"] == {"pairs": 1.0}
    assert inline["leak"]["groups"]["shared_images"] == 7
    assert inline["leak"]["pairs"]["records_with_shared_image"] == 5
    (dropped,) = [json.loads(line) for line in (world / "inline" / "dropped.jsonl").read_text().splitlines()]
    assert (dropped["set"], dropped["record"], dropped["image"]) == ("groups", 1, "test-3-dark.png")
    for name in ("accuracy.png", "sweep.png", "reliability.png"):
        assert (world / "inline" / name).read_bytes().startswith(b"\x89PNG")


def table(world: Path, name: str, *more: str) -> list[dict[str, str]]:
    """The CSV lines of a table of the paper, made of both runs on the audit's cache."""
    run_dir = world / name
    evaluate.main(
        [
            *("--inline", "--paper", name, "--run_dir", str(run_dir), "--cache", str(world / "inline" / "cache")),
            *("--runs", str(world / "fit-0"), str(world / "fit-1"), "--sets.pairs.path", str(world / "pairs")),
            *SMALL,
            *more,
        ]
    )
    assert (run_dir / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert (run_dir / f"{name}.md").read_text().startswith("## ")
    with (run_dir / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


def test_tables_are_made_of_runs_and_share_scores(world: Path, inline: dict) -> None:
    """Both runs hold the same weights, which the audit has scored: all that table 2 shows is in the cache."""
    scored = {file: file.stat().st_mtime_ns for file in (world / "inline" / "cache").rglob("*.safetensors")}
    lines = table(world, "table2")
    assert {file: file.stat().st_mtime_ns for file in (world / "inline" / "cache").rglob("*.safetensors")} == scored
    assert [(line["Timestep schedule"], line["Var."], line["Inference"], line["n"]) for line in lines] == [
        ("Uniform", "NC", "single", "2"),
        ("Uniform", "NC", "ensemble", "2"),
    ]
    expected = {line["view"]: line["micro"] for line in inline["accuracy"] if line["set"] == "pairs"}
    assert [float(line["pairs"]) for line in lines] == [expected["t=0.4"], expected["t=0.2,0.5,0.7"]]
    assert [float(line["pairs_std"]) for line in lines] == [0, 0]


def test_table4_and_figure2(world: Path, inline: dict) -> None:
    lines = table(world, "table4", "--uncertainty.levels", "0.5", "--uncertainty.draws", "2")
    (found,) = [line for line in inline["uncertainty"] if line["set"] == "pairs"]
    assert [float(lines[0][f"pairs: {title}"]) for title in ("VR", "mean margin", "Var(r)")] == [
        found["variation_ratio"],
        found["mean_margin"],
        found["score_variance"],
    ]
    assert [line["t"] for line in table(world, "figure2", "--levels", "0.2", "0.7")] == ["0.2", "0.7"]


def test_table1_sets_other_scorers_beside_the_runs(world: Path, inline: dict, tmp_path: Path) -> None:
    clip = str(save_tiny_clip(tmp_path / "clip"))
    scorer = [
        f"--scorers.pick.{key}={value}" for key, value in {"kind": "pickscore", "path": clip, "processor": clip}.items()
    ]
    lines = table(world, "table1", *scorer)
    assert [(line["Model"], line["Backbone"], line["n"]) for line in lines] == [
        ("pick", "CLIP", "1"),
        ("DiNa-LRM", "tiny", "2"),
        ("DiNa-LRM *", "tiny", "2"),
    ]
    assert float(lines[0]["pairs_low"]) <= float(lines[0]["pairs"]) <= float(lines[0]["pairs_high"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "no set to evaluate on"),
        (["--sets.a.path", "x"], "nothing to evaluate"),
        (["--sets.a.path", "nowhere", "--runs", "RUN"], "nowhere does not exist"),
        (["--sets.a.path", "PAIRS", "--runs", "nowhere"], "no config.yaml"),
        (["--sets.a.path", "PAIRS", "--scorers.x.path", "nowhere"], "reward model nowhere"),
        (["--sets.a.path", "PAIRS", "--sets.a.split", "dev", "--runs", "RUN"], "dev"),
        (["--sets.a.pth", "PAIRS"], "--sets.a.pth: unknown key; did you mean --sets.NAME.path?"),
        (["--paper", "table2", "--sets.a.path", "PAIRS", "--scorers.x.kind", "dina"], "is made of fit runs alone"),
        (["--sets.a.path", "PAIRS", "--scorers.x.normalisation", "readme"], "leave it raw"),
        (["--sets.a.path", "PAIRS", "--sets.a.kind", "preprocessed"], "sets.a.kind preprocessed holds latents without"),
        (["--training.path", "PAIRS", "--training.kind", "preprocessed"], "training.kind preprocessed holds latents"),
        (["--sets.a/b.path", "PAIRS", "--runs", "RUN"], "must be letters, digits"),
    ],
)
def test_mistakes_are_one_line(argv, message, world, tmp_path, capsys) -> None:
    words = {"PAIRS": str(world / "pairs"), "RUN": str(world / "fit-0")}
    with pytest.raises(SystemExit) as ending:
        evaluate.main(["--run_dir", str(tmp_path / "run"), *(words.get(word, word) for word in argv)])
    assert ending.value.code == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len([line for line in errors if line.startswith("error: ")]) == 1
    assert message in errors[-1]
    assert not (tmp_path / "run").exists()


def test_a_broken_set_stops_the_run(world: Path, tmp_path: Path, capsys) -> None:
    argv = ["--inline", "--run_dir", str(tmp_path / "run"), "--runs", str(world / "fit-0"), "--uncertainty", "None"]
    with pytest.raises(SystemExit) as ending:
        evaluate.main([*argv, "--sets.a.kind", "imagereward", "--sets.a.path", str(world / "groups"), *SMALL])
    assert ending.value.code == 2
    assert "set a: 0 of 2 records are malformed and 1 of the 2 scored have unreadable images" in capsys.readouterr().err
    assert (tmp_path / "run" / "dropped.jsonl").is_file()


def test_a_malformed_set_stops_before_anything_is_scored(world: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "set").mkdir()
    records = json.loads((world / "pairs" / "test.json").read_text())
    (tmp_path / "set" / "test.json").write_text(json.dumps([*records, {"prompt": ""}]))
    argv = ["--inline", "--run_dir", str(tmp_path / "run"), "--runs", str(world / "fit-0")]
    with pytest.raises(SystemExit) as ending:
        evaluate.main([*argv, "--sets.a.path", str(tmp_path / "set"), *SMALL])
    assert ending.value.code == 2
    assert "set a: 1 of 6 records are malformed" in capsys.readouterr().err
    assert len((tmp_path / "run" / "dropped.jsonl").read_text().splitlines()) == 1
    assert not (tmp_path / "run" / "cache").exists()


def test_a_scorer_that_fails_everywhere_hides_no_other(world: Path, tiny_pipeline: Path, tmp_path: Path) -> None:
    model = load_reward(world / "fit-0" / "reward", open_pipeline(PipelineConfig(path=str(tiny_pipeline))))
    with torch.no_grad():
        model.head.head.weight.fill_(torch.nan)
    failed = tmp_path / "failed"
    save_reward(model, failed / "reward", pipeline=PipelineConfig(path=str(tiny_pipeline)))
    (failed / "config.yaml").write_bytes((world / "fit-0" / "config.yaml").read_bytes())
    common = [
        *("--inline", "--cache", str(tmp_path / "cache"), "--sets.pairs.path", str(world / "pairs"), "--levels", "0.4"),
        *("--uncertainty.levels", "0.5", "--uncertainty.draws", "2", *SMALL, "--runs", str(failed)),
    ]
    evaluate.main([*common, str(world / "fit-0"), "--run_dir", str(tmp_path / "audit")])
    report = json.loads((tmp_path / "audit" / "report.json").read_text(), parse_constant=pytest.fail)
    accuracy = {
        line["scorer"]: (line["failed"], line["pairs"]) for line in report["accuracy"] if line["view"] == "t=0.4"
    }
    assert accuracy == {"failed": (5, 5), "fit-0": (0, 5)}
    spread = {line["scorer"]: (line["variation_ratio"], line["failed_pairs"]) for line in report["uncertainty"]}
    assert spread["failed"] == (None, 5)
    assert spread["fit-0"][0] is not None
    assert {line["scorer"]: line["failed"] for line in report["calibration"]} == {"failed": 5, "fit-0": 0}
    evaluate.main([*common, "--paper", "table4", "--run_dir", str(tmp_path / "table4")])
    (row,) = csv.DictReader((tmp_path / "table4" / "table4.csv").open())
    assert (row["pairs: VR"], row["n"]) == ("", "0")
    assert (
        "5 comparisons with a score that is not a number are left out." in (tmp_path / "table4/table4.md").read_text()
    )
