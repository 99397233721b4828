"""The GPU's benchmark, tried out on the CPU with the miniature's sizes; and its parity checks on made-up numbers."""

import json
import math

import pytest
import torch

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import parity
from benchmarks.gpu.models import write_random
from benchmarks.gpu.settings import BenchmarkRun, align_run, pipeline_config, reward_config
from dina_rl.runtime import open_pipeline

PRESET = """
rollout: {num_steps: 3, window_steps: 2, guidance_scale: 4.5}
grpo: {kl_weight: 0}
learner: {guidance_in_loss: true}
"""
SMALL = {"groups": 2, "group-size": 2, "micro-batch-size": 2, "pairs": 2, "repeats": 1}
WORDS = ["--device", "cpu", "--tiny", *(word for name, value in SMALL.items() for word in (f"--{name}", str(value)))]


def test_the_command_writes_all_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # the command sets it: undone afterwards
    (tmp_path / "preset.yaml").write_text(PRESET)
    file = tmp_path / "figures" / "gpu.json"
    gpu.main([*WORDS, "--settings", "full", "--full", str(tmp_path / "preset.yaml"), "--out", str(file)])
    found = json.loads(file.read_text())
    assert found["card"] is None
    assert all(check["passed"] for check in found["parity"].values())
    assert len(found["parity"]) == len(parity.LIMITS) + 5
    figures = found["full"]
    assert set(figures["seconds"]) == {"rollout", "score", "update", "publish"}
    assert set(figures["planned"]["bytes"]) == {"rollout", "score", "update"}
    assert math.isfinite(figures["images_per_second"])
    assert found["sleep"]["tensors_changed"] == 0
    text = capsys.readouterr().out
    assert "images/s of the whole loop" in text
    assert "pairs/s" in text


def test_without_a_gpu_it_says_what_to_do(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ending:
        gpu.main([])
    assert ending.value.code == 2
    assert "--device cpu --tiny" in capsys.readouterr().err


def test_a_wrong_number_fails_its_check():
    right = {name: torch.linspace(-1, 1, 8) for name in parity.LIMITS}
    wrong = {**right, "velocity": right["velocity"] + 0.01, "update": -right["update"]}
    wrong["scores"] = torch.full((8,), torch.nan)
    failed = parity.failures(parity.compare(wrong, right))
    assert [line.partition(":")[0] for line in failed] == ["fp32 velocity", "fp32 scores", "fp32 update"]
    assert parity.failures(parity.compare(right, right)) == []


def test_random_weights_have_the_true_sizes(tmp_path):
    benchmark = BenchmarkRun()
    directory = write_random(tmp_path / "pipeline", tiny=False)
    backbone = open_pipeline(pipeline_config(benchmark, directory))
    assert backbone.prompt_shape == (77 + 256, 4096, 2048)
    assert backbone.latent_shape(512, 512) == (16, 64, 64)
    assert backbone.sigmas(10, 512, 512)[1] == pytest.approx(0.9601, abs=1e-4)
    assert backbone.load_text_encoder()(["a", "b"]).embeds.dtype == torch.bfloat16
    for preset in (benchmark.fast, benchmark.full):
        assert align_run(benchmark, preset, directory, tmp_path).rollout.num_steps == 10
    assert reward_config(benchmark).taps == (4, 8, 12)


def test_batches_that_do_not_divide_are_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(SystemExit) as ending:
        gpu.main(["--device", "cpu", "--tiny", "--micro-batch-size", "5", "--out", str(tmp_path / "gpu.json")])
    assert ending.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert "micro_batch_size" in lines[0]
