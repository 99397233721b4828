"""Settings of the reward model, its data and its fit."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from dina_rl.config.base import (
    Fraction,
    Indices,
    LoRAConfig,
    NoiseLevel,
    NoiseLevels,
    NonNegative,
    Positive,
    Rate,
    Section,
)


class ThurstoneConfig(Section):
    """Preference likelihood, Eq. 5-8."""

    variance: Literal["noise_calibrated", "fixed"] = "noise_calibrated"
    """noise_calibrated: k sigma(t)^2 + sigma_u^2 (Eq. 7); fixed: sigma_u^2 at every t (Table 2)"""
    k: Annotated[float, Field(ge=0)] = 2.0
    """growth of the comparison variance with the diffusion noise"""
    sigma_u: Rate = 0.1
    """ambiguity of clean samples, a standard deviation"""


class TimestepConfig(Section):
    """q(t), section 4.1."""

    distribution: Literal["uniform", "fixed", "logit_normal"] = "uniform"
    """how training noise levels are drawn"""
    fixed: NoiseLevel = 0.0
    """the level of `fixed`"""
    mean: float = 0.0
    """logit-space mean of `logit_normal`"""
    std: Rate = 1.0
    """logit-space standard deviation of `logit_normal`"""


class RewardModelConfig(Section):
    """DiNa-LRM, section 4.2 and Table 7."""

    taps: Indices = (4, 8, 12)
    """1-based blocks whose outputs are read; blocks after the last one are neither kept nor computed"""
    head_width: Annotated[int | None, Field(gt=0)] = None
    """width of the scoring head; None: the backbone's. Where they differ the head projects the tokens first"""
    num_queries: Positive = 4
    """learnable query tokens"""
    num_heads: Positive = 8
    """attention heads of the scoring head"""
    lora: LoRAConfig | None = LoRAConfig(rank=64, alpha=128.0)
    """adapter on the backbone; None trains the head on a frozen backbone (Table 3)"""
    thurstone: ThurstoneConfig = ThurstoneConfig()
    timestep: TimestepConfig = TimestepConfig()
    single_level: NoiseLevel = 0.4
    """noise level of the single-level score (Eq. 12)"""
    ensemble_levels: NoiseLevels = (0.2, 0.5, 0.7)
    """noise levels of the ensemble score (Eq. 13)"""

    @model_validator(mode="after")
    def _taps_ascend(self) -> Self:
        if list(self.taps) != sorted(set(self.taps)):
            raise ValueError(f"taps must ascend without repeats, got {self.taps}")
        return self


class DatasetConfig(Section):
    """A preference set in HPDv3's on-disk format."""

    path: str = "~/dina_rl/shapes_preferences"
    """directory with train.json, test.json and the images they name"""
    max_skipped: Fraction = 0.01
    """share of records that may be malformed or have unreadable images before the run stops"""
    encode_batch_size: Positive = 64
    """images per VAE forward"""

    @property
    def location(self) -> Path:
        return Path(self.path).expanduser()


class FitConfig(Section):
    """Training of the reward model, Algorithm 1."""

    steps: Positive = 12500
    """optimizer steps (HPDv3's 0.8M pairs at batch 64: one epoch)"""
    batch_size: Positive = 64
    """pairs per step over all workers"""
    learning_rate: Rate = 5e-5
    """AdamW's peak rate"""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """AdamW's decoupled weight decay"""
    warmup_steps: NonNegative = 0
    """steps of linear warm-up"""
    decay_start: Fraction = 1.0
    """share of the steps after which the rate falls linearly to 5 percent; 1 keeps it constant, as the paper does"""
    max_grad_norm: Rate = 1.0
    """gradient norm clip"""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.995
    """decay of the averaged weights that are evaluated and saved"""
    checkpoint_every: Positive = 500
    """steps between checkpoints"""
    num_workers: Positive = 2
    """Ray Train workers; must divide batch_size"""
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0
    """GPUs of one worker"""
    cpus_per_worker: Rate = 0.5
    """CPUs Ray reserves for one worker (leave some for Ray Data)"""
    threads_per_worker: Positive = 1
    """torch threads of one worker on the CPU"""
    max_failures: NonNegative = 3
    """crashes of a worker after which the fit continues from its last checkpoint"""

    @model_validator(mode="after")
    def _workers_divide_batch(self) -> Self:
        if self.batch_size % self.num_workers:
            raise ValueError(
                f"num_workers ({self.num_workers}) must divide batch_size ({self.batch_size}) for equal shards"
            )
        return self
