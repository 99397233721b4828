"""The jobs, `--inline`, on a machine without Ray and DeepSpeed."""

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import yaml

from dina_rl import __version__
from tests.tiny_reward import write_preferences
from tests.tiny_run import tiny_run

ROOT = Path(__file__).parents[2]
SHORT = {"every": 1, "dev_samples": 2, "test_samples": 2, "guidances": [2.0]}


def test_all_jobs_run_where_ray_and_deepspeed_are_not_installed(tmp_path: Path, tiny_pipeline: Path) -> None:
    """Encode, fit, evaluate, score, label, fit on the labels and align, each on what the one before it made."""
    names = ("data", "encoded", "fit", "audit", "labels", "student", "align")
    data, encoded, fitted, audit, labels, student, aligned = (tmp_path / name for name in names)
    write_preferences(data, train=6, test=3)
    config = tmp_path / "fit.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "inline": True,
                "pipeline": {"path": str(tiny_pipeline)},
                "dataset": {"path": str(data)},
                "reward": {"taps": [1, 3], "num_heads": 4, "lora": {"rank": 4}},
                "fit": {"steps": 2, "batch_size": 2},
            }
        )
    )
    run = tiny_run(aligned, tiny_pipeline, fitted / "reward", inline=True, iterations=1, golden=SHORT)
    (tmp_path / "align.yaml").write_text(yaml.safe_dump(run.model_dump(mode="json")))
    picture = data / "images" / "test-0-bright.png"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "tests.without_ray"),
            json.dumps(
                [
                    ["jobs.encode", "--config", str(config), "--run-dir", str(encoded)],
                    ["jobs.fit_reward", "--config", str(config), "--run-dir", str(fitted)]
                    + ["--latents", str(encoded / "latents")],
                    ["jobs.evaluate", "--inline", "--runs", str(fitted), "--sets.pairs.path", str(data)]
                    + ["--levels", "0.4", "--uncertainty", "None", "--run-dir", str(audit)],
                    ["jobs.score", "--scorer.path", str(fitted / "reward"), "--images", str(picture)]
                    + ["--prompt", "a cat", "--out", str(tmp_path / "scores.csv")],
                    ["jobs.label", "--inline", "--scorers.dina.path", str(fitted / "reward"), "--run-dir", str(labels)]
                    + ["--dataset.path", str(data), "--dataset.split", "train"],
                    ["jobs.fit_reward", "--config", str(config), "--run-dir", str(student), "--fit.labels", "soft"]
                    + ["--dataset.path", str(labels), "--dataset.test", "None"]
                    + ["--fit.held_out", "people", str(encoded / "latents")],
                    ["jobs.align", "--config", str(tmp_path / "align.yaml")],
                ]
            ),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (audit / "report.json").is_file()
    assert (tmp_path / "scores.csv").read_text().count(str(picture.name)) == 1
    assert (aligned / "adapter").is_dir()
    assert json.loads((student / "metrics.json").read_text())["train_pairs"] == 6
    for run_dir in (encoded, fitted, audit, labels, student, aligned):
        versions = json.loads((run_dir / "versions.json").read_text())
        assert (versions["ray"], versions["deepspeed"]) == (None, None)
        assert (versions["torch"], versions["dina_rl"]) == (version("torch"), __version__)
