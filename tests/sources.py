"""What the paper and released code say, by key: the tables with which presets are compared.

The presets name a source at every value (`test_sources.py`); a value that names one of these stands here.
"""

from pathlib import Path

CONFIGS = Path(__file__).parents[1] / "configs"
PUBLISHED_REWARD = "liuhuohuo/DiNa-LRM-SD35M-12layers"
PUBLISHED_TEXT_TOKENS = 128
SD35M = "stabilityai/stable-diffusion-3.5-medium"

Values = dict[str, tuple[object, str]]
"""Dotted key -> (value, where the source says so)."""

# The paper: section or table, as presets name it -> key -> value.
PAPER: dict[str, dict[str, object]] = {
    "4.1": {
        "reward.thurstone.variance": "noise_calibrated",
        "reward.thurstone.k": 2.0,
        "reward.thurstone.sigma_u": 0.1,
    },
    "5.1": {
        "pipeline.path": SD35M,
        "dataset.kind": "hpdv3",
        "reward.single_level": 0.4,
        "reward.ensemble_levels": (0.2, 0.5, 0.7),
        "fit.weight_decay": 0.01,
        "fit.num_workers": 8,
    },
    "5.4": {
        "algorithm": "refl",
        "pipeline.path": SD35M,
        "rewards.dina.levels": (0.4,),
        "rewards.dina": None,  # in the run that HPSv3 rewards
        "rewards.hpsv3.path": "MizzenAI/HPSv3",
        "golden.scorer": "pickscore",
    },
    "C.2": {
        "rollout.window_steps": 3,
        "rollout.group_size": 18,
        "rollout.prompts_per_iteration": 32,
        "golden.scorer": "pickscore",
    },
    "Table 7": {
        "reward.taps": (4, 8, 12),
        "reward.num_queries": 4,
        "reward.lora.rank": 64,
        "reward.lora.alpha": 128.0,
        "reward.timestep.distribution": "uniform",
        "fit.steps": 800_000 // 64,
        "fit.batch_size": 64,
        "fit.learning_rate": 5e-5,
        "fit.ema_decay": 0.995,
    },
    "Table 8": {
        "iterations": 150,
        "rollout.num_steps": 40,
        "rollout.prompts_per_iteration": 256,
        "learner.lora.rank": 32,
        "learner.lora.alpha": 64.0,
        "learner.learning_rate": 3e-5,
        "learner.weight_decay": 0.0,
    },
}
BACKBONES = {  # C.1 names two more
    "reward_flux": "black-forest-labs/FLUX.1-dev",
    "reward_z_image": "Tongyi-MAI/Z-Image-Turbo",
}

# The released code of the paper: its two configurations, its two training scripts, its reward wrapper.
EIGHT_OF_ATTN = tuple(
    f"attn.{name}"
    for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
)
BOTH: Values = {
    "pipeline.path": (SD35M, "both configurations"),
    "pipeline.max_sequence_length": (128, "training scripts"),
    "pipeline.height": (512, "both configurations"),
    "pipeline.width": (512, "both configurations"),
    "rewards.dina.path": (PUBLISHED_REWARD, "reward wrapper"),
    "rewards.dina.levels": ((0.4,), "reward wrapper"),
    "rewards.dina.noise": ("independent", "reward wrapper: one draw a sample"),
    "learner.lora.rank": (32, "training scripts"),
    "learner.lora.alpha": (64.0, "training scripts"),
    "learner.lora.targets": (EIGHT_OF_ATTN, "training scripts: the eight of attn, not attn2"),
    "learner.weight_decay": (1e-4, "both configurations"),
    "golden.num_steps": (40, "both configurations"),
    "golden.aligned_guidances": ((4.5,), "both configurations"),
    "golden.batch_size": (16, "both configurations"),
}
GRPO: Values = {
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
    "learner.micro_batch_size": (9, "GRPO configuration"),
    "learner.learning_rate": (5e-5, "GRPO configuration"),
    "grpo.clip_range": (3e-6, "GRPO configuration"),
    "grpo.kl": ("released", "GRPO training script"),
    "grpo.kl_weight": (0.004, "GRPO configuration"),
    "grpo.advantage_std": ("global", "GRPO configuration"),
    "grpo.advantage_clip": (5.0, "GRPO configuration"),
}
REFL: Values = {
    **BOTH,
    "algorithm": ("refl", "ReFL training script"),
    "pipeline.dtype": ("bfloat16", "ReFL configuration"),
    "rewards.dina.mean": (-12.0, "reward wrapper: (raw + 12) / 10"),
    "rewards.dina.std": (10.0, "reward wrapper: (raw + 12) / 10"),
    "rollout.num_steps": (40, "ReFL configuration"),
    "rollout.guidance_scale": (4.5, "ReFL configuration"),
    "rollout.prompts_per_iteration": (64, "ReFL configuration: 2 x 4 accumulated x 8 GPUs"),
    "rollout.group_size": (1, "ReFL configuration"),
    "refl.stop_range": ((30, 39), "ReFL training script: randint(30, 39)"),
    "learner.guidance_in_loss": (False, "ReFL training script: the step with gradient is unguided"),
    "learner.learning_rate": (1e-4, "ReFL configuration"),
    "learner.ema_decay": (0.0, "ReFL training script: the average is never stepped"),
}
OFFICIAL: dict[str, Values] = {
    "sd35m_flow_grpo_fast_official_code": GRPO,
    "sd35m_flow_grpo_fast_official_code_mixed_with_pickscore": {
        **GRPO,
        "rewards.dina.weight": (1.0, "GRPO training script: A_dina + 0.2 A_pick"),
        "rewards.pickscore.weight": (0.2, "GRPO training script: A_dina + 0.2 A_pick"),
        "rewards.normalise": ("advantage", "GRPO training script: each with the global std, clipped, then added"),
    },
    "sd35m_refl_official_code": REFL,
}

# What the paper's Table 8 leaves open.
TABLE_8: Values = {
    key: REFL[key]
    for key in (
        "pipeline.height",
        "pipeline.width",
        "rollout.guidance_scale",
        "rollout.group_size",
        "refl.stop_range",
        "golden.aligned_guidances",
        "golden.batch_size",
    )
}

# flow_grpo's configuration of PickScore on SD3.5-medium, over all steps.
FLOW_GRPO: Values = {
    "pipeline.path": (SD35M, "configuration"),
    "pipeline.height": (512, "configuration"),
    "pipeline.width": (512, "configuration"),
    "rollout.num_steps": (10, "configuration"),
    "rollout.guidance_scale": (4.5, "configuration"),
    "rollout.noise_level": (0.7, "base configuration"),
    "rollout.window_steps": (9, "configuration: timestep_fraction 0.99 of 10"),
    "rollout.prompts_per_iteration": (48, "configuration"),
    "rollout.group_size": (24, "configuration"),
    "grpo.advantage_std": ("global", "configuration"),
    "grpo.clip_range": (1e-4, "base configuration"),
    "grpo.kl": ("released", "training script"),
    "grpo.kl_weight": (0.01, "configuration"),
    "learner.lora.rank": (32, "training script"),
    "learner.lora.alpha": (64.0, "training script"),
    "learner.learning_rate": (3e-4, "base configuration"),
    "learner.updates_per_iteration": (2, "configuration"),
    "learner.micro_batch_size": (9, "configuration"),
    "learner.guidance_in_loss": (True, "base configuration: cfg"),
    "golden.aligned_guidances": ((4.5,), "base configuration: eval_guidance_scale"),
    "golden.batch_size": (16, "configuration"),
}
# What the paper's own experiment leaves open, from flow_grpo's configurations of a window.
FAST: Values = {
    "pipeline.height": (512, "configuration"),
    "pipeline.width": (512, "configuration"),
    "rollout.num_steps": (10, "configuration"),
    "rollout.noise_level": (0.7, "base configuration"),
    "grpo.clip_range": (1e-5, "configurations of a window"),
    "learner.lora.rank": (32, "training script"),
    "learner.lora.alpha": (64.0, "training script"),
}
# DiffusionNFT's configuration of one reward.
NFT: Values = {
    "algorithm": ("nft", "training script"),
    "pipeline.path": (SD35M, "configuration"),
    "pipeline.height": (512, "configuration"),
    "pipeline.width": (512, "configuration"),
    "rollout.num_steps": (10, "configuration"),
    "rollout.guidance_scale": (1.0, "configuration"),
    "rollout.prompts_per_iteration": (48, "configuration"),
    "rollout.group_size": (24, "configuration"),
    "nft.beta": (1.0, "configuration"),
    "nft.levels": (9, "configuration: timestep_fraction 0.99 of 10"),
    "nft.old_rate": (0.001, "training script"),
    "nft.old_most": (0.5, "training script"),
    "learner.lora.rank": (32, "training script"),
    "learner.lora.alpha": (64.0, "training script"),
    "learner.learning_rate": (3e-4, "configuration"),
    "learner.weight_decay": (1e-4, "configuration"),
    "learner.ema_decay": (0.9, "training script"),
}

# The released code's configurations of the fit; all three have these.
FITS: Values = {
    "pipeline.dtype": ("bfloat16", "mixed_precision"),
    "pipeline.height": (1024, "reference_size"),
    "pipeline.width": (1024, "reference_size"),
    "dataset.buckets": ("published", "bucket manager"),
    "fit.autocast": (True, "mixed_precision"),
}
TEXT: Values = {"pipeline.max_sequence_length": (PUBLISHED_TEXT_TOKENS, "model class")}
FOUR_PAIRS: Values = {"fit.micro_batch_size": (4, "base_batch_size")}
ONE_PAIR: Values = {"fit.micro_batch_size": (1, "base_batch_size")}
RELEASED: dict[str, Values] = {
    **OFFICIAL,
    "sd35m_flow_grpo": FLOW_GRPO,
    "sd35m_flow_grpo_fast": FAST,
    "sd35m_flow_grpo_fast_1gpu": FAST,
    "sd35m_nft": NFT,
    "sd35m_refl": TABLE_8,
    "sd35m_refl_hpsv3": {
        **TABLE_8,
        "rewards.hpsv3.processor": ("Qwen/Qwen2-VL-7B-Instruct", "HPSv3's configuration"),
        "rewards.hpsv3.std": (10.0, "ReFL scorer: reward[:, 0] / 10"),
    },
    "reward_sd35m": {**FITS, **FOUR_PAIRS, "reward.num_heads": (8, "num_attn_heads")},
    "reward_sd35m_official_code": {
        **FITS,
        **TEXT,
        "pipeline.path": (SD35M, "backbone_model_id"),
        "dataset.kind": ("hpdv3", "data processing"),
        "dataset.latent_dtype": ("float32", "preprocessed latents"),
        "reward.taps": ((4, 8, 12), "visual_head_idx, text_head_idx"),
        "reward.num_queries": (4, "num_queries"),
        "reward.num_heads": (8, "num_attn_heads"),
        "reward.lora.rank": (64, "lora_config"),
        "reward.lora.alpha": (128.0, "lora_config"),
        "reward.thurstone.variance": ("noise_calibrated", "training engine"),
        "reward.thurstone.k": (2.0, "training engine"),
        "reward.thurstone.sigma_u": (0.2236067977, "training engine: min_var 0.05"),
        "reward.timestep.distribution": ("uniform", "t_weighting_scheme"),
        "fit.steps": (25_000, "num_epochs 1, of 0.8M pairs"),
        "fit.batch_size": (32, "base_batch_size 4 on 8 GPUs"),
        "fit.learning_rate": (5e-5, "learning_rate"),
        "fit.weight_decay": (0.01, "weight_decay"),
        "fit.max_grad_norm": (1.0, "max_grad_norm"),
        "fit.ema_decay": (0.0, "training engine: the EMA keys are not read"),
    },
    "reward_flux": {
        **FITS,
        **TEXT,
        **ONE_PAIR,
        "reward.taps": ((8, 12, 16, 19), "visual_head_idx, text_head_idx"),
        "reward.head_width": (1536, "reward_head.width"),
    },
    "reward_z_image": {
        **FITS,
        **TEXT,
        **ONE_PAIR,
        "reward.taps": ((4, 8, 12, 16), "visual_head_idx, text_head_idx"),
        "reward.head_width": (1536, "reward_head.width"),
        "reward.lora.rank": (32, "lora_config"),
        "reward.lora.alpha": (64.0, "lora_config"),
    },
}
