"""Runs beside each other: what is one band, what its numbers are, and which mistakes are told."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dina_rl.alignment.comparison import band, bands, read_runs
from dina_rl.alignment.history import gain
from dina_rl.alignment.measurement import Measurement
from dina_rl.alignment.record import Recorder
from dina_rl.checkpoint import open_run_dir
from dina_rl.config import AlignRun
from dina_rl.types import PolicyWeights
from jobs.compare import main

WEIGHTS = PolicyWeights(version=0, tensors={"weight": torch.zeros(1)})


def measurement(golden: float, proxy: float) -> Measurement:
    return Measurement(
        guidance_scale=1.0,
        golden=(golden - 0.1, golden + 0.1),
        parts={},
        proxy=(proxy - 2, proxy + 2),
        proxy_parts={},
        images=torch.zeros(2, 3, 8, 8, dtype=torch.uint8),
        prompts=("a red circle", "a blue square"),
    )


def begun(run_dir: Path, **changes: object) -> AlignRun:
    run = AlignRun.model_validate({"run_dir": run_dir, **changes})
    open_run_dir(run, run_dir, resume=False)
    return run


def recorded(run_dir: Path, golden: list[float], pace: float, **changes: object) -> None:
    """A run measured every 10 iterations that take `pace` seconds each."""
    run = begun(run_dir, **changes)
    recorder = Recorder(run, run_dir, lambda directory, tensors: directory)
    recorder.restore()
    recorder.base([measurement(0.4, 0)])
    for number, value in enumerate(golden):
        recorder.seconds["rollout"] = 10 * number * pace
        recorder.seconds["measure"] += 1000
        recorder.measured(10 * number, measurement(value, number), WEIGHTS)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Two seeds with a reward model each, the second still running, and another algorithm."""
    root = tmp_path_factory.mktemp("compared")
    for seed, golden in enumerate(([0.4, 0.6, 0.8], [0.5, 0.9])):
        rewards = {"dina": {"path": f"fit_{seed}/reward"}}
        recorded(root / f"fast_seed{seed}", golden, 1 + seed, seed=seed, rewards=rewards)
    recorded(root / "nft", [0.4, 0.7], 4, algorithm="nft")
    return root


def test_what_differs_by_its_seed_alone_is_a_band(runs, tmp_path, capsys):
    main([*(str(runs / name) for name in ("nft", "fast_seed1", "fast_seed0")), "--out", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert "fast: golden 0.800 at 20, 0.900 at 10 (seed 0, 1)" in said
    assert "nft: golden 0.700 at 10 (seed 0)" in said
    with (tmp_path / "out" / "comparison.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["label"], row["seed"], row["iteration"]) for row in rows] == [
        *(("nft", "0", at) for at in ("0", "10")),
        *(("fast", "0", at) for at in ("0", "10", "20")),
        *(("fast", "1", at) for at in ("0", "10")),
    ]
    assert [float(row["seconds"]) for row in rows] == [0, 40, 0, 10, 20, 0, 20], "measuring aside"
    assert [float(row["proxy_gain"]) for row in rows] == [0, 0.5, 0, 0.5, 1, 0, 0.5]
    assert [float(row["golden"]) for row in rows][2:5] == [0.4, 0.6, 0.8]
    picture = np.asarray(Image.open(tmp_path / "out" / "comparison.png").convert("RGB")).reshape(-1, 3)
    for colour in ((0x2F, 0x6F, 0x9F), (0xC9, 0xA2, 0x27)):
        assert (picture == colour).all(1).sum() > 100


def test_a_label_says_what_is_a_band(runs):
    found = bands(read_runs([f"all of it={runs / 'nft'}", f"all of it={runs}/fast_seed1", str(runs / "fast_seed0")]))
    assert {label: [each.run.algorithm for each in group] for label, group in found.items()} == {
        "all of it": ["nft", "grpo"],
        "fast_seed0": ["grpo"],
    }
    assert list(bands(read_runs([f"x={runs}/fast_*"]))) == ["x"]


def test_a_band_is_known_where_all_its_runs_are():
    one, other = [(0.0, 0.0), (10.0, 1.0), (20.0, 3.0)], [(0.0, 1.0), (5.0, 2.0), (15.0, 4.0)]
    found = band([one, other])
    assert found.x == [0, 5, 10, 15]
    assert found.low == [0, 0.5, 1, 2]
    assert found.high == [1, 2, 3, 4]
    assert found.median == [0.5, 1.25, 2, 3]


def test_curves_that_do_not_overlap_have_no_band():
    found = band([[(0.0, 0.0), (1.0, 1.0)], [(2.0, 0.0), (3.0, 1.0)]])
    assert (found.x, found.low, found.median, found.high) == ([], [], [], [])


def test_a_recorder_counts_the_seconds_of_its_clock(tmp_path):
    ticks = iter((2.0, 5.0))
    run = begun(tmp_path / "run")
    recorder = Recorder(run, tmp_path / "run", lambda directory, tensors: directory, clock=lambda: next(ticks))
    with recorder.timed("rollout"):
        pass
    assert recorder.seconds["rollout"] == 3


def test_a_gain_is_in_deviations_of_the_base():
    assert gain(3.0, 1.0, 4.0) == 0.5
    assert gain(1.0, 1.0, 0.0) == 0


def test_runs_of_before_are_drawn_without_seconds(runs, tmp_path, capsys):
    old = tmp_path / "old"
    begun(old)
    history = (runs / "nft" / "history.jsonl").read_text()
    (old / "history.jsonl").write_text(history.replace('"iteration":', '"step":'))
    main([str(old), "--out", str(tmp_path / "out")])
    assert f"{old} kept no seconds of 2 of its 2 measurements" in capsys.readouterr().out
    assert (tmp_path / "out" / "comparison.csv").read_text().splitlines()[1].startswith("old,0,0,,0.4")
    assert (tmp_path / "out" / "comparison.png").stat().st_size > 0


def test_mistakes_are_one_line(runs, tmp_path, capsys):
    begun(tmp_path / "fresh")
    other = {"scorer": "clip_score"}
    begun(tmp_path / "clip", golden=other)
    (tmp_path / "clip" / "history.jsonl").write_bytes((runs / "nft" / "history.jsonl").read_bytes())
    (tmp_path / "broken").mkdir()
    nft = str(runs / "nft")
    for words, line in (
        ([], "name at least one directory of an alignment run"),
        ([str(tmp_path / "none")], "none does not exist"),
        ([f"x={tmp_path}/none*"], "none* does not exist"),
        (["=x"], "'=x' is neither RUN nor LABEL=RUN"),
        ([str(tmp_path / "broken")], "broken holds no run: it has no config.yaml"),
        ([str(tmp_path / "fresh")], "fresh holds a run that has measured nothing yet"),
        ([nft, f"a={nft}"], "nft is named twice"),
        ([nft, str(tmp_path / "clip")], "golden metrics differ and cannot share an axis: shapes in "),
        ([f"a={nft}", f"a={runs}/fast_seed0"], "both have seed 0 in the band a; tell them apart by LABEL=RUN"),
        ([f"nft={runs}/fast_seed0", nft], "two bands are called nft; tell them apart by LABEL=RUN"),
        ([nft, "--out", str(runs / "nft" / "config.yaml")], "config.yaml is no directory"),
        ([nft, "--outt", "x"], "unknown key"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(words)
        error = capsys.readouterr().err
        assert line in error
        assert len(error.splitlines()) == 1
