"""Reward model and alignment on FLUX and Z-Image: what fits SD3 fits them, end to end in this process."""

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from dina_rl.alignment.inline import InlineExperience, InlineLearner
from dina_rl.alignment.loop import align
from dina_rl.alignment.prompts import load_prompts
from dina_rl.alignment.record import Recorder
from dina_rl.config import LoRAConfig, PipelineConfig, RewardModelConfig
from dina_rl.reward.checkpoint import load_reward, save_reward
from dina_rl.reward.model import LatentRewardModel
from dina_rl.runtime import open_pipeline
from dina_rl.seeding import normal
from jobs.align import exporter, preflight
from tests.tiny_reward import stirred_model
from tests.tiny_run import tiny_run

# A head of half the tokens' width, as the published ones of FLUX.
REWARD = RewardModelConfig(taps=(1, 2), num_heads=4, head_width=16, lora=LoRAConfig(rank=4, alpha=8))
PROMPTS = ("a small red circle on blue", "", "a large green cross on red")


@pytest.fixture(scope="module", params=["flux", "z_image"])
def pipeline(request: pytest.FixtureRequest) -> PipelineConfig:
    lengths = {"flux": 8, "z_image": 64}  # T5 words; bytes of the chat
    path = request.getfixturevalue(f"tiny_{request.param}")
    return PipelineConfig(path=str(path), height=32, width=32, max_sequence_length=lengths[request.param])


@pytest.fixture(scope="module")
def model(pipeline: PipelineConfig) -> LatentRewardModel:
    return stirred_model(open_pipeline(pipeline), REWARD)


def latents(model: LatentRewardModel, name: str) -> torch.Tensor:
    return normal((len(PROMPTS), *model.backbone.latent_shape(32, 32)), name)


def test_a_fit_step_reaches_all_trainable_weights(model: LatentRewardModel) -> None:
    prompt = model.backbone.load_text_encoder()(PROMPTS)
    images = torch.cat([latents(model, "chosen"), latents(model, "rejected")])
    levels = torch.tensor([0.1, 0.5, 0.9])
    scores = model.unit_scores(images, torch.arange(3).repeat(2), levels, prompt, latents(model, "e"))
    chosen, rejected = scores.chunk(2)
    (rejected - chosen).exp().sum().backward()
    trained = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"truncated", "head"}
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name or name.startswith("head.")), name
        assert parameter.requires_grad == (parameter.grad is not None), name
        # Biases apart: scores' differences do not depend on the last one, nor a softmax on its keys'.
        if parameter.requires_grad and not name.endswith("bias"):
            assert parameter.grad.abs().sum() > 0, name
    model.zero_grad()


def test_a_score_depends_on_its_sample_alone(model: LatentRewardModel) -> None:
    """Captions of other lengths in the batch are padding to it, at one noise level and in an ensemble."""
    prompt = model.backbone.load_text_encoder()(PROMPTS)
    x, noise = latents(model, "clean"), latents(model, "noise")
    for levels in ((0.4,), (0.2, 0.5, 0.7)):
        with torch.no_grad():
            together = model.score_clean(x, prompt, levels, noise)
            one = slice(1, 2)
            alone = model.score_clean(x[one], prompt.select(one), levels, noise[one])
            other_prompt = model.score_clean(x[one], prompt.select(slice(0, 1)), levels, noise[one])
        torch.testing.assert_close(together[one], alone, rtol=1e-5, atol=1e-5)
        assert (alone - other_prompt).abs() > 1e-4


def test_a_reward_directory_comes_back(tmp_path: Path, pipeline: PipelineConfig, model: LatentRewardModel) -> None:
    save_reward(model, tmp_path / "reward", pipeline=pipeline)
    loaded = load_reward(tmp_path / "reward", model.backbone)
    prompt = model.backbone.load_text_encoder()(PROMPTS)
    x, noise = latents(model, "clean"), latents(model, "noise")
    with torch.no_grad():
        assert torch.equal(*(each.score_clean(x, prompt, (0.4,), noise) for each in (model, loaded)))


@pytest.mark.parametrize("algorithm", ["grpo", "refl"])
def test_an_alignment_run(tmp_path: Path, pipeline: PipelineConfig, model: LatentRewardModel, algorithm: str) -> None:
    save_reward(model, tmp_path / "reward", pipeline=pipeline)
    changes = {"refl": {"stop_range": [2, 3]}, "learner": {"updates_per_iteration": 1}} if algorithm == "refl" else {}
    run = tiny_run(
        tmp_path / "run",
        Path(pipeline.path),
        tmp_path / "reward",
        algorithm=algorithm,
        iterations=1,
        golden={"every": 1},
        **changes,
    ).model_copy(update={"pipeline": pipeline})
    prompts = preflight(run)
    assert prompts == load_prompts(run.prompts)
    recorder = Recorder(run, run.run_dir, exporter(run))
    align(run, prompts, InlineExperience(run), InlineLearner(run), recorder)
    (iteration,) = recorder.history.iterations()
    gap = "first_ratio_gap" if algorithm == "grpo" else "first_prediction_gap"
    assert iteration[gap] == 0, "rollout and learner see the same captions in the same geometry"
    DiffusionPipeline.from_pretrained(pipeline.path).load_lora_weights(run.run_dir / "adapter")
