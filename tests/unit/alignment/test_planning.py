"""The plan of every shipped alignment, and its arithmetic."""

import re
from pathlib import Path

import pytest

from dina_rl.alignment.planning import describe
from dina_rl.config import AlignRun
from jobs.align import main

CONFIGS = Path(__file__).parents[3] / "configs"
ALGORITHMS = ("grpo", "refl", "nft")
PRESETS = [file for file in sorted(CONFIGS.glob("*.yaml")) if any(name in file.stem for name in ALGORITHMS)]
# The mixed recipe has none: the miniature world's golden rules are no scorer that could be mixed in. HPSv3's neither:
# its miniature is a pixel reward that has to be made first (docs/results/pixel_reward.md).
WITH_MINIATURE = [
    file
    for file in PRESETS
    if file.stem.startswith("sd35m") and not file.stem.endswith(("mixed_with_pickscore", "_1gpu", "_hpsv3"))
]
SMALL = ["--pipeline.path", "shapes", "--pipeline.height", "32", "--pipeline.width", "32"]  # nothing is downloaded


@pytest.mark.parametrize("file", PRESETS, ids=lambda file: file.stem)
def test_every_preset_has_a_plan_and_starts_nothing(file, capsys, tmp_path):
    main(["--config", str(file), "--run-dir", str(tmp_path / "run"), "--plan", *SMALL])
    text = capsys.readouterr().out
    words = ("run ", "rollout ", "learner ", "actors ", "work ", "busy ", "memory ", "golden ")
    assert all(word in text for word in words) or file.stem.startswith("shapes")  # those have no GPUs to be busy
    shares = [int(share) for share in re.findall(r"GPU [\d-]+ \(\D*\) (\d+)%", text)]
    assert all(share >= 90 for share in shares)
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
    assert "2 rollout x 0.5 GPU, 1 scorer x 0 GPU, 2 learner x 1 GPU, 1 text beside a rollout: 3 GPUs" in text
    assert "busy      unknown: not every actor has a GPU" in text
    assert f"{576 * 5 * 16 * 8 * 8 * 4 / 2**20:.1f} MiB of latents" in text


def test_a_plan_of_fewer_samples_counts_the_smaller_update():
    learner = {"updates_per_iteration": 2, "micro_batch_size": 8, "keep": 8}
    text = describe(AlignRun.model_validate({"learner": learner}))
    assert "32 prompts x 18 samples = 576 images" in text
    assert "trains on the 8 most extreme samples of each group" in text
    assert "minibatch 128 = 8 forwards x 8 samples x 2 ranks" in text
    assert f"{32 * 8 * 3:,} trained passes, {32 * 8 * 3:,} of the base" in text


KNOWN = {"path": "stabilityai/stable-diffusion-3-medium-diffusers", "dtype": "bfloat16", "height": 512, "width": 512}
RECIPE = {
    "iterations": 100,
    "pipeline": {**KNOWN, "max_sequence_length": 256},
    "rewards": {"dina": {"path": "/nowhere/reward"}},
    "golden": {"scorer": "pickscore"},
    "learner": {"micro_batch_size": 9},
    "plan_tflops": 350,
}


def test_a_known_hub_id_is_planned_without_a_network_and_the_better_layout_named():
    shares = {"gpus_per_rollout": 1, "gpus_per_scorer": 1, "gpus_per_rank": 1}
    workers = {"rollout_workers": 4, "scorers": 2, "learner_ranks": 2, **shares}
    text = describe(AlignRun.model_validate({**RECIPE, "workers": workers}))
    assert "rollout 12.1 PFLOP: 5,760 passes of one sample\n" in text
    assert "the reward model is not there yet and counted as the paper's" in text
    assert "GPU 0-1 (learner)" in text
    assert "GPU 7 (text, rollout) 35%" in text
    assert "warning: the GPUs are busy 34%; 98% with workers: {gpus: 8}" in text
    assert "s an iteration at 350 TFLOP/s" in text


def test_calls_that_do_not_divide_are_told_of():
    rollout = {"prompts_per_iteration": 32, "groups_per_call": 16}
    values = {"rewards": {"dina": {"path": "/nowhere"}}, "rollout": rollout, "workers": {"gpus": 8}}
    text = describe(AlignRun.model_validate({**values, "learner": {"micro_batch_size": 9}}))
    assert "GPU 1 (rollout, scorer, learner) 100%" in text
    assert "warning: the GPUs are busy" in text
    assert "2 calls do not divide over 8 rollout actors (rollout.groups_per_call)" in text


def test_what_does_not_fit_a_gpu_is_told_to_sleep():
    rewards = {"dina": None, "pickscore": {}}
    values = {"rewards": rewards, "golden": {"scorer": "clip_score"}, "learner": {"micro_batch_size": 9}, "plan_gib": 7}
    text = describe(AlignRun.model_validate({**values, "workers": {"gpus": 8}}))
    assert "colocated, 8 x (rollout, scorer, learner) in turns, 1 text: 8 GPUs" in text
    assert "GPU 1-7 (rollout, scorer, learner) 100%" in text
    assert "warning: beyond the 7 GiB of one GPU" in text
    assert "with workers.sleep they fit: encode 2.3 GiB, rollout 4.0 GiB" in text
    slept = describe(AlignRun.model_validate({**values, "workers": {"gpus": 8, "sleep": True}}))
    assert "GPU 0 (text, rollout, scorer, learner): encode 2.3 GiB" in slept
    assert "GPU 1-7 (rollout, scorer, learner): rollout 3.4 GiB" in slept
    assert "warning" not in slept


def test_a_pipeline_that_is_not_here_leaves_the_rest_of_the_plan():
    text = describe(AlignRun.model_validate({"pipeline": {"path": "/nowhere/sd3"}, "rollout": {"group_size": 36}}))
    assert "memory    unknown: pipeline directory /nowhere/sd3 does not exist" in text
    assert "golden" in text
