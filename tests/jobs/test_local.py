"""The main job as a newcomer runs it, in its smoke version: world, preferences, reward model, alignment, report."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dina_rl import local
from dina_rl.shapes.grammar import prompts
from tests.tiny_run import tiny_run

ROOT = Path(__file__).parents[2]
SMOKE = ["--config", str(ROOT / "configs" / "local_smoke.yaml")]
# The smoke run's stages, each a third as long or less; a learner's forward is as large as a rollout's here too.
SHORT = [
    *("--world.train-groups", "24", "--world.test-groups", "8"),
    *("--fit.steps", "12", "--fit.batch-size", "24", "--fit.warmup-steps", "4", "--fit.checkpoint-every", "6"),
    *("--iterations", "2", "--rollout.prompts-per-iteration", "4", "--rollout.groups-per-call", "1"),
    *("--learner.micro-batch-size", "12", "--golden.dev-samples", "8", "--golden.test-samples", "8"),
    *("--golden.guidances", "1", "2", "--golden.aligned-guidances", "2"),
    # One of each: that more give the same is said in tests/actors, and every process loads torch.
    *("--fit.num-workers", "1", "--workers.rollout-workers", "1", "--workers.learner-ranks", "1"),
]
SUMMARY = {
    "reward": {"accuracy_single", "accuracy_ensemble", "label_ceiling"},
    "align": {
        "proxy_before",
        "proxy_after",
        "golden_before",
        "golden_after",
        "golden_best",
        "golden_base_best_guidance",
        "shape_accuracy_before",
        "shape_accuracy_after",
        "first_ratio_gap_max",
    },
    "seconds": {"preferences", "reward", "align", "total"},
}


def test_the_smoke_run_end_to_end_on_ray(tmp_path, capsys):
    run_dir = tmp_path / "run"
    command = [sys.executable, "-m", "dina_rl.local", *SMOKE, *SHORT, "--run-dir", str(run_dir)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=570, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for stage in ("[preferences]", "[reward]", "[align]", "tensorboard --logdir"):
        assert stage in done.stdout
    summary = json.loads((run_dir / "summary.json").read_text())
    for section, keys in SUMMARY.items():
        assert keys <= set(summary[section])
    assert {"images_per_second", "peak_rss_bytes", "seed", "versions"} <= set(summary)
    assert summary["align"]["first_ratio_gap_max"] == 0
    assert summary["align"]["golden_base_best_guidance"] == max(summary["align"]["base_over_guidance"].values())
    for name in ("align/curves.png", "align/samples.png", "align/adapter/pytorch_lora_weights.safetensors"):
        assert (run_dir / name).stat().st_size > 0
    assert "reward/loss" in EventAccumulator(str(run_dir / "fit" / "tensorboard")).Reload().Tags()["scalars"]
    assert "gain" in EventAccumulator(str(run_dir / "align" / "tensorboard" / "golden")).Reload().Tags()["scalars"]

    with pytest.raises(SystemExit) as again:
        local.main([*SMOKE, *SHORT, "--run-dir", str(run_dir)])
    assert again.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: run directory")
    local.main([*SMOKE, *SHORT, "--run-dir", str(run_dir), "--resume"])
    assert capsys.readouterr().out.strip() == done.stdout[done.stdout.index("reward accuracy") :].strip()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pipeline.path", "/nowhere/sd3"], "pipeline directory /nowhere/sd3 does not exist"),
        (["--reward.taps", "1", "4"], "reward.taps (1, 4) do not fit shapes"),
        (["--pipeline.height", "30"], "image size 30x32 must be a multiple of"),
        (["--prompts.train", "/nowhere/train.txt"], "prompts.train: file /nowhere/train.txt does not exist"),
        (["--prompts.dev", "LEAK"], "held-out numbers would not be held out"),
        (["--workers.learner-ranks", "5"], "does not split into learner.micro_batch_size"),
    ],
)
def test_mistakes_end_before_anything_starts(tmp_path, capsys, arguments, message):
    leak = tmp_path / "leak.txt"
    leak.write_text(prompts("train")[0])
    arguments = [str(leak) if word == "LEAK" else word for word in arguments]
    with pytest.raises(SystemExit) as stopped:
        local.main([*SMOKE, "--run-dir", str(tmp_path / "run"), *arguments])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_run_that_cannot_go_on_ends_with_one_line(tmp_path, tiny_pipeline, tiny_reward, capsys):
    """A learning rate that makes the second gradient overflow. That a rank's word reaches the driver: tests/actors."""
    from jobs.align import main

    run = tiny_run(tmp_path / "run", tiny_pipeline, tiny_reward, inline=True, learner={"learning_rate": 1e30})
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(run.model_dump(mode="json")))
    with pytest.raises(SystemExit) as stopped:
        main(["--config", str(file)])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("error", "Traceback"))]
    assert stopped.value.code == 1
    assert len(lines) == 1
    assert "the gradient norm is nan at policy version 1; the update is void" in lines[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rewards.dina.path", "/nowhere/reward"], "reward model /nowhere/reward does not exist"),
        (["--pipeline.max-sequence-length", "4"], "has 128 and 4; pipeline.max_sequence_length 8 is the fit's"),
        (["--rollout.prompts-per-iteration", "480"], "exceeds the 464 training prompts"),
    ],
)
def test_an_alignment_that_cannot_work_is_refused(tmp_path, tiny_pipeline, tiny_reward, capsys, arguments, message):
    from jobs.align import main

    base = ["--config", str(ROOT / "configs" / "shapes_flow_grpo_fast.yaml"), "--run-dir", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as stopped:
        main([*base, "--pipeline.path", str(tiny_pipeline), "--rewards.dina.path", str(tiny_reward), *arguments])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()
