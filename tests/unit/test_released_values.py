"""Presets say what their source says: the values of released recipes, each with its source, beside our files."""

from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel

from dina_rl.backbones.lora import trainable
from dina_rl.backbones.trained import make_trainable
from dina_rl.cli import read_yaml
from dina_rl.config import AlignRun, FitRun

CONFIGS = Path(__file__).parents[2] / "configs"
PUBLISHED_REWARD = "liuhuohuo/DiNa-LRM-SD35M-12layers"
PUBLISHED_TEXT_TOKENS = 128

# The released code of the paper: its two configurations, its two training scripts, its reward wrapper.
BOTH = {
    "pipeline.max_sequence_length": (128, "training scripts"),
    "pipeline.height": (512, "both configurations"),
    "rewards.dina.path": (PUBLISHED_REWARD, "reward wrapper"),
    "rewards.dina.levels": ((0.4,), "reward wrapper"),
    "rewards.dina.noise": ("independent", "reward wrapper: one draw a sample"),
    "learner.lora.rank": (32, "training scripts"),
    "learner.lora.alpha": (64.0, "training scripts"),
    "learner.weight_decay": (1e-4, "both configurations"),
    "golden.num_steps": (40, "both configurations"),
}
GRPO = {
    **BOTH,
    "algorithm": ("grpo", "GRPO training script"),
    "rollout.num_steps": (10, "GRPO configuration"),
    "rollout.guidance_scale": (1.0, "GRPO configuration: no guidance"),
    "rollout.dynamics": ("cps", "GRPO configuration"),
    "rollout.noise_level": (0.8, "GRPO configuration"),
    "rollout.window_range": ((0, 5), "GRPO configuration"),
    "rollout.window_steps": (3, "GRPO configuration"),
    "rollout.group_size": (18, "GRPO configuration"),
    "rollout.prompts_per_iteration": (64, "GRPO configuration"),
    "learner.updates_per_iteration": (2, "GRPO configuration"),
    "learner.learning_rate": (5e-5, "GRPO configuration"),
    "grpo.clip_range": (3e-6, "GRPO configuration"),
    "grpo.kl": ("released", "GRPO training script"),
    "grpo.kl_weight": (0.004, "GRPO configuration"),
    "grpo.advantage_std": ("global", "GRPO configuration"),
    "grpo.advantage_clip": (5.0, "GRPO configuration"),
    "golden.aligned_guidances": ((4.5,), "GRPO configuration"),
}
RELEASED = {
    "sd35m_flow_grpo_fast_official_code": GRPO,
    "sd35m_flow_grpo_fast_official_code_mixed_with_pickscore": {
        **GRPO,
        "rewards.dina.weight": (1.0, "GRPO training script: A_dina + 0.2 A_pick"),
        "rewards.pickscore.weight": (0.2, "GRPO training script: A_dina + 0.2 A_pick"),
        "rewards.normalise": ("advantage", "GRPO training script: each with the global std, clipped, then added"),
    },
    "sd35m_refl_official_code": {
        **BOTH,
        "algorithm": ("refl", "ReFL training script"),
        "rewards.dina.mean": (-12.0, "reward wrapper: (raw + 12) / 10"),
        "rewards.dina.std": (10.0, "reward wrapper: (raw + 12) / 10"),
        "rollout.num_steps": (40, "ReFL configuration"),
        "rollout.guidance_scale": (4.5, "ReFL configuration"),
        "rollout.prompts_per_iteration": (64, "ReFL configuration: 2 x 4 accumulated x 8 GPUs"),
        "refl.stop_range": ((30, 39), "ReFL training script: randint(30, 39)"),
        "learner.guidance_in_loss": (False, "ReFL training script: the step with gradient is unguided"),
        "learner.learning_rate": (1e-4, "ReFL configuration"),
        "learner.ema_decay": (0.0, "ReFL training script: the average is never stepped"),
        "golden.aligned_guidances": ((4.5,), "ReFL configuration"),
    },
}
ROWS = [(preset, key, value, source) for preset, table in RELEASED.items() for key, (value, source) in table.items()]


def load(preset: str) -> AlignRun:
    return AlignRun.model_validate(read_yaml(CONFIGS / f"{preset}.yaml"))


@pytest.mark.parametrize(("preset", "key", "value", "source"), ROWS)
def test_a_preset_of_released_code_has_its_value(preset: str, key: str, value: object, source: str) -> None:
    found: object = load(preset)
    for name in key.split("."):
        found = dict(found)[name]
    assert found == value, source


def test_every_preset_of_released_code_is_compared() -> None:
    assert {file.stem for file in CONFIGS.glob("sd35m_*official_code*.yaml")} == set(RELEASED)


def test_the_released_adapter_has_its_published_size() -> None:
    """On the eight projections of `attn`, and on none of `attn2`."""
    with torch.device("meta"):
        transformer = SD3Transformer2DModel(
            sample_size=128,
            num_layers=24,
            attention_head_dim=64,
            num_attention_heads=24,
            joint_attention_dim=4096,
            caption_projection_dim=1536,
            pooled_projection_dim=2048,
            pos_embed_max_size=384,
            dual_attention_layers=tuple(range(13)),
            qk_norm="rms_norm",
        )
    make_trainable(transformer, load("sd35m_refl_official_code").learner.lora, targets=(), seed=0)
    assert sum(parameter.numel() for parameter in trainable(transformer).values()) == 18_776_064


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_an_alignment_preset_fits_the_reward_that_its_own_chain_fits(file: Path) -> None:
    """Encode, fit and align presets hang together: same pipeline, same text length."""
    values = read_yaml(file)
    if "rollout" not in values or "rewards" not in values:
        return  # no alignment, or the local run, which fits its own
    run = AlignRun.model_validate(values)
    assert run.rewards.dina is not None
    if run.rewards.dina.path == PUBLISHED_REWARD:
        assert run.pipeline.max_sequence_length == PUBLISHED_TEXT_TOKENS
        return
    fits = [FitRun.model_validate(read_yaml(each)) for each in CONFIGS.glob("*reward*.yaml")]
    made = [fit for fit in fits if str(fit.run_dir / "reward") == run.rewards.dina.path]
    assert made, f"no preset fits {run.rewards.dina.path}"
    for fit in made:
        assert (fit.pipeline.path, fit.pipeline.max_sequence_length) == (
            run.pipeline.path,
            run.pipeline.max_sequence_length,
        )
