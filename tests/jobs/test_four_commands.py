"""The README's four commands (encode, fit, evaluate, score) one after another on the miniature world.

What each hands to the next. Encoding is on Ray; that fit and evaluation give the same there is their own tests' matter.
"""

import csv
import json
from pathlib import Path

from dina_rl.shapes.pipeline import SHIPPED_PIPELINE
from dina_rl.shapes.preferences import write_preferences
from jobs import encode, evaluate, fit_reward, score

CONFIG = ["--config", str(Path(__file__).parents[2] / "configs" / "shapes_reward.yaml")]
SIDES = ("path1", "path2")


def test_encode_fit_evaluate_and_score(ray_local, tmp_path, capsys):
    write_preferences(SHIPPED_PIPELINE, tmp_path / "set", train_groups=8, test_groups=6, seed=0, progress=False)
    dataset = ["--dataset.path", str(tmp_path / "set")]

    encode.main([*CONFIG, *dataset, "--run-dir", str(tmp_path / "encoded")])
    assert "train: 48 records, 0 malformed; 48 pairs in, 48 kept (100.0%)" in capsys.readouterr().out

    latents = ["--latents", str(tmp_path / "encoded" / "latents")]
    small = ["--fit.steps", "3", "--fit.batch_size", "4"]
    fit_reward.main([*CONFIG, *latents, *small, "--inline", "--run-dir", str(tmp_path / "fit")])
    assert "label-noise ceiling of test" in capsys.readouterr().out
    assert json.loads((tmp_path / "fit" / "metrics.json").read_text())["test_pairs"] == 12

    sets = ["--sets.world.path", str(tmp_path / "set"), "--levels", "0.4", "--uncertainty", "None"]
    evaluate.main(["--runs", str(tmp_path / "fit"), *sets, "--inline", "--run-dir", str(tmp_path / "audit")])
    (found,) = [
        line
        for line in json.loads((tmp_path / "audit" / "report.json").read_text())["accuracy"]
        if line["view"] == "t=0.4"
    ]
    assert found["pairs"] == 12

    records = json.loads((tmp_path / "set" / "test.json").read_text())
    with (tmp_path / "list.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "prompt"])
        rows.writerows([tmp_path / "set" / record[side], record["prompt"]] for record in records for side in SIDES)
    out = tmp_path / "scores.csv"
    score.main(
        [
            *("--scorer.path", str(tmp_path / "fit" / "reward"), "--images", str(tmp_path / "list.csv")),
            *("--root", str(tmp_path / "set"), "--out", str(out)),
        ]
    )
    with out.open() as file:
        scores = [float(row["score"]) for row in csv.DictReader(file)]
    assert len(scores) == 24
    assert len(set(scores)) == len({record[side] for record in records for side in SIDES})
