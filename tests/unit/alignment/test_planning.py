"""The plan of every shipped alignment, and its arithmetic."""

from pathlib import Path

import pytest

from dina_rl.alignment.planning import describe
from dina_rl.config import AlignRun
from jobs.align import main

CONFIGS = Path(__file__).parents[3] / "configs"
ALGORITHMS = ("grpo", "refl", "nft")
PRESETS = [file for file in sorted(CONFIGS.glob("*.yaml")) if any(name in file.stem for name in ALGORITHMS)]
# The mixed recipe has none: the miniature world's golden rules are no scorer that could be mixed in.
WITH_MINIATURE = [file for file in PRESETS if file.stem.startswith("sd35m") and "mixed" not in file.stem]
SMALL = ["--pipeline.path", "shapes", "--pipeline.height", "32", "--pipeline.width", "32"]  # nothing is downloaded


@pytest.mark.parametrize("file", PRESETS, ids=lambda file: file.stem)
def test_every_preset_has_a_plan_and_starts_nothing(file, capsys, tmp_path):
    main(["--config", str(file), "--run-dir", str(tmp_path / "run"), "--plan", *SMALL])
    text = capsys.readouterr().out
    assert all(word in text for word in ("run ", "rollout ", "learner ", "actors ", "memory ", "golden "))
    assert "unknown" not in text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("file", WITH_MINIATURE, ids=lambda file: file.stem)
def test_every_sd35m_preset_has_a_miniature(file):
    assert (CONFIGS / f"{file.stem.replace('sd35m', 'shapes')}.yaml").is_file()


def test_the_arithmetic_of_a_plan():
    run = AlignRun.model_validate(
        {
            "iterations": 10,
            "rollout": {"prompts_per_iteration": 32, "group_size": 18, "groups_per_call": 4},
            "learner": {"updates_per_iteration": 2, "micro_batch_size": 9},
            "workers": {"learner_ranks": 2, "gpus_per_rank": 1, "gpus_per_rollout": 0.5},
        }
    )
    text = describe(run)
    assert "2 update(s) an iteration, 20 in all, rate 3e-05 constant\n" in text
    assert "10 iterations, 5,760 training images" in text
    assert "32 prompts x 18 samples = 576 images, 8 calls" in text
    assert "minibatch 288 = 16 forwards x 9 samples x 2 ranks; 48 backward passes a rank" in text
    assert "2 rollout x 0.5 GPU, 1 scorer x 0 GPU, 2 learner x 1 GPU: 3 GPUs" in text
    assert f"{576 * 5 * 16 * 8 * 8 * 4 / 2**20:.1f} MiB of latents" in text


def test_a_pipeline_that_is_not_here_leaves_the_rest_of_the_plan():
    text = describe(AlignRun.model_validate({"pipeline": {"path": "/nowhere/sd3"}, "rollout": {"group_size": 36}}))
    assert "memory    unknown: pipeline directory /nowhere/sd3 does not exist" in text
    assert "golden" in text
